"""Mean and covariance of vectors that come in batches, on several processes.

What is kept is the number n of vectors, their mean m and their scatter S = sum (x - m)(x - m)^T, in float64. Two sets
merge into one exactly (Chan, Golub & LeVeque, 1983, "Algorithms for computing the sample variance", eq. 2.1):

    m = m_1 + (n_2 / n) d,   S = S_1 + S_2 + (n_1 n_2 / n) d d^T,   d = m_2 - m_1.

Each batch is centred on its own mean before it is squared, so that nothing cancels where the mean is large, and neither
batch size nor number of processes matters beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lpl_lightning.arguments import at_least

__all__ = [
    "DoubleMetric",
    "Gaussian",
    "GaussianStatistics",
    "add_features",
    "empty_moments",
    "gaussian",
    "merge_moments",
]


class Gaussian(NamedTuple):
    """Mean and covariance of n vectors.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, divided by n - 1.
        samples: n.
    """

    mean: Tensor
    covariance: Tensor
    samples: int


def empty_moments(dim: int) -> Tensor:
    """Those of no vectors.

    One tensor (D + 1, D + 1) holds them, since torchmetrics merges each state by itself: n at its corner, m in the
    first row, S below it.
    """
    return torch.zeros(dim + 1, dim + 1, dtype=torch.float64)


def add_features(moments: Tensor, features: Tensor) -> None:
    """Add a batch to moments, in place.

    Args:
        moments: (D + 1, D + 1) float64.
        features: (B, D) floating point.

    Raises:
        ValueError: The shape or kind is another, or a value is not finite.
    """
    dim = len(moments) - 1
    if features.ndim != 2 or features.shape[1] != dim or not features.is_floating_point():
        got = f"{tuple(features.shape)} {features.dtype}"
        raise ValueError(f"`features` must be (B, {dim}) floating point, one row an image, got {got}.")
    if bad := int((~features.isfinite()).any(dim=1).sum()):
        raise ValueError(f"`features` of {bad} of {len(features)} images are not finite: look for NaN in the images.")
    if not len(features):
        return
    x = features.detach().to(moments)
    mean, seen = x.mean(dim=0), float(moments[0, 0])
    centred, d, share = x - mean, mean - moments[0, 1:], len(x) / (seen + len(x))
    moments[1:, 1:].addmm_(centred.T, centred).addr_(d, d, alpha=seen * share)
    moments[0, 1:] += share * d
    moments[0, 0] += len(x)


def merge_moments(moments: Tensor) -> Tensor:
    """Moments of all sets from those of each.

    Args:
        moments: (K, D + 1, D + 1).

    Returns:
        (D + 1, D + 1).
    """
    merged = moments[0].clone()
    for other in moments[1:]:
        count = merged[0, 0] + other[0, 0]
        share = other[0, 0] / count.clamp(min=1)
        d = other[0, 1:] - merged[0, 1:]
        # Scaled before it is squared, so that a large d with a small share does not overflow.
        merged[1:, 1:] += other[1:, 1:] + torch.outer(merged[0, 0] * share * d, d)
        merged[0, 1:] += share * d
        merged[0, 0] = count
    return merged


def gaussian(moments: Tensor, side: str, at_least_count: int = 2) -> Gaussian:
    """Mean and covariance from moments.

    Args:
        moments: (D + 1, D + 1).
        side: What they are of, for the error.
        at_least_count: Least number of vectors.

    Raises:
        ValueError: There are fewer.
    """
    count = int(moments[0, 0])
    if count < at_least_count:
        dim = len(moments) - 1
        allow = " Give more images, or set `allow_few`, which makes it depend on their number." if count > 1 else ""
        raise ValueError(
            f"{side}: a covariance of {dim} features needs {at_least_count} images or more, got {count}.{allow}"
        )
    return Gaussian(moments[0, 1:].clone(), moments[1:, 1:] / (count - 1), count)


class DoubleMetric(Metric):
    """A metric whose states keep their precision, whatever the module around it is put in."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Follow to another device only."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)


class GaussianStatistics(DoubleMetric):
    """Mean and covariance of vectors; ``compute`` gives a ``Gaussian``.

    Args:
        dim: Number D of features.
        kwargs: Those of ``torchmetrics.Metric``.
    """

    full_state_update = False
    is_differentiable = False
    moments: Tensor

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(1, dim=dim)
        self.dim = dim
        self.add_state("moments", empty_moments(dim), dist_reduce_fx=merge_moments)

    def update(self, features: Tensor) -> None:
        """Take a batch, (B, ``dim``)."""
        add_features(self.moments, features)

    def forward(self, features: Tensor) -> Gaussian | None:
        """Take a batch, and give that of the batch alone, which one vector has none of."""
        if len(features) < 2:
            self.update(features)
            return None
        found: Gaussian = super().forward(features)
        return found

    def compute(self) -> Gaussian:
        """Mean and covariance of all.

        Raises:
            ValueError: Fewer than two vectors were seen.
        """
        return gaussian(self.moments, type(self).__name__)
