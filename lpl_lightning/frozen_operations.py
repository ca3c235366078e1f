r"""Operations of a network that is not trained, cheaper than those of one that is, and equal up to rounding.

A frozen convolution :math:`y = W x` needs no gradient of its weights, and so no copy of its input kept for one:
:math:`\partial L / \partial x = W^T \partial L / \partial y` asks for the weights alone.

A 3 x 3 convolution of a map enlarged twofold by repetition is, along each axis, :math:`w_0 x_{i-1} + (w_1 + w_2) x_i`
at the even and :math:`(w_0 + w_1) x_i + w_2 x_{i+1}` at the odd positions of its output: four 2 x 2 convolutions of the
map as it was, and 4 / 9 of the work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["FoldedWeights", "FrozenOperations"]

_TRANSPOSED: dict[Any, Callable[..., Tensor]] = {
    torch.conv1d: torch.conv_transpose1d,
    torch.conv2d: torch.conv_transpose2d,
    torch.conv3d: torch.conv_transpose3d,
}
_NEVER = itertools.count()  # unlike itself the next time
_PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


class FrozenOperations(TorchFunctionMode):
    """While it is entered, convolutions whose weights are not trained run as said above.

    Args:
        folded: Where folded weights are kept; None folds nothing.
    """

    def __init__(self, folded: FoldedWeights | None = None) -> None:
        super().__init__()
        self._folded = folded
        # The last map enlarged, what it was made from, and how often each had been written to.
        self._enlarged: tuple[Tensor, Tensor, tuple[int, int]] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and self._folded is not None:
            result = func(*args, **kwargs)
            if _is_twofold(result, *args, **kwargs):
                source = args[0] if args else kwargs["input"]
                self._enlarged = (result, source, _versions(result, source))
            return result
        if func in _TRANSPOSED:
            enlarged, self._enlarged = self._enlarged, None
            return self._convolve(func, enlarged, *args, **kwargs)
        return func(*args, **kwargs)

    def _convolve(
        self,
        func: Callable[..., Tensor],
        enlarged: tuple[Tensor, Tensor, tuple[int, int]] | None,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if (
            trained
            or isinstance(padding, str)
            or input.ndim != weight.ndim
            or torch.is_autocast_enabled(input.device.type)
        ):
            return func(input, weight, bias, stride, padding, dilation, groups)
        untouched = enlarged is not None and enlarged[0] is input and enlarged[2] == _versions(*enlarged[:2])
        # Weights that are made anew for each call would be folded and kept each time.
        if enlarged is not None and untouched and self._folded is not None and isinstance(weight, nn.Parameter):
            plain = all(_tuple(value, 2) == (1, 1) for value in (stride, padding, dilation)) and groups == 1
            if plain and weight.shape[2:] == (3, 3) and weight.dtype in (torch.float32, torch.float64):
                return cast(Tensor, _FoldedConvolution.apply(enlarged[1], self._folded(weight), bias))
        if not (torch.is_grad_enabled() and input.requires_grad):
            return func(input, weight, bias, stride, padding, dilation, groups)
        return cast(Tensor, _FrozenConvolution.apply(func, input, weight, bias, stride, padding, dilation, groups))


class FoldedWeights:
    """Weights (C, D, 3, 3) of convolutions of twofold enlarged maps as (4 C, D, 2, 2), made once for each."""

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

    def check(self) -> bool:
        """Forget all if a weight was moved or written to since.

        Returns:
            Whether one was. To be asked before a decoder runs: code that is being compiled cannot look at it.
        """
        for key, (weight, _) in self._made.items():
            if self._states.setdefault(key, _state(weight)) != _state(weight):
                self._made, self._states = {}, {}
                return True
        return False


def _state(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight._version, weight.dtype, weight.device


def fold(weight: Tensor) -> Tensor:
    """Sum a weight (C, D, 3, 3) into those of the four phases (0, 0), (0, 1), (1, 0), (1, 1): (4 C, D, 2, 2)."""

    def halves(weight: Tensor, axis: int) -> list[Tensor]:
        first, second, third = weight.unbind(axis)
        return [torch.stack((first, second + third), axis), torch.stack((first + second, third), axis)]

    phases = torch.cat([columns for rows in halves(weight, 2) for columns in halves(rows, 3)])
    format = torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return phases.contiguous(memory_format=format)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        func: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        axes = x.ndim - 2
        ctx.func, ctx.shape = func, x.shape
        ctx.settings = (*(_tuple(value, axes) for value in (stride, padding, dilation)), groups)
        return func(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        # Positions at the end that no window of the convolution reached.
        missed = [
            side - ((out - 1) * s - 2 * p + d * (kernel - 1) + 1)
            for side, out, kernel, s, p, d in zip(
                ctx.shape[2:], gradient.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        ]
        transposed = _TRANSPOSED[ctx.func](gradient, weight, None, stride, padding, missed, groups, dilation)
        return None, transposed, *[None] * 6


class _FoldedConvolution(torch.autograd.Function):
    """Of a map (B, D, h, w), not enlarged, to (B, C, 2 h, 2 w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, folded: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(folded)
        ctx.shape = x.shape
        batch, (height, width), channels = len(x), x.shape[2:], len(folded) // 4
        # With a padding of one on every side each phase is a shifted part of one convolution.
        phases = torch.conv2d(x, folded, None if bias is None else bias.repeat(4), 1, 1).unflatten(1, (4, channels))
        format = torch.channels_last if _channels_last(phases) else torch.contiguous_format
        shape = (batch, channels, 2 * height, 2 * width)
        result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format)
        for k, (a, b) in enumerate(_PHASES):
            result[:, :, a::2, b::2] = phases[:, k, :, a : a + height, b : b + width]
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (folded,) = ctx.saved_tensors
        batch, _, height, width = ctx.shape
        format = torch.channels_last if gradient.stride(1) == 1 else torch.contiguous_format
        shape = (batch, len(folded), height + 1, width + 1)
        phases = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=format).zero_()
        split = phases.unflatten(1, (4, -1))
        for k, (a, b) in enumerate(_PHASES):
            split[:, k, :, a : a + height, b : b + width] = gradient[:, :, a::2, b::2]
        return torch.conv_transpose2d(phases, folded, None, 1, 1), None, None


def _is_twofold(result: Tensor, input: Tensor, *args: Any, mode: str = "nearest", **kwargs: Any) -> bool:
    """Whether a result of ``interpolate`` repeats each position of a map (B, C, h, w) twice along both axes."""
    mode = args[2] if len(args) > 2 else mode
    return mode == "nearest" and input.ndim == 4 and result.shape[2:] == tuple(2 * side for side in input.shape[2:])


def _versions(result: Tensor, source: Tensor) -> tuple[int, int]:
    """How often both were written to; those of inference mode do not count it, and compiled code cannot see it."""
    if torch.compiler.is_compiling():
        return 0, 0
    if result.is_inference() or source.is_inference():
        return 0, next(_NEVER)
    return result._version, source._version


def _channels_last(phases: Tensor) -> bool:
    return phases.stride(2) == 1


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)
