"""A module that training takes as it is: never trained, never saved, never in a lower precision than it came in."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

__all__ = ["FrozenModule", "weights_hash"]


class FrozenModule(nn.Module):
    """A module in eval mode without trainable parameters, which keeps itself out of any state dict.

    It keeps the precision it has when the module around it is put in a lower one, as a trainer may do, and follows it
    to a higher one and to another device. A strict load finds its own weights in place of those that no checkpoint
    holds. Subclasses freeze the parameters that they take, with ``requires_grad_(False)``.

    Lightning's ``unfreeze`` and ``requires_grad_`` of a module around it reach its parameters without asking it. They
    are frozen again by ``train``, which the first ends with, and by ``to``, with which a trainer begins.
    """

    def __init__(self) -> None:
        super().__init__()
        cast(Any, self).register_load_state_dict_pre_hook(_keep_own_weights)
        self.train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow to another device and to a higher precision, but not to a lower one."""

        def follow(tensor: Tensor) -> Tensor:
            kind = fn(tensor.new_empty(0))
            wider = kind.dtype.itemsize > tensor.dtype.itemsize
            return fn(tensor) if kind.dtype == tensor.dtype or wider else tensor.to(kind.device)

        apply: Callable[..., Self] = super()._apply
        # Weights moved in inference mode, as by a validation that comes first, could take part in no graph later.
        with torch.inference_mode(False):
            return apply(follow, recurse).requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, and frozen, whatever is asked."""
        return super().train(False).requires_grad_(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Stay frozen whatever is asked."""
        return super().requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Add nothing: the module is an input of the training, not a result."""
        destination: dict[str, Any] | None = args[0] if args else kwargs.get("destination")
        return {} if destination is None else destination


def _keep_own_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Offer the module's own weights to a strict load, since a checkpoint holds none of them."""
    # What a plain module would save: tied weights under each of their names, no buffers that are not persistent.
    nn.Module.state_dict(module, destination=state_dict, prefix=prefix)


def weights_hash(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A blake2b hash of all parameters and buffers: names, shapes and values.

    Values are hashed in float64, so that a file in half precision and its copy in float32 have one hash, and a network
    keeps its own where the trainer runs in double precision.

    Args:
        module: Whose.
        dtype: What floating values are rounded to before; None takes them as they are.
    """
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu()
        values = values.to(dtype).double() if values.is_floating_point() else values.contiguous()
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
