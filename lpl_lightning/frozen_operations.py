r"""Operations of a network that is not trained, cheaper than those of one that is, and equal up to rounding.

A frozen convolution :math:`y = W x` needs no gradient of its weights, and so no copy of its input kept for one:
:math:`\partial L / \partial x = W^T \partial L / \partial y` asks for the weights alone.

One of a map enlarged twofold is a ``FoldedConvolution`` of the map as it was, and an activation behind a normalization
a ``NormalizedSilu`` of the map before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lpl_lightning.folded_convolution import FoldedConvolution, FoldedWeights
from lpl_lightning.frozen_normalization import NormalizedSilu, group_norm, is_frozen

__all__ = ["FrozenOperations"]

_TRANSPOSED: dict[Any, Callable[..., Tensor]] = {
    torch.conv1d: torch.conv_transpose1d,
    torch.conv2d: torch.conv_transpose2d,
    torch.conv3d: torch.conv_transpose3d,
}
_NEVER = itertools.count()  # unlike itself the next time


class FrozenOperations(TorchFunctionMode):
    """While it is entered, operations whose weights are not trained run as said above.

    Args:
        folded: Where folded weights are kept; None folds nothing.
    """

    def __init__(self, folded: FoldedWeights | None = None) -> None:
        super().__init__()
        self._folded = folded
        # The last map enlarged, what it was made from, and how often each had been written to.
        self._enlarged: tuple[Tensor, Tensor, tuple[int, int]] | None = None
        # Likewise the last map normalized, and how.
        self._normalized: tuple[Tensor, Tensor, tuple[int, int], tuple[Any, ...]] | None = None

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
            enlarged, self._enlarged, self._normalized = self._enlarged, None, None
            return self._convolve(func, enlarged, *args, **kwargs)
        if func is F.group_norm:
            return self._normalize(*args, **kwargs)
        if func is F.silu:
            return self._activate(*args, **kwargs)
        return func(*args, **kwargs)

    def _normalize(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        settings = (num_groups, weight, bias, eps)
        result = group_norm(input, *settings)
        graph = torch.is_grad_enabled() and input.requires_grad and not torch.compiler.is_compiling()
        if graph and is_frozen(input, weight, bias):
            self._normalized = (result, input, _versions(result, input), settings)
        return result

    def _activate(self, input: Tensor, inplace: bool = False) -> Tensor:
        normalized, self._normalized = self._normalized, None
        if normalized is None or inplace:
            return F.silu(input, inplace)
        result, source, versions, settings = normalized
        if result is not input or versions != _versions(result, source):
            return F.silu(input)
        return cast(Tensor, NormalizedSilu.apply(input.detach(), source, *settings))

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
            if plain and self._folded.takes(weight):
                last = any(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (input, weight))
                return cast(Tensor, FoldedConvolution.apply(enlarged[1], self._folded(weight), bias, last))
        if not (torch.is_grad_enabled() and input.requires_grad):
            return func(input, weight, bias, stride, padding, dilation, groups)
        return cast(Tensor, _FrozenConvolution.apply(func, input, weight, bias, stride, padding, dilation, groups))


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


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)
