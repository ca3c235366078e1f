r"""Squared distances of pairs of points: cheap bounds for all of them, the distances themselves for a few.

With :math:`x' = x + e` in less precision, :math:`\|e\| \le \epsilon \|x\|`, the products' error is

.. math:: |x y - x' y'| \le (2 \epsilon + \epsilon^2) \|x\| \|y\| \le
    (\epsilon + \epsilon^2 / 2) (\|x\|^2 + \|y\|^2),

to which comes that of their sums, at most :math:`\gamma_D \|x'\| \|y'\|` in any order (Higham, "Accuracy and Stability
of Numerical Algorithms", section 3.1). So :math:`\|x - y\|^2 = \|x\|^2 + \|y\|^2 - 2 x y` is bounded from both sides.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lpl_lightning.arguments import at_least

__all__ = [
    "SCARCE",
    "Points",
    "Rounded",
    "block_side",
    "common_points",
    "exact_squares",
    "lower_bounds",
    "nearest_squares",
    "product_types",
    "slices",
    "upper_bounds",
]

TINY = 1e-28
"""Squared distances, over the points' squared extent, that products do not tell from 0."""
MOST = 1e150
"""Extent whose square float64 holds."""
PAIR_BYTES = 160
"""Held for each pair of a block, if none can be ruled out."""
SCARCE = 128
"""Where less than one in so many is left open, their exact distances cost less than another pass."""


class Rounded(NamedTuple):
    """Features in the type of the products, their squared norms, and the products' error over those."""

    values: Tensor
    squares: Tensor
    error: float

    def part(self, rows: slice) -> Rounded:
        """Some of them."""
        return Rounded(self.values[rows], self.squares[rows], self.error)


class Points:
    """Features, moved and scaled so that norms are at most 1."""

    def __init__(self, features: Tensor, shift: Tensor, scale: float) -> None:
        self.features, self.shift, self.scale = features, shift, scale

    def __len__(self) -> int:
        return len(self.features)

    def rounded(self, dtype: torch.dtype) -> Rounded:
        """All of them in a type."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch.empty_like(self.features, dtype=dtype, memory_format=torch.contiguous_format)
        squares, worst = values.new_empty(len(self), dtype=wide), 0.0
        chunk = min(_row_chunk(self.features), len(self))
        kept = torch.empty(chunk, values.shape[1], dtype=torch.float64, device=values.device)
        for rows in slices(len(self), chunk):
            exact = kept[: rows.stop - rows.start].copy_(self.features[rows]).sub_(self.shift).div_(self.scale)
            values[rows] = exact
            norms = torch.linalg.vector_norm(exact, dim=1)
            lost = torch.linalg.vector_norm(exact.sub_(values[rows]), dim=1)
            squares[rows] = norms.square()
            worst = max(worst, float((lost / (norms + 1e-30)).max()))
        # |xy - x'y'| <= (2 worst + worst^2) |x| |y|, a sum of D products in any order, and what is done with it.
        unit = torch.finfo(wide).eps / 2
        terms = (values.shape[1] + 2) * unit
        error = 2 * worst + worst**2 + terms / (1 - terms) * (1 + worst) ** 2 + 16 * unit
        return Rounded(values, squares, error)


def common_points(*sets: Tensor) -> list[Points]:
    """Sets in common coordinates, around their mean, on the CPU if their device has no float64.

    Raises:
        ValueError: They are too large to be squared.
    """
    sets = tuple((features.cpu() if features.device.type == "mps" else features).detach() for features in sets)
    sums = [
        features[rows].sum(0, dtype=torch.float64)
        for features in sets
        for rows in slices(len(features), _row_chunk(features))
    ]
    shift = torch.stack(sums).sum(0) / sum(map(len, sets))
    ends = torch.stack([end.double() for features in sets for end in features.aminmax()])
    extent = float(ends.max() - ends.min()) * math.sqrt(len(shift))
    if not extent < MOST:
        raise ValueError(f"features must lie within {MOST} of each other, got {extent}; scale them down.")
    scale = 2.0 ** max(math.frexp(extent)[1], -500)  # a power of two, so that nothing is rounded
    return [Points(features, shift, scale) for features in sets]


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive parts of so many indices."""
    return (slice(start, min(start + size, count)) for start in range(0, count, max(1, size)))


def _row_chunk(features: Tensor) -> int:
    """Rows that are worth starting threads for, or a launch; their float64 copies take 16 MB."""
    return max(1, 2**21 // features.shape[1])


def block_side(block_bytes: int) -> int:
    """Points on either side of a block of pairs, for the memory that it may take."""
    at_least(PAIR_BYTES, block_bytes=block_bytes)
    return math.isqrt(block_bytes // PAIR_BYTES)


def product_types(device: torch.device, passes: Sequence[torch.dtype] | None) -> list[torch.dtype]:
    """Types of the passes: those asked for that keep what they promise here, then float64.

    Args:
        device: Where the features are.
        passes: What to use, None for what this CPU is fastest at.

    Raises:
        ValueError: There is another type.
    """
    if device.type != "cpu":
        return [torch.float64]  # others' float32 and bfloat16 products are as precise as global settings have them
    if passes is None:
        passes = (torch.bfloat16, torch.float32) if _bfloat16_is_fast() else (torch.float32,)
    if unknown := [dtype for dtype in passes if dtype not in (torch.bfloat16, torch.float32, torch.float64)]:
        raise ValueError(f"`passes` must be of torch.bfloat16, torch.float32 and torch.float64, got {unknown}.")
    probe = torch.full((64, 64), 1 + 2**-12)
    lowered = abs(float((probe @ probe)[0, 0]) / 64 - 1 - 2**-11) > 2**-13  # torch.set_float32_matmul_precision
    types = [dtype for dtype in passes if not (lowered and dtype == torch.float32)]
    return types if torch.float64 in types else [*types, torch.float64]


@functools.cache
def _bfloat16_is_fast() -> bool:
    """Whether this CPU has instructions for it."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        taken = []
        for _ in range(4):
            start = time.perf_counter()
            matrix @ matrix
            taken.append(time.perf_counter() - start)
        return min(taken[1:])

    return seconds(torch.bfloat16) < 0.6 * seconds(torch.float32)


def lower_bounds(a: Rounded, b: Rounded) -> Tensor:
    """Of the squared distances of all pairs."""
    error, unit = max(a.error, b.error), _output_error(a)
    with torch.autocast(a.values.device.type, enabled=False):
        products = (a.values @ b.values.T).to(a.squares.dtype)
    if unit:  # products x (1 + unit) where positive, (1 - unit) where negative; the factor follows
        F.leaky_relu_(products, (1 - unit) / (1 + unit))
    bounds = (a.squares * (1 - error) - TINY)[:, None] + b.squares * (1 - error)
    return bounds.sub_(products, alpha=2 * (1 + unit))


def upper_bounds(a: Rounded, b: Rounded, i: Tensor, j: Tensor, lower: Tensor) -> Tensor:
    """Of the squared distances of some pairs, float64."""
    error, unit = max(a.error, b.error), _output_error(a)
    sums, lower = a.squares[i].double() + b.squares[j], lower.double()
    return lower + 2 * error * sums + 2 * unit / (1 - unit) * ((1 - error) * sums - lower).abs() + 4 * TINY


def _output_error(a: Rounded) -> float:
    return 0.0 if a.values.dtype == a.squares.dtype else torch.finfo(a.values.dtype).eps / 2


def exact_squares(a: Points, b: Points, i: Tensor, j: Tensor) -> Tensor:
    """Squared distances of pairs, from their differences, float64."""
    found = torch.empty(len(i), dtype=torch.float64, device=i.device)
    # On a CPU few enough to stay in its caches, and enough to be worth their calls: fewer and more are slower.
    held = 2**18 if i.device.type == "cpu" else 2**21
    chunk = min(max(1, held // a.features.shape[1]), len(i))
    # Kept, as fresh memory takes longer than all that is done with it.
    left, right = (points.features.new_empty(chunk, a.features.shape[1]) for points in (a, b))
    difference, other = (torch.empty_like(left, dtype=torch.float64) for _ in range(2))
    for part in slices(len(i), chunk):
        count = part.stop - part.start
        torch.index_select(a.features, 0, i[part], out=left[:count])
        torch.index_select(b.features, 0, j[part], out=right[:count])
        rows = difference[:count].copy_(left[:count]).sub_(other[:count].copy_(right[:count]))
        found[part] = torch.linalg.vector_norm(rows, dim=1).div_(a.scale).square_()
    return found


def nearest_squares(points: Points, k: int, side: int, passes: list[torch.dtype]) -> Tensor:
    """Squared distances to the k-th nearest other point, (N,) float64, over the squared scale."""
    count = len(points)
    width = min(3 * k + 11, count - 1)
    for dtype in passes:
        rounded = points.rounded(dtype)
        lower, index = _smallest(rounded, width, side)
        found = torch.empty(count, dtype=torch.float64, device=lower.device)
        for rows in slices(count, max(1, side**2 // width)):
            i = torch.arange(rows.start, rows.stop, device=index.device)[:, None].expand(-1, width)
            reach = upper_bounds(rounded, rounded, i, index[rows], lower[rows]).kthvalue(k, 1, keepdim=True).values
            near = lower[rows] <= reach
            squares = torch.full_like(near, math.inf, dtype=torch.float64)
            squares[near] = exact_squares(points, points, i[near], index[rows][near])
            found[rows] = squares.kthvalue(k, 1).values
        # Points that were left out are no nearer than the last that was kept, but for what a sum of D terms is rounded
        # by: many that are equally near, as corners of a simplex are, need no look at all of them.
        least = lower.amax(1).clamp(min=0) * (1 + points.features.shape[1] * torch.finfo(torch.float64).eps)
        open_rows = (found > least).nonzero().flatten() if width < count - 1 else index[:0, 0]
        if SCARCE * len(open_rows) <= count:
            break
    for part in slices(len(open_rows), max(1, side**2 // count)):
        found[open_rows[part]] = _nearest_of_all(points, rounded, open_rows[part], k)
    return found


def _nearest_of_all(points: Points, rounded: Rounded, rows: Tensor, k: int) -> Tensor:
    """Squared distances of some points to their k-th nearest other, of which many may be equally near."""
    i = rows[:, None].expand(-1, len(points))
    j = torch.arange(len(points), device=rows.device).expand_as(i)
    some = Rounded(rounded.values[rows], rounded.squares[rows], rounded.error)
    lower = lower_bounds(some, rounded)
    upper = upper_bounds(rounded, rounded, i, j, lower).masked_fill_(i == j, math.inf)
    near = (lower <= upper.kthvalue(k, 1, keepdim=True).values).logical_and_(i != j)
    squares = torch.full_like(upper, math.inf)
    squares[near] = exact_squares(points, points, i[near], j[near])
    return squares.kthvalue(k, 1).values


def _smallest(rounded: Rounded, width: int, side: int) -> tuple[Tensor, Tensor]:
    """Each point's smallest bounds to others and whose they are, (N, width) each."""
    count = len(rounded.values)
    lower = rounded.squares.new_full((count, width), math.inf)
    index = torch.zeros(count, width, dtype=torch.long, device=lower.device)

    def keep(rows: slice, columns: slice, bounds: Tensor) -> None:
        least, position = bounds.topk(min(width, bounds.shape[1]), largest=False, sorted=False)
        lower[rows], order = torch.cat([lower[rows], least], 1).topk(width, largest=False, sorted=False)
        index[rows] = torch.cat([index[rows], position + columns.start], 1).gather(1, order)

    for rows in slices(count, side):
        for columns in slices(count, side):
            if columns.start >= rows.start:
                bounds = lower_bounds(rounded.part(rows), rounded.part(columns))
                if rows == columns:
                    bounds.fill_diagonal_(math.inf)
                else:
                    keep(columns, rows, bounds.T.contiguous())
                keep(rows, columns, bounds)
    return lower, index
