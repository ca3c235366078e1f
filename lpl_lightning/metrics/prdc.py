r"""How much of one set of features lies where another does: precision, recall, density and coverage.

With real features :math:`x_i`, generated :math:`y_j`, and the distance :math:`NND_k(x_i)` from a point to the k-th
nearest other one of its own set, the radius of its ball,

.. math::
    precision &= \tfrac1M \textstyle\sum_j \max_i [\, \|x_i - y_j\| < NND_k(x_i) \,] \\
    recall &= \tfrac1N \textstyle\sum_i \max_j [\, \|x_i - y_j\| < NND_k(y_j) \,] \\
    density &= \tfrac1{kM} \textstyle\sum_j \sum_i [\, \|x_i - y_j\| < NND_k(x_i) \,] \\
    coverage &= \tfrac1N \textstyle\sum_i \max_j [\, \|x_i - y_j\| < NND_k(x_i) \,]

after Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019, and Naeem
et al., "Reliable Fidelity and Diversity Metrics for Generative Models", 2020. Balls are open, as in the latter's code:
a set has density 1 to itself. It matters where features repeat or a real one was generated, nowhere else.

All comparisons come out as in float64, far from the origin and in tight clusters too: :math:`\|x\|^2 + \|y\|^2 - 2 x y`
in less precision, with a bound of its error, decides nearly all pairs, and the others' differences are squared and
summed in float64. So the numbers do not depend on block size, order, threads or on how precise the products are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lpl_lightning.arguments import at_least
from lpl_lightning.metrics.pair_distances import (
    SCARCE,
    Points,
    block_side,
    common_points,
    exact_squares,
    lower_bounds,
    nearest_squares,
    product_types,
    slices,
    upper_bounds,
)
from lpl_lightning.metrics.two_sets import TwoSetsMetric

__all__ = ["PRDC", "Neighbours", "Overlap", "nearest_distances", "neighbours", "prdc"]

BLOCK_BYTES = 2**29


class Overlap(NamedTuple):
    """Of generated features with real ones: shares in [0, 1], but for the density, which may be above 1."""

    precision: float
    recall: float
    density: float
    coverage: float


class Neighbours(NamedTuple):
    """Of which balls each sample is a member; the overlap is a mean of each.

    Attributes:
        holding: How many balls of real samples hold each generated one, (M,).
        covered: Whether the ball of each real sample holds a generated one, (N,).
        recalled: Whether a ball of a generated sample holds each real one, (N,).
        k: Which neighbour the balls reach to.
    """

    holding: Tensor
    covered: Tensor
    recalled: Tensor
    k: int

    @property
    def overlap(self) -> Overlap:
        """Precision, recall, density and coverage."""
        generated, real = len(self.holding), len(self.covered)
        return Overlap(
            precision=int((self.holding > 0).sum()) / generated,
            recall=int(self.recalled.sum()) / real,
            density=int(self.holding.sum()) / (self.k * generated),
            coverage=int(self.covered.sum()) / real,
        )


class PRDC(TwoSetsMetric):
    """Precision, recall, density and coverage of generated images' features.

    All features are kept, in float32: 50,000 of 2,048 dimensions take 400 MB, up to four times that while ``compute``
    runs, and after a sync each process has those of all. ``set_dtype(torch.float64)`` before the first update keeps
    float64.

    Args:
        k: Which neighbour a ball reaches to.
        block_bytes: Memory for one block of pairs, see ``nearest_distances``.
        **kwargs: torchmetrics' own.

    Raises:
        ValueError: k or the memory is too small.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0

    real: list[Tensor] | Tensor
    generated: list[Tensor] | Tensor
    dimensions: Tensor

    def __init__(self, k: int = 5, block_bytes: int = BLOCK_BYTES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(1, k=k)
        block_side(block_bytes)
        self.k = k
        self.block_bytes = block_bytes
        # Flat, like what torchmetrics gathers from a process that has none.
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")
        self.add_state("dimensions", torch.tensor(0), dist_reduce_fx=_same_dimensions)

    @property
    def dtype(self) -> torch.dtype:
        """What features are kept in: no less than float32, in modules of less precision too."""
        return torch.promote_types(torch.float32, super().dtype)

    def update(self, features: Tensor, real: bool) -> None:
        """Take a batch.

        Args:
            features: (B, D), any floating type.
            real: Whether they are of real images.

        Raises:
            ValueError: They are no such features, not finite, or of another dimension than before.
        """
        kind = "real" if real else "generated"
        _check_features(f"`features` of update {self.update_count} ({kind})", features)
        new = self.dimensions.new_tensor(features.shape[1])
        self.dimensions = _same_dimensions(torch.stack([self.dimensions, new]))
        kept: Any = getattr(self, kind)
        kept.append(features.detach().to(self.dtype, copy=True).flatten())  # the caller's may be written over

    def compute(self) -> dict[str, Tensor]:
        """The values by name, of all features of all processes.

        Raises:
            ValueError: There are too few of either kind.
        """
        empty, shape = torch.empty(0, dtype=self.dtype, device=self.device), (-1, max(1, int(self.dimensions)))
        real, generated = (
            (dim_zero_cat(kept) if len(kept) else empty).view(shape) for kept in (self.real, self.generated)
        )
        overlap = prdc(real, generated, self.k, self.block_bytes)
        return {name: torch.tensor(value, device=self.device) for name, value in overlap._asdict().items()}


def _same_dimensions(found: Tensor) -> Tensor:
    """The one number of dimensions among those of processes or updates, of which some have none yet, 0."""
    known = sorted(set(found.tolist()) - {0})
    if len(known) > 1:
        raise ValueError(f"`features` must have as many dimensions in all updates, got {known}; use one extractor.")
    return found.max()


def nearest_distances(
    features: Tensor, k: int, block_bytes: int = BLOCK_BYTES, passes: Sequence[torch.dtype] | None = None
) -> Tensor:
    """Distances to the k-th nearest other point.

    Args:
        features: Points (N, D) of any floating type, N above k, on the device that computes.
        k: Which neighbour, 1 for the nearest. A repeated point is its own copies' neighbour, at distance 0.
        block_bytes: Memory for one block of pairs. The features are held once more, in the type of each pass.
        passes: Types of the products that decide most pairs, each for what the one before leaves open; float64 comes
            last. None: what this CPU is fastest at, or on other devices float64 alone. The result is the same, but for
            the rounding of sums of D terms where more than 3 k + 11 points are equally near.

    Returns:
        Distances (N,), float64.

    Raises:
        ValueError: k or N is too small, or a feature is not finite.
    """
    _check(k, features=features)
    (points,) = common_points(features)
    types = product_types(points.features.device, passes)
    return nearest_squares(points, k, block_side(block_bytes), types).sqrt() * points.scale


def prdc(
    real: Tensor,
    generated: Tensor,
    k: int = 5,
    block_bytes: int = BLOCK_BYTES,
    passes: Sequence[torch.dtype] | None = None,
) -> Overlap:
    """Precision, recall, density and coverage of generated features.

    Args:
        real: Features (N, D) of real images, N above k, of any floating type.
        generated: Features (M, D) of generated images, M above k, on the same device.
        k: Which neighbour a ball reaches to.
        block_bytes: Memory for one block of pairs, see ``nearest_distances``.
        passes: Types of products, see ``nearest_distances``.

    Raises:
        ValueError: k, N or M is too small, dimensions differ, or a feature is not finite.
    """
    return neighbours(real, generated, k, block_bytes, passes).overlap


def neighbours(
    real: Tensor,
    generated: Tensor,
    k: int = 5,
    block_bytes: int = BLOCK_BYTES,
    passes: Sequence[torch.dtype] | None = None,
) -> Neighbours:
    """What ``prdc`` counts, of each sample; arguments and errors are its."""
    _check(k, real=real, generated=generated)
    x, y = common_points(real, generated)
    side, types = block_side(block_bytes), product_types(x.features.device, passes)
    # Points at the very edge of a ball stay outside however their distance's terms were summed.
    edge = 1 - 4 * real.shape[1] * torch.finfo(torch.float64).eps
    x_balls, y_balls = (_own_squares(points, k, side, types) * edge for points in (x, y))
    return Neighbours(*_membership(x, y, x_balls, y_balls, side, types), k)


def _own_squares(points: Points, k: int, side: int, passes: list[torch.dtype]) -> Tensor:
    """``nearest_squares`` of one of several sets, around its own mean: it may be much smaller than all of them."""
    (own,) = common_points(points.features)
    return nearest_squares(own, k, side, passes) * (own.scale / points.scale) ** 2


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or not features.is_floating_point() or features.shape[1] < 1:
        raise ValueError(
            f"{name} must be floating-point (N, D), got {features.dtype} {tuple(features.shape)}; "
            "flatten each image's features to one vector."
        )
    if len(features) and not torch.stack(features.aminmax()).isfinite().all():
        row = int((~features.isfinite().all(1)).int().argmax())
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}; look at that image.")


def _check(k: int, **sets: Tensor) -> None:
    at_least(1, k=k)
    for name, features in sets.items():
        _check_features(f"`{name}`", features)
        if len(features) < k + 1:
            raise ValueError(
                f"`{name}` must have at least k + 1 = {k + 1} samples, got {len(features)}; give more or lower `k`."
            )
    dimensions = {name: features.shape[1] for name, features in sets.items()}
    if len(set(dimensions.values())) > 1:
        raise ValueError(f"`real` and `generated` must have as many dimensions, got {dimensions}; use one extractor.")


def _membership(
    x: Points, y: Points, x_balls: Tensor, y_balls: Tensor, side: int, passes: list[torch.dtype]
) -> tuple[Tensor, Tensor, Tensor]:
    """How many balls of x hold each y (M,), which balls of x hold any y (N,), which x a ball of y holds (N,)."""
    holding = torch.zeros(len(y), dtype=torch.long, device=x_balls.device)
    covered, recalled = torch.zeros_like(x_balls, dtype=torch.bool), torch.zeros_like(x_balls, dtype=torch.bool)
    blocks = [(rows, columns) for rows in slices(len(x), side) for columns in slices(len(y), side)]
    for dtype in passes:
        if not blocks:
            break
        a, b = x.rounded(dtype), y.rounded(dtype)
        x_reach, y_reach = x_balls.to(a.squares.dtype), y_balls.to(a.squares.dtype)
        postponed = []
        for rows, columns in blocks:
            lower = lower_bounds(a.part(rows), b.part(columns))
            near = (lower < x_reach[rows, None]).logical_or_(lower < y_reach[columns])
            i, j = near.nonzero(as_tuple=True)
            bounds = lower[i, j].double()
            i, j = i + rows.start, j + columns.start
            squares = upper_bounds(a, b, i, j, bounds)
            x_squares, y_squares = x_balls[i], y_balls[j]
            unsure = (bounds < x_squares) & (squares >= x_squares) | (bounds < y_squares) & (squares >= y_squares)
            if dtype != passes[-1] and SCARCE * int(unsure.sum()) > lower.numel():
                postponed.append((rows, columns))
                continue
            squares[unsure] = exact_squares(x, y, i[unsure], j[unsure])
            inside = squares < x_squares
            holding += torch.bincount(j[inside], minlength=len(y))
            covered[i[inside]] = True
            recalled[i[squares < y_squares]] = True
        blocks = postponed
    return holding, covered, recalled
