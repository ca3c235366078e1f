from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from reports import drawn, features, reference
from torch import Tensor

from lpl_lightning.evaluation.bootstrap import (
    FrechetToReference,
    Interval,
    LogPowerDifference,
    Mean,
    Statistic,
    interval,
    replicates,
)
from lpl_lightning.metrics.frechet import frechet_distance
from lpl_lightning.metrics.reference import ReferenceStatistics


def draws(count: int, resamples: int, seed: int = 0, stream: int = 0) -> np.ndarray[Any, Any]:
    """Which images each resample takes, (B, N)."""
    return np.random.default_rng([seed, stream]).integers(count, size=(resamples, count))


def whole(statistic: Statistic) -> float:
    """The value of the images as they are."""
    return float(statistic(torch.ones(1, statistic.count, dtype=torch.float64)))


def of(x: Tensor, given: ReferenceStatistics) -> float:
    x = x.double()
    return frechet_distance(given.mean, given.covariance, x.mean(0), x.T.cov()).item()


def test_a_mean_has_the_interval_of_its_standard_error() -> None:
    values = drawn(400, seed=1) * 3 + 7
    statistic = Mean(values, scale=100.0)
    found = interval(whole(statistic), replicates(statistic, 4000, seed=0), biased=False)
    mean, error = 100 * values.double().mean().item(), 100 * values.double().std(correction=0).item() / 20
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_a_mean_agrees_with_scipy() -> None:
    stats: Any = pytest.importorskip("scipy.stats")
    values = drawn(80, seed=2).exp()  # skewed: the ends are not alike
    theirs = stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    )
    found = interval(values.mean().item(), replicates(Mean(values), 20_000, seed=3), biased=False)
    assert found == pytest.approx(theirs.confidence_interval, abs=0.03 * (found.high - found.low))


def test_a_paired_difference_agrees_with_scipy() -> None:
    stats: Any = pytest.importorskip("scipy.stats")
    a = drawn(80, seed=2)
    b = a + 0.1 * drawn(80, seed=5) + 0.3
    theirs = stats.bootstrap(
        (a.numpy(), b.numpy()),
        lambda x, y, axis: y.mean(axis) - x.mean(axis),
        n_resamples=20_000,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    found = interval((b - a).mean().item(), replicates(Mean(b), 20_000, 0) - replicates(Mean(a), 20_000, 0), False)
    width = found.high - found.low
    assert found == pytest.approx(theirs.confidence_interval, abs=0.03 * width)
    unpaired = interval((b - a).mean().item(), replicates(Mean(b), 2000, 0, 1) - replicates(Mean(a), 2000, 0), False)
    assert unpaired.high - unpaired.low > 5 * width


@pytest.mark.parametrize(("count", "dim", "rank"), [(40, 6, 6), (9, 30, 30), (9, 30, 4), (25, 30, 4)])
def test_frechet_distances_are_those_of_the_rows_drawn(count: int, dim: int, rank: int) -> None:
    """Of more images than features and of fewer; of references of full and of low rank; far from 0."""
    factor = drawn(dim, rank, seed=1).double()
    given = ReferenceStatistics(drawn(dim, seed=2).double() + 1e3, factor @ factor.T, 99, {})
    x = drawn(count, dim, seed=3) + 1e3
    found = replicates(FrechetToReference(x, given), 25, seed=5, stream=2)
    expected = [of(x[rows], given) for rows in draws(count, 25, 5, 2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert whole(FrechetToReference(x, given)) == pytest.approx(of(x, given), rel=1e-7)


def test_frechet_distances_far_from_the_origin() -> None:
    """A mean of 1e7, whose square would leave 14 of 16 digits of a variance of 1 to rounding."""
    factor = drawn(8, 8, seed=1).double()
    given = ReferenceStatistics(drawn(8, seed=2).double() + 1e7, factor @ factor.T, 99, {})
    x = drawn(40, 8, seed=3).double() + 1e7
    found = replicates(FrechetToReference(x, given), 10, seed=5)
    expected = [of(x[rows], given) for rows in draws(40, 10, 5)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_frechet_distances_of_few_images_have_no_noise_of_rounding() -> None:
    """Eigenvalues that are 0 but for rounding have roots of 1e-8."""
    factor = drawn(30, 30, seed=1).double()
    given = ReferenceStatistics(drawn(30, seed=2).double(), factor @ factor.T, 99, {})
    x = drawn(9, 30, seed=3).double()
    found = replicates(FrechetToReference(x, given), 25, seed=5)
    expected = [of(x[rows], given) for rows in draws(9, 25, 5)]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


def test_spectra_are_those_of_the_rows_drawn() -> None:
    log_power, real = drawn(30, 9, seed=1), drawn(9, seed=2)
    found = replicates(LogPowerDifference(log_power, real), 25, seed=1)
    expected = [
        sum(abs(float(log_power[rows, b].double().mean() - real[b])) for b in range(1, 9)) / 8
        for rows in draws(30, 25, 1)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_equal_streams_give_equal_draws() -> None:
    one = replicates(Mean(torch.arange(50.0)), 30, seed=1)
    assert torch.equal(one, replicates(Mean(torch.arange(50.0)), 30, seed=1))
    # Fewer draws are the first of more, whatever is held in memory at once.
    assert torch.equal(one[:7], replicates(Mean(torch.arange(50.0)), 7, seed=1))
    assert not torch.equal(one, replicates(Mean(torch.arange(50.0)), 30, seed=2))
    assert not torch.equal(one, replicates(Mean(torch.arange(50.0)), 30, seed=1, stream=1))


def test_progress_is_told() -> None:
    seen: list[int] = []
    replicates(Mean(torch.arange(5.0)), 45, seed=0, advance=seen.append)
    assert sum(seen) == 45
    assert len(seen) > 1


def test_the_interval_is_shifted_by_the_bias() -> None:
    """Replicates that lie wholly above the value, as those of Frechet distances do: only their spread counts."""
    replicated = torch.linspace(10, 12, 1001, dtype=torch.float64)
    assert interval(5.0, replicated, biased=True) == pytest.approx((5 - 0.95, 5 + 0.95))
    assert interval(5.0, replicated, biased=True, level=0.5) == pytest.approx((4.5, 5.5))
    assert interval(5.0, replicated, biased=False) == pytest.approx((10.05, 11.95))


def test_one_image_of_many_makes_no_clear_difference() -> None:
    """Draws without that image give exactly 0, which the noise of finitely many draws must not push out."""
    better = torch.zeros(200)
    better[3] = 1
    assert all(0 in interval(1 / 200, replicates(Mean(better), 300, seed), biased=False) for seed in range(20))


def test_what_lies_in_an_interval() -> None:
    assert 0 in Interval(-1, 1)
    assert 0 in Interval(0, 1)
    assert 0 not in Interval(0.1, 1)
    assert 0 not in Interval(-1, -0.1)
    assert 0 not in Interval(math.nan, math.nan)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="`resamples` must be 1 or more, got 0"):
        replicates(Mean(torch.arange(5.0)), 0, seed=0)
    with pytest.raises(ValueError, match="`seed` must be 0 or more, got -1"):
        replicates(Mean(torch.arange(5.0)), 1, seed=-1)
    with pytest.raises(ValueError, match="`level` must be in"):
        interval(0.0, torch.zeros(3), False, level=1.0)


def test_intervals_of_frechet_distances_cover_those_of_other_sets() -> None:
    """In most of many experiments the interval holds the mean of what sets of that size give.

    Of the unshifted percentile interval, which the repeats of a resample put too high, the same is not true.
    """
    given, count = reference(), 60
    mean = sum(of(features(0.3, count, seed), given) for seed in range(1000, 1400)) / 400
    held, unshifted = 0, 0
    for seed in range(100, 160):
        statistic = FrechetToReference(features(0.3, count, seed), given)
        found = replicates(statistic, 150, seed)
        held += mean in interval(whole(statistic), found, biased=True)
        unshifted += mean in Interval(*found.quantile(found.new_tensor([0.025, 0.975])).tolist())
    assert 50 <= held <= 60
    assert unshifted < held
