from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluator_ranks import Projection, photos, save_tower_config, whole_suite
from safetensors.torch import load_file

from lpl_lightning.evaluation.feature_metrics import FeatureMetrics
from lpl_lightning.evaluation.image_metrics import SpectrumMetrics, WaveletMetrics
from lpl_lightning.evaluation.measure import Sets
from lpl_lightning.evaluation.report import SAMPLES, Resampling
from lpl_lightning.evaluation.suite import Suite, versions
from lpl_lightning.metrics.features import ModuleFeatures
from lpl_lightning.metrics.reference import ReferenceStatistics

REAL = photos(60, 1)
CPU = torch.device("cpu")


def features(name: str = "x", **settings: Any) -> FeatureMetrics:
    return FeatureMetrics(ModuleFeatures(Projection()), name, **settings)


def measured(suite: Suite, sets: Sets, generated: torch.Tensor) -> Any:
    suite.begin(sets, CPU)
    captions = [f"number {i}" for i in range(len(generated))] if sets.captions else None
    suite.update(REAL, "real", torch.arange(60))
    if sets.autoencoder is not None:
        suite.update(REAL * 0.9, "reconstructed", torch.arange(60))
    suite.put_real_states(suite.real_states())
    suite.update(generated, "generated", torch.arange(len(generated)), captions)
    return suite.compute()


def test_by_default_nothing_needs_weights() -> None:
    suite = Suite()
    assert [measure.label for measure in suite] == ["spectrum", "wavelet", "reconstruction"]
    assert not list(suite.parameters())
    found = measured(suite, Sets(16, 60, 60), photos(60, 2))
    bands = [f"spectrum_error_{band}" for band in ("low", "middle", "high")]
    assert list(found) == ["spectrum_log_difference", *bands, "frechet_wavelet"]
    found = measured(suite, Sets(16, 60, 60, autoencoder="a"), photos(60, 2))
    assert list(found)[5:] == ["reconstruction_frechet_wavelet", "reconstruction_psnr", "reconstruction_ssim"]


def test_equal_sets_do_not_differ(tmp_path: Path) -> None:
    suite = whole_suite(save_tower_config(tmp_path / "tower"))
    found = {name: value.value for name, value in measured(suite, Sets(16, 60, 60, True, "a"), REAL).items()}
    for name in ("frechet_some", "frechet_all", "frechet_wavelet"):
        assert found[name] < 1e-8
    for name in ("spectrum_log_difference", "spectrum_error_low", "spectrum_error_middle", "spectrum_error_high"):
        assert found[name] < 1e-12
    for name in ("precision", "recall", "density", "coverage"):
        assert found[f"{name}_some"] == found[f"{name}_all"] == 1
    assert found["memorization_all"] == 0
    assert found["reconstruction_frechet_all"] > 1e-4


def test_measures_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="`measures` must be one or more that differ in label, got \\[\\]"):
        Suite([])
    with pytest.raises(ValueError, match="got \\['features_x', 'features_x'\\]: give FeatureMetrics .* `name`"):
        Suite([features(), features()])
    # A network of the name of a wavelet.
    suite = Suite([WaveletMetrics(), features("wavelet")])
    with pytest.raises(ValueError, match=r"features_wavelet gives \['frechet_wavelet'\], as another does"):
        measured(suite, Sets(16, 60, 60), photos(60, 2))


def test_every_measure_is_asked_before_images_come() -> None:
    suite = Suite([SpectrumMetrics(), WaveletMetrics(), features(neighbours=50, kernel=False)])
    suite.check(Sets(16, 60, 60))
    for sets, said in ((Sets(15, 60, 60), "15 px"), (Sets(16, 60, 50), "got 50 generated"), (Sets(16, 5, 60), "real")):
        for check in (suite.check, lambda sets: suite.begin(sets, CPU)):
            with pytest.raises(ValueError, match=said):
                check(sets)


def test_what_is_written_gives_the_values_again(tmp_path: Path) -> None:
    suite = whole_suite(save_tower_config(tmp_path / "tower"))
    sets = Sets(16, 60, 45, True, "a")
    found = measured(suite, sets, photos(45, 2, 0.6))
    notes = suite.write(tmp_path / "tower", sets)
    assert [note.split(":")[0] for note in notes] == [f"recall_{name}, coverage_{name}" for name in ("some", "all")]
    assert not list(tmp_path.rglob("*.unfinished"))
    samples = load_file(tmp_path / "tower" / SAMPLES)
    assert samples["index_generated"].tolist() == list(range(45))
    assert samples["index_real"].tolist() == list(range(60))
    resampled = {name: value for name, value in found.items() if value.resampling is not None}
    overlap = [f"{name}_all" for name in ("precision", "density")]
    means = ["clip_score", "reconstruction_psnr", "reconstruction_ssim", *overlap]
    assert set(resampled) == {"frechet_all", "spectrum_log_difference", *means}
    for name, value in resampled.items():
        how: Resampling = value.resampling
        rows = samples[how.key].double()
        assert len(rows) == len(samples[f"index_{how.of}"])
        if how.kind == "mean":
            again = float(rows.mean()) * how.scale
        elif how.kind == "spectrum":
            again = float((rows.mean(0) - samples[f"{how.key}_real"])[1:].abs().mean())
        else:
            path = tmp_path / "tower" / f"reference_{how.key.removeprefix('features_')}.safetensors"
            reference = ReferenceStatistics.load(path)
            cov = rows.T.cov()
            # The eigenvalues of C1 C2 are real and not negative, though it is not symmetric.
            root = torch.linalg.eigvals(cov @ reference.covariance).real.clamp(min=0).sqrt().sum()
            mean = (rows.mean(0) - reference.mean).square().sum()
            again = float(mean + cov.trace() + reference.covariance.trace() - 2 * root)
        assert again == pytest.approx(value.value, rel=1e-5), name


def test_notes_of_the_measures_reach_the_report(tmp_path: Path) -> None:
    few = FeatureMetrics(ModuleFeatures(Projection(70)), "wide", None, kernel=False, allow_few=True)
    suite = Suite([few])
    sets = Sets(16, 60, 60)
    measured(suite, sets, photos(60, 2))
    assert suite.write(tmp_path, sets) == [
        "wide: there are fewer images than the 70 features, so that the Frechet distance depends on their number and "
        "compares with none of another number."
    ]


def test_versions_are_those_that_are_installed() -> None:
    found = versions()
    assert found["torchmetrics"] == version("torchmetrics")
    assert found["torch"] == version("torch")
    assert {"torchvision", "numpy", "pillow", "diffusers"} <= set(found)
