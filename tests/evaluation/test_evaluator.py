from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluator_ranks import (
    SIDE,
    Images,
    Projection,
    evaluate,
    photos,
    save_tower_config,
    small_autoencoder,
    whole_suite,
)
from forked import Script, ended_well
from safetensors.torch import load_file
from torch import Tensor

from lpl_lightning.evaluation.cache import ReferenceCache
from lpl_lightning.evaluation.evaluator import Evaluator
from lpl_lightning.evaluation.feature_metrics import FeatureMetrics
from lpl_lightning.evaluation.image_files import PixelHash
from lpl_lightning.evaluation.image_metrics import SpectrumMetrics, WaveletMetrics
from lpl_lightning.evaluation.measure import Measure, Sets
from lpl_lightning.evaluation.report import Report
from lpl_lightning.evaluation.suite import Suite, versions
from lpl_lightning.metrics.features import ModuleFeatures

REAL, GENERATED = photos(61, 1), photos(53, 2, 0.6)
CAPTIONS = [f"photo number {i}" for i in range(53)]


def features(seed: int = 0, **settings: Any) -> FeatureMetrics:
    given: dict[str, Any] = {"name": "x", "neighbours": 2, "kernel_subset": 9}
    return FeatureMetrics(ModuleFeatures(Projection(seed=seed)), **(given | settings))


def taken(
    folder: Path | None, *measures: Measure, real: Tensor = REAL, key: str | None = "k", autoencoder: str | None = None
) -> tuple[Evaluator, int]:
    """An evaluator that has measured real images, and how many it read."""
    suite = Suite(list(measures) if measures else [features(), SpectrumMetrics(), WaveletMetrics()])
    evaluator = Evaluator(suite, torch.device("cpu"), ReferenceCache(folder), 16, progress=False)
    images = Images(real)
    sets = Sets(SIDE, len(real), 53, autoencoder=autoencoder)
    evaluator.take_real(images, sets, {"name": "photos"}, key, None if autoencoder is None else small_autoencoder())
    return evaluator, images.read


def values(evaluator: Evaluator, images: Tensor = GENERATED) -> dict[str, float]:
    return {name: value.value for name, value in evaluator.measure(Images(images), "set", {}).values.items()}


def hash_of(images: Tensor) -> str:
    found = PixelHash()
    found.add(images)
    return found.hexdigest()


# Real images put away and put back


def test_what_was_kept_stands_for_the_real_images(tmp_path: Path) -> None:
    """With a second set of measures of new objects, as in another process."""
    first, read = taken(tmp_path, autoencoder="a")
    assert read == 61
    expected = values(first)
    second, read = taken(tmp_path, autoencoder="a")
    assert read == 0
    assert values(second) == expected
    assert "reconstruction_frechet_x" in expected
    assert second.about_real == first.about_real == {"name": "photos", "count": 61, "hash": hash_of(REAL)}
    assert len(list(tmp_path.iterdir())) == 3
    # Without a cache all is read again.
    again, read = taken(None, autoencoder="a")
    assert read == 61
    assert values(again) == expected


def test_all_measures_are_kept(tmp_path: Path) -> None:
    data = {
        "tower": save_tower_config(tmp_path / "tower"),
        "inception": False,
        "real": REAL,
        "generated": GENERATED,
        "captions": CAPTIONS,
        "cache": str(tmp_path / "cache"),
    }
    first = evaluate(data, tmp_path, 16)
    second = evaluate(data, tmp_path, 7)
    assert (first["read"], second["read"]) == (61, 0)
    torch.testing.assert_close(second["values"], first["values"], rtol=1e-4, atol=1e-9)
    assert second["hashes"] == first["hashes"] == {"images": hash_of(GENERATED), "reference": hash_of(REAL)}


def test_what_is_new_is_measured_alone(tmp_path: Path) -> None:
    taken(tmp_path, features())
    evaluator, read = taken(tmp_path, features(), SpectrumMetrics())
    assert read == 61
    assert values(evaluator) == pytest.approx(values(taken(None, features(), SpectrumMetrics())[0]))
    _, read = taken(tmp_path, SpectrumMetrics())
    assert read == 0


@pytest.mark.parametrize(
    "other",
    [
        features(seed=1),
        features(name="y"),
        features(max_images=30),
        features(kernel=False, neighbours=None),
        FeatureMetrics(ModuleFeatures(Projection(), size=8), "x", 2, kernel_subset=9),
        FeatureMetrics(ModuleFeatures(Projection(), size=8, antialias=False), "x", 2, kernel_subset=9),
    ],
)
def test_other_settings_are_measured_anew(tmp_path: Path, other: FeatureMetrics) -> None:
    """What one kept never serves the other, in either order."""
    expected = values(taken(None, other)[0])
    taken(tmp_path / "a", features())
    found, read = taken(tmp_path / "a", other)
    assert read == 61
    assert values(found) == expected
    own = values(taken(None, features())[0])
    taken(tmp_path / "b", other)
    found, read = taken(tmp_path / "b", features())
    assert read == 61
    assert values(found) == own


def test_other_windows_and_levels_are_measured_anew(tmp_path: Path) -> None:
    for measures in ([SpectrumMetrics()], [SpectrumMetrics(True)], [WaveletMetrics()], [WaveletMetrics(3)]):
        assert taken(tmp_path, *measures)[1] == 61
        assert taken(tmp_path, *measures)[1] == 0


def test_other_images_and_autoencoders_are_measured_anew(tmp_path: Path) -> None:
    expected = values(taken(None, autoencoder="b")[0])
    for key, autoencoder in (("k", None), ("l", None), ("k", "a"), ("k", "b")):
        evaluator, read = taken(tmp_path, key=key, autoencoder=autoencoder)
        assert read == 61
    assert values(evaluator) == expected
    _, read = taken(tmp_path, real=REAL[:60])
    assert read == 60


def test_libraries_of_other_versions_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken(tmp_path)
    other = versions() | {"torchvision": "99"}
    monkeypatch.setattr("lpl_lightning.evaluation.evaluator.versions", lambda: other)
    assert taken(tmp_path)[1] == 61


def test_settings_of_generated_images_alone_are_no_reason_to_read_again(tmp_path: Path) -> None:
    taken(tmp_path, features(neighbours=2))
    evaluator, read = taken(tmp_path, features(neighbours=3, kernel_subset=20, memorization=True))
    assert read == 0
    expected = values(taken(None, features(neighbours=3, kernel_subset=20, memorization=True))[0])
    assert values(evaluator) == expected


def test_a_file_of_another_name_does_not_serve(tmp_path: Path) -> None:
    """Nor one that was damaged: it is warned of and made anew."""
    taken(tmp_path / "a", features())
    taken(tmp_path / "b", features(seed=1))
    (path,), (other,) = (list((tmp_path / name).iterdir()) for name in "ab")
    path.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="it is of other images or settings than its name says"):
        evaluator, read = taken(tmp_path / "a", features())
    assert read == 61
    assert values(evaluator) == values(taken(None, features())[0])
    assert taken(tmp_path / "a", features())[1] == 0


def test_images_that_changed_unseen_are_refused(tmp_path: Path) -> None:
    """Files of the sizes and times that they had: it shows where one measure has to read them."""
    taken(tmp_path, features())
    changed = REAL.clone()
    changed[3, 0, 0, 0] = -changed[3, 0, 0, 0] - 1 / 127.5
    with pytest.raises(ValueError, match=f"The real images are not those that {tmp_path} holds results of"):
        taken(tmp_path, features(), SpectrumMetrics(), real=changed)
    assert len(list(tmp_path.iterdir())) == 1  # nothing was stored


def test_without_a_key_pixels_are_the_key(tmp_path: Path) -> None:
    first, read = taken(tmp_path, key=None)
    assert read == 2 * 61  # once for the key
    second, read = taken(tmp_path, key=None)
    assert read == 61
    assert values(second) == values(first)
    changed = REAL.clone()
    changed[3, 0, 0, 0] = -changed[3, 0, 0, 0] - 1 / 127.5
    assert taken(tmp_path, real=changed, key=None)[1] == 2 * 61


# Reconstructions


def test_reconstructions_are_those_of_the_posteriors_mean(tmp_path: Path) -> None:
    autoencoder = small_autoencoder()
    assert autoencoder.sample_posterior
    measure = features()
    evaluator = Evaluator(Suite([measure]), torch.device("cpu"), ReferenceCache(None), 16, progress=False)
    sets = Sets(SIDE, 61, 53, autoencoder="small")
    evaluator.take_real(Images(REAL), sets, {}, "k", autoencoder)
    assert autoencoder.sample_posterior  # as it was
    with torch.no_grad():
        moments: Any = autoencoder.model.encode(REAL).latent_dist
        again = autoencoder.model.decode(moments.mode()).sample.clamp(-1, 1)
    x, y = (measure.extractor(images).double() for images in (REAL, again))
    root = torch.linalg.eigvals(x.T.cov() @ y.T.cov()).real.clamp(min=0).sqrt().sum()
    expected = float((x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * root)
    assert values(evaluator)["reconstruction_frechet_x"] == pytest.approx(expected, rel=1e-4)
    for said, given in ((None, autoencoder), ("small", None)):
        with pytest.raises(ValueError, match="`autoencoder` must be given where `sets` says"):
            evaluator.take_real(Images(REAL), Sets(SIDE, 61, 53, autoencoder=said), {}, "k", given)


# Generated images


def test_nothing_of_one_set_is_left_in_the_next(tmp_path: Path) -> None:
    tower = save_tower_config(tmp_path / "tower")

    def evaluator() -> Evaluator:
        found = Evaluator(whole_suite(tower), torch.device("cpu"), ReferenceCache(None), 16, progress=False)
        found.take_real(Images(REAL), Sets(SIDE, 61, 53, True, "a"), {}, "k", small_autoencoder())
        return found

    def report(of: Evaluator, images: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
        found = of.measure(Images(images, CAPTIONS), "set", {}).values
        samples = {name: tensor for measure in of.suite for name, tensor in measure.samples().items()}
        return {name: value.value for name, value in found.items()}, samples

    used = evaluator()
    other = report(used, photos(53, 3, 0.2))
    again = report(used, GENERATED)
    fresh = report(evaluator(), GENERATED)
    assert again[0] == pytest.approx(fresh[0], rel=1e-9)
    torch.testing.assert_close(again[1], fresh[1], rtol=0, atol=0)
    differ = {name for name in fresh[0] if abs(other[0][name] - fresh[0][name]) > 1e-6 * abs(fresh[0][name])}
    assert {name for name in fresh[0] if not name.startswith("reconstruction_")} - differ <= {
        f"{name}_{of}" for name in ("precision", "recall", "density", "coverage") for of in ("some", "all")
    }
    assert not any(name.startswith("reconstruction_") for name in differ)
    # New real images take the place of the old ones.
    used.take_real(Images(photos(50, 7)), Sets(SIDE, 50, 53, True), {}, "k")
    moved = report(used, GENERATED)[0]
    assert abs(moved["frechet_all"] / fresh[0]["frechet_all"] - 1) > 1e-3
    assert "reconstruction_psnr" not in moved


def test_the_report_says_what_it_is_of(tmp_path: Path) -> None:
    evaluator, _ = taken(None)
    report = evaluator.measure(Images(GENERATED), "my set", {"folder": "here"})
    assert report.name == "my set"
    assert report.images == {"folder": "here", "count": 53, "image_size": SIDE, "hash": hash_of(GENERATED)}
    assert report.reference == {"name": "photos", "count": 61, "hash": hash_of(REAL)}
    assert report.versions == versions()
    path = evaluator.write(report, tmp_path / "new" / "out")
    assert path == tmp_path / "new" / "out" / "report.json"
    assert str(Report.read(path)) == str(report)
    assert {file.name for file in path.parent.iterdir()} == {
        *("report.json", "report.md", "samples.safetensors", "reference_x.safetensors"),
        *("spectra.csv", "spectra.png"),
    }
    text = (path.parent / "report.md").read_text(encoding="utf-8")
    weights = features().extractor.provenance()["weights"]
    for said in (f"weights {weights}", "resize none", "antialias false", "generated 53", "real 61", hash_of(REAL)):
        assert said in text


def test_sets_that_cannot_be_measured_are_refused_before_an_image_is_read() -> None:
    suite = Suite([features(), WaveletMetrics()])
    evaluator = Evaluator(suite, torch.device("cpu"), ReferenceCache(None), progress=False)
    images = Images(REAL)
    with pytest.raises(ValueError, match="got 3 generated"):
        evaluator.take_real(images, Sets(SIDE, 61, 3), {}, "k")
    assert images.read == 0


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown(capsys: pytest.CaptureFixture[str], shown: bool) -> None:
    suite = Suite([SpectrumMetrics()])
    evaluator = Evaluator(suite, torch.device("cpu"), ReferenceCache(None), 16, progress=shown)
    evaluator.take_real(Images(REAL), Sets(SIDE, 61, 53), {})
    values(evaluator)
    said = capsys.readouterr().err
    for line in ("Hashing real images: 100%", "Real images: 100%", "61/61", "Generated images: 100%", "53/53"):
        assert (line in said) == shown


# Processes


def on_processes(data: dict[str, Any], count: int, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    torch.save(data, folder / "data.pt")
    script = Path(__file__).with_name("evaluator_ranks.py")
    ended_well(*(Script(script, rank, count, folder) for rank in range(count)))
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.mark.parametrize(
    ("processes", "real", "generated", "inception"),
    [
        (2, 61, 53, False),  # odd numbers
        pytest.param(3, 11, 2, False, marks=pytest.mark.slow),  # a process without generated images
        pytest.param(2, 7, 13, True, marks=pytest.mark.slow),  # the Inception Score and all else of FID's network
    ],
)
def test_processes_give_what_one_gives(
    tmp_path: Path, processes: int, real: int, generated: int, inception: bool
) -> None:
    (tmp_path / "one").mkdir()
    data = {
        "tower": save_tower_config(tmp_path / "tower"),
        "inception": inception,
        "real": REAL[:real],
        "generated": GENERATED[:generated],
        "captions": CAPTIONS[:generated],
        "cache": str(tmp_path / "cache"),
    }
    ranks = on_processes(data, processes, tmp_path / "several")
    one = evaluate(data | {"cache": None}, tmp_path / "one", 8)
    assert ("inception_score" in one["values"]) == inception
    for found in ranks:
        torch.testing.assert_close(found["values"], one["values"], rtol=1e-4, atol=1e-7, equal_nan=True)
        torch.testing.assert_close(found["samples"], one["samples"], rtol=1e-3, atol=1e-4)
        assert found["hashes"] == one["hashes"]
    assert sum(found["read"] for found in ranks) == real
    written, alone = (load_file(tmp_path / name / "report" / "samples.safetensors") for name in ("several", "one"))
    torch.testing.assert_close(written, alone, rtol=1e-3, atol=1e-4)
    # What several kept serves them and one.
    for found in (*(found["again"] for found in ranks), evaluate(data, tmp_path / "one", 8)):
        assert found["read"] == 0
        torch.testing.assert_close(found["values"], one["values"], rtol=1e-4, atol=1e-7, equal_nan=True)
