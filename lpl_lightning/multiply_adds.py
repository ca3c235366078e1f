"""What parts of a model cost, in multiply-adds of matrix products and convolutions, counted without computing any.

Parts run on tensors of the ``meta`` device, which have shapes and no values, so that a count takes a fraction of a
second however large the model. Of norms, activations and masks it knows nothing: it is an estimate, and no measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.conditioning import Condition, Conditioner
from lpl_lightning.denoiser import Denoiser
from lpl_lightning.feature_modules import run_to_modules

__all__ = ["TOKENS", "of_decoder", "of_denoiser", "of_encoder"]

TOKENS = 77
"""Of a caption, where its conditioner is not run."""


class _Counted(TorchDispatchMode):
    """Adds up what operations cost by torch's own formulas, at two operations a multiply-add."""

    operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        return out


class _Run(nn.Module):
    """A module whose call is anything that is done with it."""

    def __init__(self, module: nn.Module, call: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, given: Tensor) -> object:
        """Do it."""
        return self.call(given)


def of_encoder(autoencoder: Autoencoder, images: tuple[int, ...]) -> int | None:
    """Multiply-adds of encoding images of this shape (B, 3, H, W); None where they cannot be counted."""
    space = autoencoder.space
    return _count(
        autoencoder.model, lambda x: autoencoder.model.encode(space.images_in(x)), _meta(images, autoencoder.dtype)
    )


def of_decoder(autoencoder: Autoencoder, latents: tuple[int, ...], wanted: Collection[str]) -> int | None:
    """Multiply-adds of a decoder up to the deepest of the maps wanted; None where they cannot be counted.

    Args:
        autoencoder: The autoencoder.
        latents: Shape (B, C, ...) of the latents.
        wanted: Names of maps, as ``Autoencoder.features`` takes them.
    """

    def decode(z: Tensor) -> None:
        current: Any = autoencoder.space.unpack(z)
        if not autoencoder.in_stages:
            run_to_modules(autoencoder.model, autoencoder.feature_names, wanted, current)
            return
        left = set(wanted)
        for stage in autoencoder.stages:
            if not left:
                return
            current = stage.run(current)
            left.discard(stage.name)

    return _count(autoencoder.model, decode, _meta(latents, autoencoder.dtype)) if wanted else 0


def of_denoiser(denoiser: Denoiser, latents: tuple[int, ...], conditioner: Conditioner) -> int | None:
    """Multiply-adds of a prediction for one latent; None where they cannot be counted.

    Args:
        denoiser: The denoiser.
        latents: Shape (1, C, ...) of the latents.
        conditioner: What makes its conditions. Only one of classes is run; captions have ``TOKENS`` tokens.
    """
    if conditioner.num_classes is not None:
        with torch.no_grad():
            made = conditioner({}, 1, torch.ones(1, dtype=torch.bool))
        parts = {name: value for name, value in vars(made).items() if value is not None}
        condition = Condition(**{name: value.to("meta") for name, value in parts.items()})
    else:
        shape = conditioner.gives
        condition = Condition(
            tokens=None if shape.token_dim is None else _meta((1, TOKENS, shape.token_dim), torch.float32),
            pooled=None if shape.pooled_dim is None else _meta((1, shape.pooled_dim), torch.float32),
            time_ids=_meta((1, 6), torch.float32) if shape.time_ids else None,
        )
    times = _meta((latents[0],), torch.float32)
    return _count(denoiser, lambda z: denoiser(z, times, condition), _meta(latents, torch.float32))


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _count(module: nn.Module, call: Callable[[Tensor], object], given: Tensor) -> int | None:
    own = _Run(module, call)
    tensors = {
        name: _meta(tuple(tensor.shape), tensor.dtype)
        for name, tensor in [*own.named_parameters(), *own.named_buffers()]
    }
    counted: Any = cast(Any, _Counted)()
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            counted,
        ):
            functional_call(own, tensors, (given,))
    except Exception:  # whatever anyone's network raises at tensors without values
        return None
    return int(counted.operations) // 2
