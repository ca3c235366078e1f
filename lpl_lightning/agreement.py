"""What the parts of a run must agree on before time is spent: encoders with cached data, weights with the precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from typing import Any

from torch import nn

from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.captions import Captions
from lpl_lightning.conditioning import Conditioner
from lpl_lightning.frozen import weights_hash

__all__ = ["autoencoder_fingerprint", "check_encoded", "check_precision"]


def autoencoder_fingerprint(autoencoder: Autoencoder) -> str:
    """A hash of all that latents depend on but the precision: class, weights, scale and shift."""
    numbers = [f"{x:.6g}" for part in (autoencoder.scale, autoencoder.shift) for x in part.flatten().tolist()]
    said = f"{type(autoencoder.model).__name__} {weights_hash(autoencoder.model)} {numbers}"
    return blake2b(said.encode(), digest_size=16).hexdigest()


def check_encoded(data: Any, autoencoder: Autoencoder, conditioner: Conditioner) -> None:
    """Refuse latents and embeddings that others than a model's parts have made.

    Args:
        data: The data module; one with ``encoded_by`` says what made its latents.
        autoencoder: The model's.
        conditioner: The model's.

    Raises:
        ValueError: They are of another autoencoder, or of other text encoders.
    """
    by: Mapping[str, str | None] = getattr(data, "encoded_by", {})
    own: dict[str, Callable[[], str]] = {"autoencoder": lambda: autoencoder_fingerprint(autoencoder)}
    if isinstance(conditioner, Captions):
        own["text"] = conditioner.embedding_key
    for part, found in by.items():
        if found is not None and part in own and (used := own[part]()) != found:
            what = {"autoencoder": "another autoencoder", "text": "other text encoders"}[part]
            raise ValueError(
                f"`data`: what {data.root} holds was made by {what} than the model's: weights, scale or settings "
                f"differ ({found} there, {used} here). Give the model what made it, or encode anew by `lpl encode`."
            )


def check_precision(parameters: Iterable[nn.Parameter], precision: str) -> None:
    """Refuse to train weights in 16 bits by accident.

    Args:
        parameters: The model's.
        precision: The trainer's.

    Raises:
        ValueError: Some that are trained have 16 bits, and the trainer was not told to.
    """
    coarse = {str(p.dtype) for p in parameters if p.requires_grad and p.dtype.itemsize < 4}
    if coarse and precision not in ("bf16-true", "16-true"):
        raise ValueError(
            f"Weights in {', '.join(sorted(coarse))} are to be trained, in which small steps are lost. Leave `dtype` "
            f"of the denoiser out and set the trainer's `precision` (now {precision}) to bf16-mixed, or train LoRA."
        )
