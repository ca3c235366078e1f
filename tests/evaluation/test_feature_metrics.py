from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluator_ranks import Projection, photos
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.image import (
    FrechetInceptionDistance,
    InceptionScore,
    KernelInceptionDistance,
    MemorizationInformedFrechetInceptionDistance,
)

from lpl_lightning.evaluation.comparison_runs import read_runs
from lpl_lightning.evaluation.differences import differences
from lpl_lightning.evaluation.feature_metrics import SEED, FeatureMetrics
from lpl_lightning.evaluation.measure import Sets
from lpl_lightning.evaluation.report import Report, Value
from lpl_lightning.evaluation.suite import Suite
from lpl_lightning.metrics.classifier_features import InceptionFeatures
from lpl_lightning.metrics.features import FeatureExtractor, ModuleFeatures
from lpl_lightning.metrics.memorization import nearest_cosine_distance
from lpl_lightning.metrics.prdc import Overlap, prdc
from lpl_lightning.metrics.reference import ReferenceStatistics

REAL, GENERATED = photos(61, 1), photos(45, 2, 0.6)


def of(extractor: FeatureExtractor | None = None, **overrides: Any) -> FeatureMetrics:
    given: dict[str, Any] = {"name": "x", "kernel": False, "neighbours": None}
    return FeatureMetrics(extractor or ModuleFeatures(Projection()), **(given | overrides))


def feed(measure: FeatureMetrics, images: Tensor, role: Any, batch_size: int = 16, shuffled: bool = False) -> None:
    """Give all images in batches, in any order."""
    order = torch.randperm(len(images)) if shuffled else torch.arange(len(images))
    for index in order.split(batch_size):
        measure.update(images[index], role, index)


def values(
    measure: FeatureMetrics,
    real: Tensor = REAL,
    generated: Tensor = GENERATED,
    reconstructed: Tensor | None = None,
    **how: Any,
) -> dict[str, Value]:
    sets = Sets(real.shape[-1], len(real), len(generated), autoencoder=None if reconstructed is None else "a")
    measure.begin(sets, torch.device("cpu"))
    feed(measure, real, "real", **how)
    if reconstructed is not None:
        feed(measure, reconstructed, "reconstructed", **how)
    measure.put_real_state(measure.real_state())
    measure.begin_generated()
    feed(measure, generated, "generated", **how)
    return measure.compute()


def by_scipy(a: Tensor, b: Tensor) -> float:
    """The formula of Heusel et al., on features."""
    linalg: Any = pytest.importorskip("scipy.linalg")
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = float(np.trace(linalg.sqrtm(cov_x @ cov_y)).real)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y)) - 2 * root


class OfBytes(nn.Module):
    """An extractor as torchmetrics wants one."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.extractor = extractor
        self.num_features: Any = extractor.dim

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.extractor(images.float() / 127.5 - 1)
        return found


def eight_bits(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().to(torch.uint8)


def theirs(metric: Any, real: Tensor = REAL, generated: Tensor = GENERATED) -> Any:
    """What torchmetrics makes of the images."""
    metric.update(eight_bits(real), real=True)
    metric.update(eight_bits(generated), real=False)
    torch.manual_seed(SEED)
    return metric.compute()


def test_the_frechet_distance_is_torchmetrics_and_the_formulas() -> None:
    extractor = ModuleFeatures(Projection())
    found = values(of(extractor))
    assert list(found) == ["frechet_x"]
    value = found["frechet_x"].value
    expected = theirs(FrechetInceptionDistance(feature=OfBytes(extractor), input_img_size=(3, 16, 16)))
    assert value == pytest.approx(float(expected), rel=1e-4)
    assert value == pytest.approx(by_scipy(extractor(REAL), extractor(GENERATED)), rel=1e-6)
    assert found["frechet_x"].better == "lower"
    assert found["frechet_x"].provenance == extractor.provenance() | {"generated": 45, "real": 61}


def test_the_kernel_distance_is_torchmetrics_and_a_naive_one() -> None:
    extractor = ModuleFeatures(Projection())
    found = values(of(extractor, kernel=True, kernel_subset=20))["kernel_x"]
    with pytest.warns(UserWarning, match="will save all extracted features"):
        metric = KernelInceptionDistance(feature=OfBytes(extractor), subset_size=20)
    mean, std = theirs(metric)
    assert found.value == pytest.approx(float(mean), rel=1e-4)
    assert found.std == pytest.approx(float(std), rel=1e-3)
    said = {"generated": 45, "real": 61, "subsets": 100, "subset_size": 20, "seed": SEED}
    assert found.provenance == extractor.provenance() | said
    # With all images in every draw it is one estimate, unbiased.
    all_images = values(of(extractor, kernel=True), generated=photos(61, 2, 0.6))["kernel_x"]
    x, y = extractor(REAL).double().tolist(), extractor(photos(61, 2, 0.6)).double().tolist()

    def kernel(a: list[float], b: list[float]) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3)

    n = 61
    same = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    cross = sum(kernel(a, b) for a in x for b in y) / n**2
    assert all_images.value == pytest.approx(same - 2 * cross, rel=1e-9)
    # Draws that are all the same have no spread.
    assert all_images.std is None
    assert all_images.provenance["subsets"] == 1
    assert all_images.provenance["subset_size"] == 61
    fewer = values(of(extractor, kernel=True))["kernel_x"]
    assert fewer.provenance["subset_size"] == 45
    fewer = values(of(extractor, kernel=True), real=REAL[:20])["kernel_x"]
    assert fewer.provenance["subset_size"] == 20
    assert math.isfinite(fewer.value)


def test_the_memorization_distance_is_the_formulas_and_torchmetrics_of_exchanged_sets() -> None:
    extractor = ModuleFeatures(Projection())
    found = values(of(extractor, memorization=True))["memorization_x"]
    metric = MemorizationInformedFrechetInceptionDistance(feature=OfBytes(extractor))
    assert found.value == pytest.approx(float(theirs(metric, GENERATED, REAL)), rel=1e-4)
    x, y = (nn.functional.normalize(extractor(images).double()) for images in (REAL, GENERATED))
    # Bai et al., 2021, eq. 2 and 3: of each generated image to the nearest real one, and a mean above 0.1 counts as 1.
    distance = float((1 - (y @ x.T).abs()).min(dim=1).values.mean())
    frechet = by_scipy(extractor(REAL), extractor(GENERATED))
    assert found.value == pytest.approx(frechet / (distance if distance < 0.1 else 1.0), rel=1e-4)
    assert found.provenance == extractor.provenance() | {"generated": 45, "real": 61}


def test_the_nearest_is_found_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(7, 3), torch.randn(5, 3)
    cosines = nn.functional.cosine_similarity(x[:, None].double(), y[None].double(), dim=-1)
    monkeypatch.setattr("lpl_lightning.metrics.memorization.PAIRS", 11)  # two rows of five
    torch.testing.assert_close(nearest_cosine_distance(x, y), (1 - cosines.abs()).min(dim=1).values.mean())


def test_copies_of_a_few_real_images_are_memorized() -> None:
    """Whatever the other real images are: the nearest of each copy is no distance away."""
    measure = of(ModuleFeatures(Projection()), memorization=True)
    copies = values(measure, generated=REAL[:6].repeat(8, 1, 1, 1))
    assert copies["memorization_x"].value > 1e3 * copies["frechet_x"].value


def test_precision_and_its_kin_are_those_of_a_naive_loop() -> None:
    extractor = ModuleFeatures(Projection())
    measure = of(extractor, neighbours=3)
    found = values(measure)
    x, y = extractor(REAL).double(), extractor(GENERATED).double()

    def balls(points: Tensor) -> list[float]:
        return [sorted(float((p - q).norm()) for q in points)[3] for p in points]

    of_x, of_y = balls(x), balls(y)
    distance = torch.cdist(x, y)
    holding = [sum(float(distance[i, j]) < of_x[i] for i in range(61)) for j in range(45)]
    covered = [any(float(distance[i, j]) < of_x[i] for j in range(45)) for i in range(61)]
    recalled = [any(float(distance[i, j]) < of_y[j] for j in range(45)) for i in range(61)]
    assert 0 < sum(recalled) < 61
    assert found["precision_x"].value == pytest.approx(sum(held > 0 for held in holding) / 45)
    assert found["recall_x"].value == pytest.approx(sum(recalled) / 61)
    assert found["density_x"].value == pytest.approx(sum(holding) / (3 * 45))
    assert found["coverage_x"].value == pytest.approx(sum(covered) / 61)
    expected = prdc(x, y, 3)._asdict()
    assert {name: found[f"{name}_x"].value for name in expected} == pytest.approx(expected)
    assert all(found[f"{name}_x"].better == "higher" for name in expected)
    assert found["recall_x"].provenance == extractor.provenance() | {"generated": 45, "real": 61, "k": 3}
    samples = measure.samples()
    assert samples["precision_x"].tolist() == [float(held > 0) for held in holding]
    assert samples["recall_x"].tolist() == [float(said) for said in recalled]
    assert samples["density_x"].tolist() == [float(held) for held in holding]
    assert samples["coverage_x"].tolist() == [float(said) for said in covered]


def test_the_distance_of_reconstructions() -> None:
    extractor = ModuleFeatures(Projection())
    again = (REAL * 0.8).clamp(-1, 1)
    found = values(of(extractor), reconstructed=again)
    value = found["reconstruction_frechet_x"]
    assert value.value == pytest.approx(by_scipy(extractor(REAL), extractor(again)), rel=1e-6)
    assert value.provenance == extractor.provenance() | {"reconstructed": 61, "real": 61}
    assert value.resampling is None
    assert found["frechet_x"].value == pytest.approx(by_scipy(extractor(REAL), extractor(GENERATED)), rel=1e-6)


def test_equal_sets_have_no_distance() -> None:
    found = values(of(kernel=True, neighbours=3), generated=REAL)
    assert found["frechet_x"].value < 1e-9
    assert [found[f"{name}_x"].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert found["density_x"].value == pytest.approx(1)
    assert found["kernel_x"].value < 0  # unbiased: a pair of an image and itself counts across the sets alone


def test_batches_and_their_order_change_nothing() -> None:
    def found(**how: Any) -> dict[str, tuple[float, float]]:
        measure = of(kernel=True, kernel_subset=9, neighbours=2, memorization=True, max_images=20)
        return {name: (value.value, value.std or 0.0) for name, value in values(measure, **how).items()}

    whole = found(batch_size=100)
    assert len(whole) == 7
    for how in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 7, "shuffled": True}):
        for name, value in found(**how).items():
            assert value == pytest.approx(whole[name], rel=1e-4), name


def test_pairs_are_of_some_images_drawn_by_a_seed() -> None:
    """Of the first ones the first classes alone would be seen, where images lie by class."""
    extractor = ModuleFeatures(Projection())
    measure = of(extractor, kernel=True, neighbours=2, max_images=20)
    found = values(measure)
    rows = measure.real_state()["rows"]
    drawn = [int((extractor(REAL) - row).abs().sum(1).argmin()) for row in rows]
    assert len(set(drawn)) == 20
    assert drawn == sorted(drawn)
    assert max(drawn) > 40
    torch.testing.assert_close(rows, extractor(REAL)[drawn])
    values(measure)
    assert torch.equal(measure.real_state()["rows"], rows)
    for name in ("precision_x", "recall_x", "kernel_x"):
        assert (found[name].provenance["real"], found[name].provenance["generated"]) == (20, 20)
    # The Frechet distance is of all.
    assert found["frechet_x"].value == pytest.approx(by_scipy(extractor(REAL), extractor(GENERATED)), rel=1e-6)
    assert (found["frechet_x"].provenance["real"], found["frechet_x"].provenance["generated"]) == (61, 45)
    assert all(value.resampling is None for value in found.values())
    assert measure.samples() == {}
    # Where the real set alone has more, what is of the generated one can be resampled.
    found = values(of(extractor, neighbours=2, max_images=50))
    kinds = {name: value.resampling and (value.resampling.kind, value.resampling.of) for name, value in found.items()}
    assert kinds == {
        "frechet_x": ("frechet", "generated"),
        "precision_x": ("mean", "generated"),
        "density_x": ("mean", "generated"),
        "recall_x": None,
        "coverage_x": None,
    }


def test_recall_and_coverage_are_not_resampled(tmp_path: Path) -> None:
    """Neither way of drawing images anew tells how far they go with other generated images."""
    measure = of(neighbours=3)
    found = values(measure)
    assert {name for name, value in found.items() if value.resampling is None} == {"recall_x", "coverage_x"}
    (note,) = measure.write(tmp_path)
    assert note.startswith("recall_x, coverage_x: no intervals, since")
    values(measure := of())
    assert measure.write(tmp_path) == []


def test_values_say_what_counts_they_are_biased_by() -> None:
    """The counts that move a value's expectation, given the other set."""
    found = values(of(neighbours=3, kernel=True, memorization=True), reconstructed=REAL * 0.8)
    assert {name: set(value.biased_by) for name, value in found.items()} == {
        "frechet_x": {"generated", "real"},
        "reconstruction_frechet_x": {"reconstructed", "real"},
        "kernel_x": set(),
        "memorization_x": {"generated", "real"},
        "precision_x": {"real"},
        "density_x": {"real"},
        "recall_x": {"generated"},
        "coverage_x": {"generated", "real"},
    }
    for value in found.values():
        assert set(value.biased_by) <= set(value.provenance)


def test_what_the_number_of_generated_images_moves() -> None:
    """Means over many sets of one distribution, small ones and larger ones, with the real images held fixed."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(100, 6, generator=generator)
    means = []
    for count in (20, 160):
        sets = [0.5 * torch.randn(count, 6, generator=generator) for _ in range(3200 // count)]
        means.append(np.mean([prdc(real, one, 3) for one in sets], axis=0))
    few, many = (dict(zip(Overlap._fields, mean, strict=True)) for mean in means)
    assert few["precision"] == pytest.approx(many["precision"], abs=0.02)
    assert few["density"] == pytest.approx(many["density"], rel=0.05)
    assert many["coverage"] > few["coverage"] + 0.2


@pytest.mark.slow
def test_sets_of_one_distribution_seldom_differ_clearly(tmp_path: Path) -> None:
    """Of 95 % intervals, those of about one in twenty differences leave 0 out; here with other generated images."""
    measure, sets, trials = of(neighbours=3), Sets(16, 60, 60), 60
    suite, clear = Suite([measure]), Counter[str]()
    real = photos(60, 1, 0.8)
    for trial in range(trials):
        for name in ("one", "other"):
            generated = photos(60, 100 + 2 * trial + (name == "one"), 0.7)
            values(measure, real, generated)
            folder = tmp_path / name
            Report(name, measure.compute(), reference={"hash": "a"}).write(folder)
            suite.write(folder, sets)
        runs = read_runs([str(tmp_path / name) for name in ("one", "other")])
        for name, row in differences(runs, resamples=100, seed=trial).rows.items():
            clear[name] += row.cells["other"].verdict is not None
    assert max(clear.values()) <= 0.1 * trials, clear
    assert clear["precision_x"] + clear["density_x"] > 0


def test_values_can_be_computed_anew_of_what_is_written(tmp_path: Path) -> None:
    measure = of(neighbours=3, kernel=True)
    found = values(measure)
    assert len(measure.write(tmp_path)) == 1
    samples = measure.samples()
    reference = ReferenceStatistics.load(tmp_path / "reference_x.safetensors")
    assert reference.count == 61
    reference.check(measure.extractor.provenance())
    resampled = {name: value.resampling for name, value in found.items() if value.resampling is not None}
    assert set(resampled) == {f"{name}_x" for name in ("frechet", "precision", "density")}
    for name, how in resampled.items():
        assert len(samples[how.key]) == 45
        assert how.of == "generated"
        if how.kind == "mean":
            assert how.scale * float(samples[how.key].double().mean()) == pytest.approx(found[name].value, rel=1e-12)
    assert resampled["frechet_x"].key == measure.label == "features_x"
    features, cov = samples["features_x"].double().numpy(), reference.covariance.numpy()
    linalg: Any = pytest.importorskip("scipy.linalg")
    own = np.cov(features.T)
    mean = ((features.mean(0) - reference.mean.numpy()) ** 2).sum()
    root = np.trace(linalg.sqrtm(own @ cov)).real
    assert mean + np.trace(own) + np.trace(cov) - 2 * root == pytest.approx(found["frechet_x"].value, rel=1e-9)


def test_the_random_numbers_of_a_run_go_on_as_they_were() -> None:
    measure = of(kernel=True)
    values(measure)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    measure.compute()
    assert torch.equal(torch.get_rng_state(), before)
    # And values do not depend on them.
    first = measure.compute()["kernel_x"].value
    torch.manual_seed(6)
    assert measure.compute()["kernel_x"].value == first


# FID's Inception


@pytest.fixture(scope="module")
def inception() -> InceptionFeatures:
    pytest.importorskip("torch_fidelity", reason="torch-fidelity, of the `eval` extra, is not installed")
    torch.manual_seed(0)
    return InceptionFeatures("random:")


@pytest.mark.slow
def test_inception_has_the_names_that_papers_use(inception: InceptionFeatures, tmp_path: Path) -> None:
    real, generated = REAL[:3], GENERATED[:12]
    measure = FeatureMetrics(inception, neighbours=1, allow_few=True)
    assert (measure.name, measure.label) == ("inception", "features_inception")
    found = values(measure, real, generated)
    overlap = [f"{name}_inception" for name in ("precision", "recall", "density", "coverage")]
    assert list(found) == ["fid", "inception_score", "kid", *overlap]
    assert found["fid"].provenance["antialias"] is False
    # The root of C1 C2 has the singular values of X Y^T, the features centred: there are few of them here.
    features = inception(generated)
    x, y = inception(real).double(), features.double()
    mean, x, y = (x.mean(0) - y.mean(0)).square().sum(), x - x.mean(0), y - y.mean(0)
    root = torch.linalg.svdvals(x @ y.T).sum() / (2 * 11) ** 0.5
    expected = float(mean + x.square().sum() / 2 + y.square().sum() / 11 - 2 * root)
    assert found["fid"].value == pytest.approx(expected, rel=1e-6)
    # The Inception Score, as torchmetrics has it of the network with another output.
    weights = tmp_path / "inception.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in inception.model.state_dict().items()}, weights)
    other = InceptionFeatures(str(weights), layer="logits_unbiased")
    logits = other(generated)
    torch.testing.assert_close(inception.logits(features), logits, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="will save all extracted features"):
        metric = InceptionScore(feature=OfBytes(other))
    metric.update(eight_bits(generated))
    torch.manual_seed(SEED)
    mean, std = metric.compute()
    score = found["inception_score"]
    assert score.value == pytest.approx(float(mean), rel=1e-5)
    assert score.std == pytest.approx(float(std), rel=1e-2)
    assert score.better == "higher"
    assert score.provenance == inception.provenance() | {"generated": 12, "splits": 10, "seed": SEED}
    assert score.biased_by == ("generated",)
    # And by Salimans et al., 2016: exp of the mean divergence of p(y|x) from p(y), by parts in the order drawn.
    torch.manual_seed(SEED)
    scores = []
    for part in logits[torch.randperm(12)].double().split(2):
        p = part.softmax(1)
        scores.append(float((p * (p / p.mean(0)).log()).sum(1).mean().exp()))
    assert score.value == pytest.approx(float(np.mean(scores)), rel=1e-5)
    assert (measure.write(tmp_path)[0]).startswith("inception: there are fewer images than the 2048 features")


@pytest.mark.slow
def test_inception_has_them_all(inception: InceptionFeatures) -> None:
    measure = FeatureMetrics(inception, neighbours=None, kernel=False, memorization=True, allow_few=True)
    found = values(measure, REAL[:4], GENERATED[:4], reconstructed=REAL[:4] * 0.5)
    assert list(found) == ["fid", "rfid", "inception_score", "mifid"]


@pytest.mark.slow
def test_inceptions_of_two_kinds_stand_side_by_side(inception: InceptionFeatures) -> None:
    measure = FeatureMetrics(inception, "smooth", None, kernel=False, allow_few=True)
    found = values(measure, REAL[:2], GENERATED[:2])
    assert set(found) == {"fid_smooth", "inception_score_smooth"}
    assert measure.label == "features_smooth"
    assert measure.real_state()["rows"].shape == (0, 2048)  # which no score of generated images needs


def test_other_layers_of_inception_give_no_fid() -> None:
    pytest.importorskip("torch_fidelity")
    measure = FeatureMetrics(InceptionFeatures("random:", layer="64"), neighbours=None, kernel=False)
    assert measure.name == "inception_v3_compat_64"
    assert FeatureMetrics(ModuleFeatures(Projection())).name == "Projection"


# What is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "a b"}, "`name` must be of letters, digits and underscores, got 'a b'"),
        ({"name": ""}, "`name` must be"),
        ({"neighbours": 0}, "`neighbours` must be 1 or more, got 0"),
        ({"kernel_subset": 1}, "`kernel_subset` must be 2 or more"),
        ({"max_images": 1}, "`max_images` must be 2 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        of(**settings)


def test_too_few_images_are_refused_before_any_come() -> None:
    measure = of(neighbours=5)
    measure.check(Sets(16, 6, 6))
    for real, generated, kind in ((5, 6, "real"), (6, 5, "generated")):
        with pytest.raises(ValueError, match=f"x: a covariance of 6 features needs 6 images or more, got 5 {kind}.*"):
            measure.check(Sets(16, real, generated))
    measure = of(neighbours=5, allow_few=True)
    measure.check(Sets(16, 6, 6))
    with pytest.raises(ValueError, match="balls to the neighbour 5 need 6 images or more, got 5 generated"):
        measure.check(Sets(16, 6, 5))
    with pytest.raises(ValueError, match="balls to the neighbour 5 need 6 images or more, got 4 real"):
        of(neighbours=5, max_images=4).check(Sets(16, 60, 60))
    with pytest.raises(ValueError, match="needs 2 images or more, got 1 real ones. Give more images.$"):
        of(allow_few=True).check(Sets(16, 1, 2))
    with pytest.raises(ValueError, match="needs 6 images"):
        of().begin(Sets(16, 2, 2), torch.device("cpu"))


def test_networks_of_nan_are_refused_at_the_first_batch() -> None:
    network = Projection()
    network.bias.data[2] = torch.nan
    with pytest.raises(ValueError, match="`features` of 16 of 16 images are not finite"):
        values(of(ModuleFeatures(network)))


# Statistics from elsewhere


def saved(tmp_path: Path, extractor: FeatureExtractor) -> dict[str, dict[str, Any]]:
    """Statistics of the real images in both formats, computed by numpy."""
    features = extractor(REAL).double().numpy()
    mean, cov = features.mean(0), np.cov(features.T)
    np.savez(tmp_path / "real.npz", mu=mean, sigma=cov)
    own = ReferenceStatistics(torch.from_numpy(mean), torch.from_numpy(cov), 61, extractor.provenance())
    own.save(tmp_path / "real.safetensors")
    npz = {"statistics": str(tmp_path / "real.npz"), "statistics_count": 61}
    return {"safetensors": {"statistics": str(tmp_path / "real.safetensors")}, "npz": npz}


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_statistics_stand_in_for_real_images(tmp_path: Path, kind: str) -> None:
    extractor = ModuleFeatures(Projection())
    expected = values(of(extractor), reconstructed=REAL * 0.8)
    measure = of(extractor, **saved(tmp_path, extractor)[kind], neighbours=2)
    other = photos(30, 9, 0.2)
    found = values(measure, real=other, reconstructed=REAL[:30] * 0.8)
    assert found["frechet_x"].value == pytest.approx(expected["frechet_x"].value, rel=1e-9)
    again = by_scipy(extractor(REAL), extractor(REAL[:30] * 0.8))
    assert found["reconstruction_frechet_x"].value == pytest.approx(again, rel=1e-6)
    said = found["frechet_x"].provenance
    assert (said["real"], said["generated"]) == (61, 45)
    assert found["recall_x"].provenance["real"] == 30  # which statistics say nothing of
    measure.write(tmp_path)
    written = ReferenceStatistics.load(tmp_path / "reference_x.safetensors")
    assert (written.hash, written.count) == (said["statistics"], 61)
    torch.testing.assert_close(written.mean, extractor(REAL).double().mean(0), rtol=1e-9, atol=0)


def test_statistics_spare_real_images(tmp_path: Path) -> None:
    extractor = ModuleFeatures(Projection())
    measure = of(extractor, **saved(tmp_path, extractor)["npz"])
    found = values(measure, real=REAL[:1])
    assert found["frechet_x"].value == pytest.approx(values(of(extractor))["frechet_x"].value, rel=1e-9)
    assert measure.write(tmp_path) == []
    with pytest.raises(ValueError, match="needs 6 images or more, got 1 real"):
        measure.check(Sets(16, 1, 45, autoencoder="a"))


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    extractor = ModuleFeatures(Projection())
    files = saved(tmp_path, extractor)
    for other in (ModuleFeatures(Projection(seed=1)), ModuleFeatures(Projection(), size=8)):
        with pytest.raises(ValueError, match="made with another extractor"):
            of(other, **files["safetensors"])
    with pytest.raises(ValueError, match="of D = 7, the features of `extractor`"):
        of(ModuleFeatures(Projection(7)), **files["npz"])
    with pytest.raises(ValueError, match=r"`statistics_count` must say how many images .*real\.npz is of"):
        of(extractor, statistics=files["npz"]["statistics"])
    few = files["npz"] | {"statistics_count": 5}
    with pytest.raises(ValueError, match=r"`statistics`: .*real\.npz is of 5 images, fewer than the 6 features"):
        of(extractor, **few)
    of(extractor, **few, allow_few=True)
    with pytest.raises(FileNotFoundError, match="nothing"):
        of(extractor, statistics=str(tmp_path / "nothing.safetensors"))
