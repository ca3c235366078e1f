"""Group normalization whose weights are not trained: with less kept for its gradient, and as fast where compiled.

A network's graph holds what goes into a normalization and what goes into the activation behind it. The second is the
first normalized: made again in the backward pass, it need not be held.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lpl_lightning.folded_convolution import is_opaque

__all__ = ["NormalizedSilu", "group_norm", "is_frozen"]


def is_frozen(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a normalization has weights, and none that are trained."""
    given = weight is not None and bias is not None and not weight.requires_grad and not bias.requires_grad
    return given and not torch.is_autocast_enabled(input.device.type)


def group_norm(input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``F.group_norm``; in code that is compiled for a CPU by PyTorch's own kernel, not by slower ones made for it."""
    wide = all(x is not None and x.dtype in (torch.float32, torch.float64) for x in (input, weight, bias))
    if wide and is_opaque(input) and is_frozen(input, weight, bias):
        return cast(Tensor, _OpaqueGroupNorm.apply(input, weight, bias, num_groups, eps))
    return F.group_norm(input, num_groups, weight, bias, eps)


class NormalizedSilu(torch.autograd.Function):
    """``silu`` of a normalized map, as a function of the map before its normalization, which alone is kept."""

    @staticmethod
    def forward(
        ctx: Any, normalized: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        """Compute it, of maps (B, C, *positions) in whatever layout."""
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(normalized)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient at the map before its normalization."""
        x, weight, bias = ctx.saved_tensors
        nothing = None, None, None, None
        if torch.is_grad_enabled():  # a gradient that is to be differentiated again
            result = F.silu(F.group_norm(x, ctx.groups, weight, bias, ctx.eps))
            return None, *torch.autograd.grad(result, x, gradient, create_graph=True), *nothing
        x = _dense(x)
        normalized, mean, rstd = torch.native_group_norm(x, weight, bias, *_sizes(x), ctx.groups, ctx.eps)
        gradient = torch.ops.aten.silu_backward(gradient, normalized)
        return None, _backward(gradient, x, weight, mean, rstd, ctx.groups), *nothing


class _OpaqueGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        found: tuple[Tensor, Tensor, Tensor] = _opaque(x, weight, bias, groups, eps)
        result, mean, rstd = found
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _opaque_backward(gradient, *ctx.saved_tensors, ctx.groups), None, None, None, None


@torch.library.custom_op("lpl_lightning::group_norm", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_group_norm(_dense(x), weight, bias, *_sizes(x), groups, eps)


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(_dense(x)), x.new_empty(len(x), groups), x.new_empty(len(x), groups)


@torch.library.custom_op("lpl_lightning::group_norm_backward", mutates_args=())
def _opaque_backward(gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Tensor:
    return _backward(gradient, _dense(x), weight, mean, rstd, groups)


@_opaque_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Tensor:
    return torch.empty_like(_dense(x))


def _backward(gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Tensor:
    wanted = [True, False, False]
    gradient = gradient.contiguous(memory_format=_format(x))
    found, *_ = torch.ops.aten.native_group_norm_backward(gradient, x, mean, rstd, weight, *_sizes(x), groups, wanted)
    return cast(Tensor, found)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x[0, 0].numel()


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and _takes_channels_last(x.device)
    return torch.channels_last if last else torch.contiguous_format


def _takes_channels_last(device: torch.device) -> bool:
    """Whether PyTorch has a normalization of maps whose channels lie last; GPUs' refuses them."""
    return device.type == "cpu"
