r"""Convolutions of maps enlarged twofold, at a quarter of the work and equal up to rounding.

A 3 x 3 convolution of a map that was enlarged by repetition is, along each axis,

.. math::
    y_{2i} = w_0 x_{i-1} + (w_1 + w_2) x_i = s x_i - w_0 (x_i - x_{i-1}), \quad
    y_{2i+1} = (w_0 + w_1) x_i + w_2 x_{i+1} = s x_i + w_2 (x_{i+1} - x_i)

with :math:`s = w_0 + w_1 + w_2`: of the map as it was and of its differences three products, and along both axes nine
for four positions of the output, where the convolution takes nine for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["FoldedConvolution", "FoldedWeights", "fold", "is_opaque"]

NARROWEST = 128
"""Convolutions of fewer channels are left as they are: their time goes into memory, of which the products take more."""

_SIDES = (0, 1)


def fold(weight: Tensor) -> Tensor:
    """Weights (C, D, 3, 3) of a convolution as factors (9, D, C) of the map and its differences.

    Row by row of a table whose rows are the sum over the kernel's rows, the first with its sign changed, and the last,
    and whose columns are likewise of the kernel's columns.
    """

    def three(weight: Tensor) -> list[Tensor]:
        first, second, third = weight.unbind(2)
        return [first + second + third, -first, third]

    return torch.stack([column.t() for rows in three(weight) for column in three(rows)])


class FoldedWeights:
    """Weights of convolutions of twofold enlarged maps as ``fold`` makes them, once for each."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._states: dict[int, tuple[Any, ...]] = {}

    def __call__(self, weight: Tensor) -> Tensor:
        """Fold a weight, or find it folded."""
        key = id(weight)
        if key not in self._made:
            # Those made in inference mode could take part in no graph later.
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = (weight, fold(weight))
            if not torch.compiler.is_compiling():
                self._states[key] = _state(weight)
        return self._made[key][1]

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether a weight (C, D, *kernel) can be folded, and is worth it."""
        wide = min(weight.shape[:2]) >= NARROWEST and weight.dtype in (torch.float32, torch.float64)
        return wide and weight.shape[2:] == (3, 3)

    def check(self) -> bool:
        """Forget all if a weight was moved or written to since.

        Returns:
            Whether one was; what is written to its ``data`` nobody can see. To be asked before a decoder runs: code
            that is being compiled cannot look at it.
        """
        for key, (weight, _) in self._made.items():
            if self._states.setdefault(key, _state(weight)) != _state(weight):
                self._made, self._states = {}, {}
                return True
        return False


def _state(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight._version, weight.dtype, weight.device


class FoldedConvolution(torch.autograd.Function):
    """From a map (B, D, h, w), not enlarged, to (B, C, 2 h, 2 w). Nothing but the weights is kept for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, folded: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
        """Compute the map, with channels last in memory or not."""
        ctx.save_for_backward(folded)
        ctx.channels_last = channels_last
        convolve = _convolve_opaquely if is_opaque(x) else _convolve
        return convolve(x, folded, bias, channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient at the map that was not enlarged."""
        (folded,) = ctx.saved_tensors
        pull_back = _pull_back_opaquely if is_opaque(gradient) else _pull_back
        return pull_back(gradient, folded, ctx.channels_last), None, None, None


def is_opaque(x: Tensor) -> bool:
    """Whether operations on a tensor are to be hidden from the compiler, whose code for a CPU would be slower."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def _convolve(x: Tensor, folded: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    batch, _, height, width = x.shape
    result = _empty(x, (batch, folded.shape[2], 2 * height, 2 * width), channels_last)
    target = result.permute(0, 2, 3, 1)
    x = x.permute(0, 2, 3, 1)
    across, down = _differences(x, 2), _differences(x, 1)
    both = _differences(down, 2)
    whole = x @ folded[0] if bias is None else x @ folded[0] + bias
    columns = [whole + (across @ folded[1 + c]).narrow(2, c, width) for c in _SIDES]
    for r in _SIDES:
        rows = (down @ folded[3 * (1 + r)]).narrow(1, r, height)
        for c in _SIDES:
            corner = (both @ folded[3 * (1 + r) + 1 + c]).narrow(1, r, height).narrow(2, c, width)
            target[:, r::2, c::2] = corner.add_(rows).add_(columns[c])
    return result


def _pull_back(gradient: Tensor, folded: Tensor, channels_last: bool) -> Tensor:
    factors = folded.transpose(1, 2)
    gradient = gradient.permute(0, 2, 3, 1)
    corners = [[gradient[:, r::2, c::2] for c in _SIDES] for r in _SIDES]
    columns = [corners[0][c] + corners[1][c] for c in _SIDES]
    found = (columns[0] + columns[1]) @ factors[0]
    for c in _SIDES:
        _add_differences_gradient(found, columns[c] @ factors[1 + c], 2, c)
    for r in _SIDES:
        rows = (corners[r][0] + corners[r][1]) @ factors[3 * (1 + r)]
        for c in _SIDES:
            _add_differences_gradient(rows, corners[r][c] @ factors[3 * (1 + r) + 1 + c], 2, c)
        _add_differences_gradient(found, rows, 1, r)
    return found.permute(0, 3, 1, 2).contiguous(memory_format=_format(channels_last))


@torch.library.custom_op("lpl_lightning::folded_convolution", mutates_args=())
def _convolve_opaquely(x: Tensor, folded: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    return _convolve(x, folded, bias, channels_last)


@_convolve_opaquely.register_fake
def _(x: Tensor, folded: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    batch, _, height, width = x.shape
    return _empty(x, (batch, folded.shape[2], 2 * height, 2 * width), channels_last)


@torch.library.custom_op("lpl_lightning::folded_convolution_backward", mutates_args=())
def _pull_back_opaquely(gradient: Tensor, folded: Tensor, channels_last: bool) -> Tensor:
    return _pull_back(gradient, folded, channels_last)


@_pull_back_opaquely.register_fake
def _(gradient: Tensor, folded: Tensor, channels_last: bool) -> Tensor:
    batch, _, height, width = gradient.shape
    return _empty(gradient, (batch, folded.shape[1], height // 2, width // 2), channels_last)


def _empty(like: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_format(channels_last))


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _differences(x: Tensor, axis: int) -> Tensor:
    """Differences of neighbours along an axis, the first's and the last's to zero too: one more than positions."""
    edge = torch.zeros_like(x.narrow(axis, 0, 1))
    return torch.diff(x, dim=axis, prepend=edge, append=edge)


def _add_differences_gradient(total: Tensor, gradient: Tensor, axis: int, side: int) -> None:
    """Add to a total what a gradient at each position's difference on one side, 0 before or 1 behind, is at them."""
    length = total.shape[axis] - 1
    if side == 0:
        total += gradient
        total.narrow(axis, 0, length).sub_(gradient.narrow(axis, 1, length))
    else:
        total -= gradient
        total.narrow(axis, 1, length).add_(gradient.narrow(axis, 0, length))
