from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluator_ranks import photos, save_tower_config
from torch import Tensor

from lpl_lightning.evaluation.image_metrics import CaptionMetrics, SpectrumMetrics, WaveletMetrics
from lpl_lightning.evaluation.measure import Measure, Sets
from lpl_lightning.evaluation.reconstruction_metrics import ReconstructionMetrics
from lpl_lightning.evaluation.report import Value
from lpl_lightning.metrics.clip_score import CLIPScore
from lpl_lightning.metrics.spectrum import PowerSpectrum, radial_power
from lpl_lightning.metrics.spectrum_plot import read_spectra
from lpl_lightning.metrics.wavelet import FrechetWaveletDistance

REAL, GENERATED, AGAIN = photos(61, 1), photos(53, 2, 0.6), photos(61, 1, 0.9)
CAPTIONS = [f"photo number {i}" for i in range(53)]


def values(
    measure: Measure, batch_size: int = 16, captions: bool = False, again: bool = True, shuffled: bool = False
) -> dict[str, Value]:
    sets = Sets(16, 61, 53, captions, "small" if again else None)
    measure.begin(sets, torch.device("cpu"))
    for index in (torch.randperm(61) if shuffled else torch.arange(61)).split(batch_size):
        measure.update(REAL[index], "real", index)
        if again:
            measure.update(AGAIN[index], "reconstructed", index)
    measure.put_real_state(measure.real_state())
    measure.begin_generated()
    for index in (torch.randperm(53) if shuffled else torch.arange(53)).split(batch_size):
        measure.update(GENERATED[index], "generated", index, [CAPTIONS[i] for i in index] if captions else None)
    return measure.compute()


def measures(tmp_path: Path) -> list[Measure]:
    torch.manual_seed(2)  # of which scores differ
    score = CLIPScore(save_tower_config(tmp_path / "tower"))
    return [SpectrumMetrics(), SpectrumMetrics(True), WaveletMetrics(), ReconstructionMetrics(), CaptionMetrics(score)]


def test_batches_and_their_order_change_nothing(tmp_path: Path) -> None:
    for measure in measures(tmp_path):
        whole = values(measure, 100, captions=True)
        samples = measure.samples()
        for how in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 7, "shuffled": True}):
            found = values(measure, captions=True, **how)  # type: ignore[arg-type]
            assert {name: v.value for name, v in found.items()} == pytest.approx(
                {name: v.value for name, v in whole.items()}, rel=1e-5
            )
            torch.testing.assert_close(measure.samples(), samples, rtol=1e-4, atol=1e-4)


def test_spectra(tmp_path: Path) -> None:
    measure = SpectrumMetrics()
    found = values(measure)
    spectrum = PowerSpectrum(16)
    spectrum.update(REAL, real=True)
    spectrum.update(GENERATED, real=False)
    expected = spectrum.compute()
    assert found["spectrum_log_difference"].value == pytest.approx(float(expected.mean_absolute_log_difference))
    bands = [found[f"spectrum_error_{band}"].value for band in ("low", "middle", "high")]
    np.testing.assert_allclose(bands, expected.band_errors().numpy(), rtol=1e-9)
    power = {name: radial_power(images).mean(0)[7:] for name, images in (("real", REAL), ("generated", GENERATED))}
    assert bands[2] == pytest.approx(float(((power["generated"] - power["real"]).abs() / power["real"])[-4:].mean()), 1)
    made = {"class": "PowerSpectrum", "luminance": "Rec. 601", "window": "none", "generated": 53, "real": 61}
    assert all(value.provenance == made and value.better == "lower" for value in found.values())
    # What is written is enough to compute the difference anew.
    how, samples = found["spectrum_log_difference"].resampling, measure.samples()
    assert how is not None
    assert how.kind == "spectrum"
    mean = samples[how.key].double().mean(0) - samples[f"{how.key}_real"]
    assert float(mean[1:].abs().mean()) == pytest.approx(found["spectrum_log_difference"].value, rel=1e-6)
    assert measure.write(tmp_path) == []
    # Sums of other batches, in another order.
    written = read_spectra(tmp_path / "spectra.csv")["generated_power"]
    assert written == pytest.approx(expected.generated_power.tolist(), rel=1e-12)
    assert (tmp_path / "spectra.png").read_bytes()[:4] == b"\x89PNG"


def test_spectra_of_flat_images_can_be_computed_anew() -> None:
    """Of power 0 there is no logarithm: samples and values take it of the same least power."""
    measure = SpectrumMetrics()
    measure.begin(Sets(16, 61, 9), torch.device("cpu"))
    measure.update(REAL, "real", torch.arange(61))
    flat = torch.linspace(-0.8, 0.8, 9).view(9, 1, 1, 1).expand(9, 3, 16, 16)
    flat = torch.cat([flat[:8], GENERATED[:1]])
    measure.update(flat, "generated", torch.arange(9))
    value = measure.compute()["spectrum_log_difference"]
    samples = measure.samples()
    assert value.resampling is not None
    mean = samples[value.resampling.key].double().mean(0) - samples[f"{value.resampling.key}_real"]
    assert float(mean[1:].abs().mean()) == pytest.approx(value.value, rel=1e-6)


def test_values_say_what_counts_they_are_biased_by(tmp_path: Path) -> None:
    found = {name: value for measure in measures(tmp_path) for name, value in values(measure, captions=True).items()}
    assert {name: set(value.biased_by) for name, value in found.items() if value.biased_by} == {
        "spectrum_log_difference": {"generated", "real"},
        "spectrum_error_low": {"generated", "real"},
        "spectrum_error_middle": {"generated", "real"},
        "spectrum_error_high": {"generated", "real"},
        "frechet_wavelet": {"generated", "real"},
        "reconstruction_frechet_wavelet": {"reconstructed", "real"},
    }
    assert {"clip_score", "reconstruction_psnr", "reconstruction_ssim"} <= set(found)


def test_windows_change_spectra() -> None:
    plain, windowed = values(SpectrumMetrics()), values(SpectrumMetrics(window=True))
    spectrum = PowerSpectrum(16, window=True)
    spectrum.update(REAL, real=True)
    spectrum.update(GENERATED, real=False)
    expected = float(spectrum.compute().mean_absolute_log_difference)
    found = windowed["spectrum_log_difference"]
    assert found.value == pytest.approx(expected) != plain["spectrum_log_difference"].value
    assert found.provenance["window"] == "Hann"
    windowed_measure = SpectrumMetrics(window=True)
    values(windowed_measure)
    mean = windowed_measure.samples()["log_power"].double().mean(0) - windowed_measure.samples()["log_power_real"]
    assert float(mean[1:].abs().mean()) == pytest.approx(expected, rel=1e-6)


def test_without_matplotlib_a_note_says_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = SpectrumMetrics()
    values(measure)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    (note,) = measure.write(tmp_path)
    assert note.startswith("spectra.png is not there. Plots need matplotlib")
    assert [path.name for path in tmp_path.iterdir()] == ["spectra.csv"]


def by_metric(generated: Tensor, level: int) -> float:
    metric = FrechetWaveletDistance(16, level, allow_few=True)
    metric.update(REAL, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def test_wavelets() -> None:
    found = values(WaveletMetrics())
    assert list(found) == ["frechet_wavelet", "reconstruction_frechet_wavelet"]
    assert found["frechet_wavelet"].value == pytest.approx(by_metric(GENERATED, 2), rel=1e-9)
    assert found["reconstruction_frechet_wavelet"].value == pytest.approx(by_metric(AGAIN, 2), rel=1e-9)
    made = {"class": "FrechetWaveletDistance", "wavelet": "haar", "level": 2}
    assert found["frechet_wavelet"].provenance == made | {"generated": 53, "real": 61}
    assert found["reconstruction_frechet_wavelet"].provenance == made | {"reconstructed": 61, "real": 61}
    deeper = values(WaveletMetrics(level=3), again=False)
    assert list(deeper) == ["frechet_wavelet"]
    assert deeper["frechet_wavelet"].value == pytest.approx(by_metric(GENERATED, 3), rel=1e-9)


@pytest.mark.parametrize(
    ("side", "level"), [(8, 1), (10, 1), (12, 1), (16, 2), (24, 2), (64, 4), (96, 4), (256, 6), (512, 7)]
)
def test_images_are_split_down_to_four_coefficients(side: int, level: int) -> None:
    measure = WaveletMetrics(allow_few=True)
    measure.sets = Sets(side, 10**6, 10**6)
    measure.check(measure.sets)
    assert measure.provenance()["level"] == level


@pytest.mark.parametrize(
    ("level", "sets", "said"),
    [
        (None, Sets(15, 99, 99), "images of 15 px cannot be split 1 times"),
        (None, Sets(6, 99, 99), "images of 6 px cannot be split 1 times"),
        (3, Sets(20, 99, 99), "images of 20 px cannot be split 3 times"),
        (5, Sets(16, 99, 99), "images of 16 px cannot be split 5 times"),
        (None, Sets(16, 47, 48), r"of 48 coefficients need 48 images or more, got 47 real ones.* `level` \(now 2\)"),
        (None, Sets(16, 48, 47), "need 48 images or more, got 47 generated ones"),
        (3, Sets(16, 12, 1), "of 12 coefficients need 12 images or more, got 1 generated ones. Raise their number. S"),
    ],
)
def test_what_has_no_wavelet_distance_is_refused(level: int | None, sets: Sets, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WaveletMetrics(level).check(sets)


def test_wavelets_of_few_images() -> None:
    WaveletMetrics().check(Sets(16, 48, 48))
    WaveletMetrics(allow_few=True).check(Sets(16, 2, 2))
    with pytest.raises(ValueError, match="need 2 images or more, got 1 real"):
        WaveletMetrics(allow_few=True).check(Sets(16, 1, 2))
    with pytest.raises(ValueError, match="`level` must be 1 or more"):
        WaveletMetrics(0)


def test_captions(tmp_path: Path) -> None:
    torch.manual_seed(2)  # of which scores differ
    score = CLIPScore(save_tower_config(tmp_path / "tower"))
    measure = CaptionMetrics(score)
    found = values(measure, captions=True)["clip_score"]
    expected = score.pairs(GENERATED, CAPTIONS)
    assert found.value == pytest.approx(float(expected.mean()), rel=1e-5)
    assert len(set(expected.tolist())) > 10
    assert found.provenance == score.provenance() | {"generated": 53}
    assert (found.better, found.resampling and found.resampling.key) == ("higher", "clip_score")
    torch.testing.assert_close(measure.samples()["clip_score"].double(), expected, rtol=1e-4, atol=1e-4)
    assert measure.real_state() == {}
    with pytest.raises(ValueError, match="clip_score needs a caption beside each generated image"):
        measure.check(Sets(16, 61, 53))
    with pytest.raises(ValueError, match="one an image, 16, got 0"):
        measure.update(GENERATED[:16], "generated", torch.arange(16))


def test_real_images_take_no_part_in_captions_and_generated_ones_none_in_reconstructions(tmp_path: Path) -> None:
    """Each measure takes all roles, and counts its own."""
    for measure in measures(tmp_path):
        first = {name: v.value for name, v in values(measure, captions=True).items()}
        measure.begin_generated()
        for index in torch.arange(53).split(10):
            measure.update(GENERATED[index], "generated", index, [CAPTIONS[i] for i in index])
        assert {name: v.value for name, v in measure.compute().items()} == pytest.approx(first, rel=1e-6)
