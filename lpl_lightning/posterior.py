"""What a model's ``encode`` gives for images: a latent, or the mean and the standard deviation of a posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lpl_lightning.draws import Generators, normal
from lpl_lightning.memory import Halving

__all__ = ["ImageEncoder", "drawn", "joined", "moments"]


class ImageEncoder:
    """Runs a model's ``encode`` outside autocast, in parts where memory asks for it; what came first is looked at."""

    def __init__(self) -> None:
        self._halving = Halving()
        self._looked = False

    def __call__(self, model: nn.Module, images: Tensor) -> Any:
        """Encode.

        Args:
            model: The autoencoder.
            images: (B, C, ...) as it takes them.

        Returns:
            What ``drawn`` and ``moments`` take.

        Raises:
            ValueError: It cannot encode, or gives what is none of these.
        """
        if not hasattr(model, "encode"):
            raise ValueError(f"`model` must have `encode` to map images to latents; {type(model).__name__} has none.")
        with torch.autocast(images.device.type, enabled=False):
            found = self._halving("Encoder", cast(Any, model).encode, images, joined)
        if not self._looked:  # not each time, since an accelerator would be waited for
            _check(*moments(found))
            self._looked = True
        return found


def drawn(encoded: Any, sample: bool, generator: Generators | None = None) -> Tensor:
    """Find the latent in what a model's ``encode`` gives.

    Args:
        encoded: A tensor, a pair (mean, standard deviation), an output of diffusers, or a posterior with ``mean`` and
            ``std``.
        sample: Whether to draw from a posterior or to take its mode.
        generator: Source of the posterior's noise, one or one a sample.

    Returns:
        (B, C, ...), unscaled.

    Raises:
        ValueError: It is none of these.
    """
    if hasattr(encoded, "latent_dist"):
        posterior = encoded.latent_dist
        return cast(Tensor, posterior.sample(generator) if sample else posterior.mode())
    mean, deviation = moments(encoded)
    if not sample or deviation is None:
        return mean
    return mean + deviation * normal(mean.shape, generator, mean.device, mean.dtype)


def moments(encoded: Any) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation, unscaled, in what a model's ``encode`` gives; None for a latent that is certain.

    Raises:
        ValueError: It is none of what ``drawn`` takes.
    """
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode(), encoded.latent_dist.std
    z = getattr(encoded, "latents", getattr(encoded, "latent", encoded))
    if isinstance(z, Tensor):
        return z, None
    if isinstance(z, tuple | list) and len(z) == 2 and all(isinstance(part, Tensor) for part in z):
        return z[0], z[1]
    mean, deviation = getattr(encoded, "mean", None), getattr(encoded, "std", None)
    if isinstance(mean, Tensor) and isinstance(deviation, Tensor):
        return mean, deviation
    raise ValueError(
        "`model.encode` must give a tensor, a pair (mean, standard deviation), a posterior with mean and std or an "
        f"output of diffusers with latent_dist, latents or latent; got {type(encoded).__name__}. Give a module whose "
        "`encode` does."
    )


def joined(parts: Sequence[Any]) -> Tensor | tuple[Tensor, Tensor]:
    """What a model's ``encode`` gives for parts of a batch, put together as ``drawn`` and ``moments`` take it."""
    means, deviations = zip(*map(moments, parts), strict=True)
    return torch.cat(means) if deviations[0] is None else (torch.cat(means), torch.cat(deviations))


def _check(mean: Tensor, deviation: Tensor | None) -> None:
    """Refuse a pair that is none of mean and standard deviation."""
    if deviation is None:
        return
    wanted = "`model.encode` must give a pair (mean, standard deviation), or the latent alone"
    if deviation.shape != mean.shape:
        raise ValueError(f"{wanted}; got a pair of shapes {tuple(mean.shape)} and {tuple(deviation.shape)}.")
    if bool((deviation < 0).any()):
        raise ValueError(
            f"{wanted}; got a pair whose second goes down to {deviation.min().item():.4g}. If it is the logarithm of "
            "the variance, return `mean, (0.5 * log_variance).exp()`."
        )
