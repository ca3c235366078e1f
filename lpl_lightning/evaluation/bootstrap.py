r"""Bootstrap intervals: how far a value would go with other images of the same kind.

Of N images N are drawn with replacement, and the value is computed anew; B such replicates :math:`v^*_b` stand in for
the values of other sets of N images (Efron & Tibshirani, 1993, "An Introduction to the Bootstrap", ch. 6 and 13). Of a
mean the interval is from the quantile 0.025 of the replicates to that of 0.975.

A resample repeats images and so holds about 63 % of them. To a mean that does nothing. A Frechet distance or a sum of
absolute differences, however, goes up with it, as with any set that knows fewer images, and the quantiles may lie
wholly above the value. They are shifted by the bootstrap's estimate of that bias (ch. 10), mean(v*) - v:

.. math::
    [v + q_{0.025}(v^*) - mean(v^*), \quad v + q_{0.975}(v^*) - mean(v^*)].

This is of the values that other sets of N images would give, whose own bias, by the finite N, stays in it.

Of Frechet distances it errs on the wide side, the more the fewer images there are for a feature. In simulations with
Gaussians it was 1.2 times as wide as the spread of the values of other sets with 33 images a feature, 1.6 times with 3,
and 3.5 times with 0.6.

A draw is written as how often each image is in it, weights (N,) that sum to N, so that nothing is copied. Two values of
which the same draws are taken are resampled as pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lpl_lightning.arguments import at_least
from lpl_lightning.metrics.reference import ReferenceStatistics

__all__ = ["FrechetToReference", "Interval", "LogPowerDifference", "Mean", "Statistic", "interval", "replicates"]

LEVEL = 0.95

_AT_ONCE = 20  # draws that are held in memory together


class Interval(NamedTuple):
    """From ``low`` to ``high``."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        """Whether a number lies in it, ends included; none lies in one of NaN."""
        return isinstance(value, int | float) and self.low <= value <= self.high


class Statistic(Protocol):
    """A number that a set of images has."""

    @property
    def count(self) -> int:
        """Number N of images."""

    def __call__(self, weights: Tensor) -> Tensor:
        """Compute it of B draws.

        Args:
            weights: (B, N) float64, how often each image is drawn; rows sum to N.

        Returns:
            (B,) float64.
        """


class Mean:
    """The mean of one number an image.

    Args:
        values: (N,).
        scale: What the mean is multiplied by.
    """

    def __init__(self, values: Tensor, scale: float = 1.0) -> None:
        self.values, self.scale, self.count = values.double(), scale, len(values)

    def __call__(self, weights: Tensor) -> Tensor:
        """(B, N) to (B,)."""
        return self.scale * (weights @ self.values) / self.count


class LogPowerDifference:
    """Mean over all frequencies but 0 of the absolute difference of mean log power.

    Args:
        log_power: (N, bins) of the images.
        real: (bins,) mean of the real images.
    """

    def __init__(self, log_power: Tensor, real: Tensor) -> None:
        self.log_power, self.real, self.count = log_power.double(), real.double(), len(log_power)

    def __call__(self, weights: Tensor) -> Tensor:
        """(B, N) to (B,)."""
        mean = weights @ self.log_power / self.count  # (B, bins)
        return (mean - self.real)[:, 1:].abs().mean(1)


class FrechetToReference:
    r"""The squared Frechet distance to real images, exactly, as ``metrics.frechet`` has it.

    With the reference's covariance :math:`C = A A^T` it takes the trace of :math:`(A^T C_w A)^{1/2}`, where
    :math:`C_w` is that of a draw. Features are projected on A once; a draw weighs and centres them and takes the
    eigenvalues of their (R, R) covariance, R the rank of C, or of their Gram matrix, where fewer images were drawn.

    Args:
        features: (N, D), 2 images or more.
        reference: Of the real images' features.
    """

    def __init__(self, features: Tensor, reference: ReferenceStatistics) -> None:
        values, vectors = torch.linalg.eigh((reference.covariance + reference.covariance.T) / 2)
        kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
        self.count = len(features)
        self.centre = features.double().mean(0)
        self.features = features.double() - self.centre  # so that nothing cancels where the mean is large
        self.squares = self.features.square().sum(1)
        self.projected = self.features @ (vectors[:, kept] * values[kept].sqrt())  # (N, R)
        self.offset = self.centre - reference.mean
        self.trace = reference.covariance.trace()

    def __call__(self, weights: Tensor) -> Tensor:
        """(B, N) to (B,)."""
        return torch.stack([self._distance(draw) for draw in weights])

    def _distance(self, draw: Tensor) -> Tensor:
        n = self.count
        mean = draw @ self.features / n
        trace = (draw @ self.squares - n * mean.square().sum()) / (n - 1)
        drawn = draw > 0
        rows = self.projected[drawn] - draw @ self.projected / n
        rows *= (draw[drawn] / (n - 1)).sqrt()[:, None]
        product = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
        values = torch.linalg.eigvalsh(product)
        # Rounding noise has a root that is far larger than itself.
        values = values[values > values[-1:] * len(values) * torch.finfo(values.dtype).eps]
        distance: Tensor = (self.offset + mean).square().sum() + self.trace + trace - 2 * values.sqrt().sum()
        return distance.clamp(min=0)


def replicates(
    statistic: Statistic,
    resamples: int,
    seed: int,
    stream: int = 0,
    advance: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Compute a statistic of images that are drawn anew.

    Args:
        statistic: What is computed.
        resamples: Number B of draws.
        seed: What the draws come from.
        stream: Draws of another stream are independent; of the same seed, stream and number of images they are equal.
        advance: Told how many draws were done, as they are.

    Returns:
        (B,) float64.
    """
    at_least(1, resamples=resamples, count=statistic.count)
    at_least(0, seed=seed, stream=stream)
    draws = np.random.default_rng([seed, stream])
    found = []
    for start in range(0, resamples, _AT_ONCE):
        drawn = draws.integers(statistic.count, size=(min(_AT_ONCE, resamples - start), statistic.count))
        weights = np.stack([np.bincount(draw, minlength=statistic.count) for draw in drawn])
        found.append(statistic(torch.from_numpy(weights).double()))
        advance(len(drawn))
    return torch.cat(found)


def interval(value: float, replicated: Tensor, biased: bool, level: float = LEVEL) -> Interval:
    """The interval of a value, or of a difference of values, as the module says.

    Args:
        value: What the images as they are give.
        replicated: (B,) the same of draws: for a difference, differences of what each draw gives.
        biased: Whether repeats of images move the value, as they do for all but means.
        level: Share of the replicates that lie in it, in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must be in (0, 1), got {level}.")
    ends = replicated.quantile(replicated.new_tensor([(1 - level) / 2, (1 + level) / 2]))
    if biased:  # of a mean, that would add no more than the noise of finitely many draws
        ends = ends + value - replicated.mean()
    low, high = ends.tolist()
    return Interval(low, high)
