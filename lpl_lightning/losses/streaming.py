r"""The loss and its gradient at the estimates, a chunk of samples at a time.

The loss is a sum over samples, and nothing behind it is trained but what :math:`\hat z_0` came from. So
:math:`\partial L_i / \partial \hat z_{0,i}` can be taken along with :math:`L_i`, while the decoder's activations for
sample i are at hand, and the backward pass only multiplies it by what reaches the loss: two partial passes of the
decoder and one for the gradient of its input, the least there is, and activations of one chunk however large the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lpl_lightning.losses.comparison import Compared, Comparison, Part
from lpl_lightning.memory import is_out_of_memory, say_halved

__all__ = ["Features", "activation_bytes", "attach_gradient", "chunk_for", "compare_whole", "on_device_of", "stream"]

Features = Callable[[Tensor, Sequence[str]], list[Tensor]]
"""From latents (n, C, *positions) to the feature maps of the stages named."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def stream(
    features: Features,
    comparison: Comparison,
    z0_hat: Tensor,
    z0: Tensor,
    parts: Sequence[Part],
    chunk_size: int,
    fill: bool = False,
    diagnose: bool = False,
    with_gradient: bool = True,
    too_large: Callable[[int], None] = lambda size: None,
) -> tuple[Compared, Tensor | None]:
    """Compare latents a chunk at a time.

    Args:
        features: The decoder.
        comparison: What compares its maps.
        z0_hat: Estimates (n, C, *positions).
        z0: Clean latents, likewise.
        parts: What is compared of which samples, no sample twice.
        chunk_size: Most samples in a chunk.
        fill: Whether to fill chunks up to that size with copies.
        diagnose: See ``Comparison``.
        with_gradient: Whether to take the gradient.
        too_large: Is told the size of a chunk that did not fit in memory.

    Returns:
        What was found of the n samples, without a graph, and the gradient of each one's loss at ``z0_hat``, at least
        float32 and zero where something is not finite; None without.

    Raises:
        ValueError: No gradient passes through the decoder.
        RuntimeError: A single sample is too large for memory. Chunks of more are halved.
    """
    wide = torch.promote_types(z0_hat.dtype, torch.float32)
    total = comparison.nothing(len(z0), z0_hat)
    gradient = torch.zeros_like(z0_hat, dtype=wide) if with_gradient else None
    for part in parts:
        todo = torch.arange(len(z0)) if part.samples is None else part.samples
        while len(todo):
            count = math.ceil(len(todo) / math.ceil(len(todo) / chunk_size))
            copies = chunk_size - count if fill else 0
            rows = on_device_of(z0, torch.cat([todo[:count], todo[:1].expand(copies)]))
            estimates, clean = z0_hat[rows].to(wide), z0[rows]
            try:
                found, found_gradient = _compare(features, comparison, estimates, clean, part, diagnose, with_gradient)
            except RuntimeError as error:
                if not is_out_of_memory(error) or count + copies == 1:
                    raise
                found = None
            if found is None:
                # Not above, where the error still holds what its frames held.
                too_large(count + copies)
                chunk_size = math.ceil((count + copies) / 2)
                say_halved("LPL", count + copies, chunk_size)
                continue
            total.put(rows[:count], found.of(count))
            if gradient is not None and found_gradient is not None:
                gradient[rows[:count]] = found_gradient[:count]
            todo = todo[count:]
    return total, gradient


def _compare(
    features: Features,
    comparison: Comparison,
    z0_hat: Tensor,
    z0: Tensor,
    part: Part,
    diagnose: bool,
    with_gradient: bool,
) -> tuple[Compared, Tensor | None]:
    """Compare one chunk; its gradient is that of the whole latents also where a crop is compared."""
    leaf = z0_hat.requires_grad_(with_gradient)
    with torch.set_grad_enabled(with_gradient):
        targets, predictions = _decode(features, leaf, z0, part)
    device = z0.device.type
    narrow = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    with torch.autocast(device, enabled=False):
        found, map_gradients = comparison(part, (leaf, z0), predictions, targets, diagnose, with_gradient)
        if not with_gradient:
            return found, None
        gradient = _pull_back(predictions, map_gradients, leaf, narrow)
        finite = gradient.isfinite().flatten(1).all(dim=1)
        found.finite[-1] = finite
        kept = found.finite.all(dim=0).view(-1, *[1] * (z0.ndim - 1))
        # A zero passed back through what is not finite comes out as not a number.
        return found, torch.where(kept, gradient, torch.zeros_like(gradient))


def compare_whole(
    features: Features,
    comparison: Comparison,
    z0_hat: Tensor,
    z0: Tensor,
    parts: Sequence[Part],
    diagnose: bool = False,
) -> Compared:
    """Compare latents all at once; a graph that can be differentiated twice connects what was found to ``z0_hat``.

    Args:
        features: See ``stream``.
        comparison: See ``stream``.
        z0_hat: See ``stream``.
        z0: See ``stream``.
        parts: See ``stream``.
        diagnose: See ``Comparison``.
    """
    total = comparison.nothing(len(z0), z0_hat)
    values = total.parts
    for part in parts:
        rows = on_device_of(z0, torch.arange(len(z0)) if part.samples is None else part.samples)
        estimates, clean = z0_hat[rows], z0[rows]
        targets, predictions = _decode(features, estimates, clean, part)
        with torch.autocast(z0.device.type, enabled=False):
            found, _ = comparison(part, (estimates, clean), predictions, targets, diagnose)
        values = values.index_add(1, rows, found.parts)
        total.put(rows, replace(found, parts=found.parts.detach()))
    return replace(total, parts=values)


def _decode(features: Features, z0_hat: Tensor, z0: Tensor, part: Part) -> tuple[list[Tensor], list[Tensor]]:
    """Feature maps of the clean latents, without a graph, and of the estimates."""
    region = (slice(None), slice(None), *(() if part.crop is None else part.crop.window))
    with torch.no_grad():
        targets = features(z0[region], part.names)
    maps = features(z0_hat[region], part.names)
    if torch.is_grad_enabled() and z0_hat.requires_grad:
        _check_connected(part.names, maps)
    return targets, maps


def _check_connected(names: Sequence[str], maps: Sequence[Tensor]) -> None:
    """Refuse maps without a graph."""
    for name, found in zip(names, maps, strict=True):
        if not found.requires_grad:
            raise ValueError(
                f"`autoencoder` lets no gradient pass from its stage {name!r} to the latents, so that LPL would train "
                "nothing. Take what cuts it (torch.no_grad, inference_mode, detach, rounding) out of what decodes."
            )


def _pull_back(maps: Sequence[Tensor], gradients: Sequence[Tensor | None], leaf: Tensor, narrow: bool) -> Tensor:
    """From gradients at maps to that at the latents (n, ...) that they were made of, where it is float16 or narrow."""
    pairs = [(m, g) for m, g in zip(maps, gradients, strict=True) if g is not None and m.requires_grad]
    if not pairs:
        return torch.zeros_like(leaf)
    scale = leaf.new_ones(len(leaf))
    if narrow or any(m.dtype == torch.float16 for m, _ in pairs):
        # Such gradients lie below most of what float16 holds: bring each sample's largest to about one.
        largest = torch.stack([g.flatten(1).abs().amax(dim=1) for _, g in pairs]).amax(dim=0)
        scale = torch.exp2(-torch.log2(largest.clamp_min(1e-30)).ceil())
        pairs = [(m, g * scale.view(-1, *[1] * (g.ndim - 1))) for m, g in pairs]
    scaled = [g.to(m.dtype) for m, g in pairs]
    (gradient,) = torch.autograd.grad([m for m, _ in pairs], leaf, scaled)
    return gradient / scale.view(-1, *[1] * (gradient.ndim - 1))


def attach_gradient(values: Tensor, z0_hat: Tensor, gradient: Tensor) -> Tensor:
    """Connect values of samples to what they were computed from.

    Args:
        values: (n,) without a graph.
        z0_hat: (n, ...) what they are functions of, each of its own row.
        gradient: (n, ...) their derivatives.

    Returns:
        (n,) the values. Their gradient at ``z0_hat`` cannot be differentiated again.
    """
    return cast(Tensor, _WithGradient.apply(z0_hat, values, gradient))


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z0_hat: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(z0_hat, gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, by_values: Tensor) -> tuple[Tensor, None, None]:
        z0_hat, gradient = ctx.saved_tensors
        found = by_values.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1)) * gradient
        return _Final.apply(found.to(z0_hat.dtype), z0_hat), None, None


class _Final(torch.autograd.Function):
    """A gradient that says why it has none itself."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, z0_hat: Tensor) -> Tensor:
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "The gradient of the Latent Perceptual Loss cannot be differentiated again: it was taken a chunk of "
            "samples at a time, and no graph of it is kept. Give LatentPerceptualLoss execution={'streamed': False}."
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def activation_bytes(features: Features, z: Tensor, names: Sequence[str], decoder: nn.Module) -> int:
    """What a sample takes in memory while its gradient is taken: what the graph holds, and its maps thrice.

    Args:
        features: The decoder.
        z: Latents (n, C, *positions), of which the first is decoded.
        names: Stages whose maps are compared.
        decoder: The module whose weights are there anyway.

    Raises:
        ValueError: No gradient passes through the decoder.
    """
    # Not the tensors: they would hold the graph, and it them, to the end of the process.
    held: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage

    # Out of inference mode too, whose tensors take no gradient.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = z[:1].detach().clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: leaf):
            maps = features(leaf, names)
    _check_connected(names, maps)
    for tensor in (*decoder.parameters(), *decoder.buffers()):  # not before, since the first pass may lay them out anew
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in held.values()) + 3 * sum(m.numel() * m.element_size() for m in maps)


def chunk_for(bytes_per_sample: int, device: torch.device) -> int:
    """How many samples of that size to take at once."""
    limit = 2**28
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = min(2**32, (free + cached) // 4)
    return max(1, limit // max(1, bytes_per_sample))


def on_device_of(z: Tensor, values: Tensor) -> Tensor:
    """Values on the device of latents; nothing waits for a copy to an accelerator."""
    return values.to(z.device, non_blocking=z.device.type != "cpu")
