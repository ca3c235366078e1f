"""A module that training takes as it is: never trained, never saved, never in a lower precision than it came in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

from torch import Tensor, nn

__all__ = ["FrozenModule"]


class FrozenModule(nn.Module):
    """A module in eval mode without trainable parameters, which keeps itself out of any state dict.

    It keeps the precision it has when the module around it is put in a lower one, as a trainer may do, and follows it
    to a higher one and to another device. A strict load finds its own weights in place of those that no checkpoint
    holds. Subclasses freeze the parameters that they take, with ``requires_grad_(False)``.
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
        return apply(follow, recurse)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever is asked."""
        return super().train(False)

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
