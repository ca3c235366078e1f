from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Script, ended_well
from metric_ranks import measure
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from towers import save_tower

from lpl_lightning.metrics.frechet import FrechetDistance, frechet_distance
from lpl_lightning.metrics.reference import ReferenceStatistics


def covariance(dim: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(dim, rank or 2 * dim, dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


def by_scipy(m1: Tensor, c1: Tensor, m2: Tensor, c2: Tensor) -> float:
    linalg: Any = pytest.importorskip("scipy.linalg")
    root = float(np.trace(linalg.sqrtm((c1 @ c2).numpy())).real)
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * root


def test_one_dimension_has_a_closed_form() -> None:
    for m1, s1, m2, s2 in [(0.0, 1.0, 0.0, 1.0), (1.0, 2.0, -2.0, 0.5), (3.0, 0.0, 1.0, 4.0)]:
        found = frechet_distance(
            torch.tensor([m1]), torch.tensor([[s1**2]]), torch.tensor([m2]), torch.tensor([[s2**2]])
        )
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2, abs=1e-12)


def test_covariances_that_commute_have_a_closed_form() -> None:
    basis = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    l1, l2 = torch.rand(2, 20, dtype=torch.float64) * 5
    mean = torch.randn(2, 20, dtype=torch.float64)
    found = frechet_distance(mean[0], basis * l1 @ basis.T, mean[1], basis * l2 @ basis.T)
    expected = (mean[0] - mean[1]).square().sum() + (l1.sqrt() - l2.sqrt()).square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dim", [2, 17, 64])
def test_equal_to_the_matrix_square_root(dim: int) -> None:
    m1, m2, c1, c2 = *torch.randn(2, dim, dtype=torch.float64), covariance(dim), covariance(dim)
    found = frechet_distance(m1, c1, m2, c2)
    assert found.item() == pytest.approx(by_scipy(m1, c1, m2, c2), rel=1e-9)
    torch.testing.assert_close(frechet_distance(m2, c2, m1, c1), found, rtol=1e-10, atol=0)


def test_covariances_of_low_rank() -> None:
    """A rank below the dimension, as with few images, where the product's own square root is badly determined."""
    dim, m = 200, torch.zeros(200, dtype=torch.float64)
    c = covariance(dim, rank=9)
    assert frechet_distance(m, c, m, c).item() < 1e-10 * c.trace()
    # Of B C B^T and C, with C on a subspace that B maps to itself, the distance is that on the subspace.
    basis = torch.linalg.qr(torch.randn(dim, 9, dtype=torch.float64)).Q
    small, other = covariance(9), covariance(9)
    found = frechet_distance(m, basis @ small @ basis.T, m, basis @ other @ basis.T)
    assert found.item() == pytest.approx(by_scipy(m[:9], small, m[:9], other), rel=1e-9)
    # Subspaces at right angles: nothing is shared.
    basis = torch.linalg.qr(torch.randn(dim, 18, dtype=torch.float64)).Q
    parts = basis[:, :9] @ small @ basis[:, :9].T, basis[:, 9:] @ other @ basis[:, 9:].T
    torch.testing.assert_close(
        frechet_distance(m, parts[0], m, parts[1]), small.trace() + other.trace(), rtol=1e-10, atol=0
    )
    zero = torch.zeros(dim, dim, dtype=torch.float64)
    torch.testing.assert_close(frechet_distance(m, zero, m, c), c.trace())
    assert frechet_distance(m, zero, m, zero) == 0


def test_no_distance_is_below_zero() -> None:
    """Rounding leaves some of those between equal Gaussians a little below 0, of which no root can be taken."""
    for dim in range(1, 41):
        mean, c = torch.randn(dim, dtype=torch.float64), covariance(dim)
        assert 0 <= frechet_distance(mean, c, mean, c).item() < 1e-12 * dim


def test_a_covariance_that_rounding_made_unsymmetric() -> None:
    """As sums of products in another order do. Both halves count, where eigh would read the lower one alone."""
    dim, mean = 6, torch.zeros(6, dtype=torch.float64)
    c, other = covariance(dim), covariance(dim)
    skew = 1e-3 * torch.randn(dim, dim, dtype=torch.float64).triu(1)
    expected = by_scipy(mean, c, mean, other)
    assert frechet_distance(mean, c + skew - skew.T, mean, other).item() == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean, c, mean, other + skew - skew.T).item() == pytest.approx(expected, rel=1e-9)


def test_what_is_no_gaussian_is_refused() -> None:
    m, c = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"`cov2` must be \(3, 3\), finite.*got the shape \(2, 2\)"):
        frechet_distance(m, c, m, torch.eye(2))
    with pytest.raises(ValueError, match="`mean2` must be .*not finite"):
        frechet_distance(m, c, m * torch.nan, c)


def pair(real: int = 300, generated: int = 200, dim: int = 16) -> tuple[Tensor, Tensor]:
    mixing = torch.randn(dim, dim)
    return torch.randn(real, dim).relu() @ mixing, torch.randn(generated, dim) @ mixing * 0.8 + 0.3


def metric(real: Tensor, generated: Tensor, batch_size: int = 50, **settings: Any) -> FrechetDistance:
    found = FrechetDistance(real.shape[1], **settings)
    for side, features in ((True, real), (False, generated)):
        for batch in features.split(batch_size):
            found.update(batch, real=side)
    return found


class Given(nn.Module):
    """Features that are given as images."""

    num_features = 16

    def forward(self, features: Tensor) -> Tensor:
        return features


def test_equal_to_torchmetrics() -> None:
    real, generated = pair()
    theirs = FrechetInceptionDistance(feature=Given())
    theirs.update(real.double(), real=True)
    theirs.update(generated.double(), real=False)
    torch.testing.assert_close(metric(real, generated).compute(), theirs.compute(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("batch_size", [1, 13, 300])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    real, generated = pair()
    found = metric(real, generated, batch_size).compute()
    torch.testing.assert_close(found, metric(real, generated, 64).compute(), rtol=1e-10, atol=0)


def test_fewer_images_than_features_are_refused_unless_allowed() -> None:
    real, generated = pair(40, 15)
    with pytest.raises(ValueError, match="`generated`: a covariance of 16 features needs 16 images or more, got 15"):
        metric(real, generated).compute()
    with pytest.raises(ValueError, match="`real`: .* got 15.*`allow_few`"):
        metric(generated, real).compute()
    found = metric(real, generated, allow_few=True).compute()
    expected = by_scipy(
        real.double().mean(0), real.double().T.cov(), generated.double().mean(0), generated.double().T.cov()
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)  # of the two, scipy's is the less exact here
    metric(real, pair(2, 16)[1]).compute()
    with pytest.raises(ValueError, match="needs 2 images or more, got 1"):
        metric(real, generated[:1], allow_few=True).compute()


def test_a_reference_stands_in_for_real_images() -> None:
    real, generated = pair()
    says: dict[str, str | int | bool] = {"class": "Given", "weights": "0"}
    reference = ReferenceStatistics(real.double().mean(0), real.double().T.cov(), 300, says)
    found = FrechetDistance(16, reference, says)
    found.update(generated, real=False)
    torch.testing.assert_close(found.compute(), metric(real, generated).compute(), rtol=1e-10, atol=0)
    found.reset()
    found.update(generated, real=False)
    torch.testing.assert_close(found.compute(), metric(real, generated).compute(), rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="`real` must be False"):
        found.update(real, real=True)
    with pytest.raises(ValueError, match="another extractor .weights: 0 in the reference, 1 in use"):
        FrechetDistance(16, reference, says | {"weights": "1"})
    with pytest.raises(ValueError, match="`provenance` must be given with `reference`"):
        FrechetDistance(16, reference)
    with pytest.raises(ValueError, match="`reference` must be of `dim`=8 features, got 16"):
        FrechetDistance(8, reference, says)
    few = FrechetDistance(16, ReferenceStatistics(reference.mean, reference.covariance, 9, says), says)
    few.update(generated, real=False)
    with pytest.raises(ValueError, match="`reference`: .*needs 16 images or more, got 9"):
        few.compute()


def test_a_call_is_refused_and_loses_nothing() -> None:
    real, generated = pair()
    found = metric(real, generated)
    with pytest.raises(ValueError, match=r"`FrechetDistance` must be given batches by `update`, got a call"):
        found(generated, real=False)
    torch.testing.assert_close(found.compute(), metric(real, generated).compute(), rtol=0, atol=0)


def test_two_processes_are_equal_to_one(tmp_path: Path) -> None:
    """Two real processes, of which one has too few samples for a covariance of its own."""
    save_tower(tmp_path / "tower")
    real, generated = pair(40, 30, 8)
    captions = [f"{number} red circles" for number in range(10)]
    data = {"real": real + 1e3, "generated": generated + 1e3}
    data |= {"images": torch.rand(10, 3, 20, 20) * 2 - 1, "captions": captions}  # type: ignore[dict-item]
    torch.save(data, tmp_path / "data.pt")
    script = Path(__file__).with_name("metric_ranks.py")
    ended_well(*(Script(script, rank, tmp_path) for rank in (0, 1)))
    expected = measure(data, slice(None), tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["gaussian"], expected["gaussian"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found["distance"], expected["distance"], rtol=1e-10, atol=0)
        torch.testing.assert_close(found["score"], expected["score"], rtol=1e-5, atol=1e-6)
