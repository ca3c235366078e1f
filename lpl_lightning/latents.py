r"""What an autoencoder's latents are: channels, scale and shift, and how images and latents reach the model.

:math:`z = (F^e(x) - shift) \cdot scale`, with ``shift_factor`` and ``scaling_factor`` of the model's config, or with
``latents_mean`` and ``latents_std`` per channel, as diffusers' pipelines do. The numbers are kept as Python floats, so
that a float64 model gets 0.13025 and not the float32 next to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from math import inf, isfinite
from typing import Any, cast

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderRAE,
    AutoencoderTiny,
    VQModel,
)
from torch import Tensor, nn

__all__ = ["LatentSpace", "config_of", "latent_space"]


_FRAMES = "temporal_compression_ratio"


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class LatentSpace:
    """What is known of a model's latents and images; None where the model does not say.

    Attributes:
        channels: C of the latents.
        downscale: Side of an image over the side of its latent.
        rank: Dimensions of a latent: 4 for images (B, C, h, w), 5 for video (B, C, T, h, w).
        image_channels: Channels of an image.
        image_size: The one side that an image may have.
        frame_step: Videos have one frame more than a multiple of this.
        is_video: Whether the first of its positions are frames.
        scales_itself: Whether the model gives and takes latents as they are scaled.
        shift: What is taken from an encoded image, one number or one per channel.
        scale: What it is then multiplied by, likewise.
        pack: From what the model encodes to, to the latent before shift and scale.
        unpack: Back.
        images_in: From images in [-1, 1] to those the model takes.
        images_out: Back.
    """

    channels: int | None = None
    downscale: int | None = None
    rank: int | None = None
    image_channels: int | None = None
    image_size: int | None = None
    frame_step: int | None = None
    is_video: bool = False
    scales_itself: bool = False
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    pack: Callable[[Tensor], Tensor] = _same
    unpack: Callable[[Tensor], Tensor] = _same
    images_in: Callable[[Tensor], Tensor] = _same
    images_out: Callable[[Tensor], Tensor] = _same

    def rescaled(
        self, scale: float | Sequence[float] | None = None, shift: float | Sequence[float] | None = None
    ) -> LatentSpace:
        """Put another scale or shift in place, each one number or one per channel.

        Raises:
            ValueError: Another number of them than channels, or a scale that is zero, infinite or not a number; or the
                model's own are such, and none are given; or the model scales its latents itself.
        """
        if self.scales_itself and not (scale is None and shift is None):
            raise ValueError(
                "`scaling_factor` and `shift_factor` must be left out: the model scales its latents itself. Set its "
                "config's `scaling_factor`, `latents_mean` and `latents_std`."
            )
        new: dict[str, tuple[float, ...]] = {}
        for argument, field, value in (("scaling_factor", "scale", scale), ("shift_factor", "shift", shift)):
            numbers = new[field] = getattr(self, field) if value is None else _numbers(value)
            whose = ", of the model's config" if value is None else ""
            if len(numbers) not in {1, self.channels or len(numbers)}:
                raise ValueError(
                    f"`{argument}` must be one number or one for each of the {self.channels} channels of the latents, "
                    f"got {len(numbers)}{whose}."
                )
            if not all(map(isfinite, numbers)) or (field == "scale" and 0.0 in numbers):
                got = numbers if value is None else value
                raise ValueError(f"`{argument}` must be finite{' and not 0' * (field == 'scale')}, got {got}{whose}.")
        return replace(self, **cast(Any, new))

    def check_latents(self, z: Tensor) -> None:
        """Refuse latents of another rank or number of channels.

        Raises:
            ValueError: They are not (B, C, ...) as the model has them.
        """
        if z.ndim < 2 or (self.rank or z.ndim) != z.ndim or (self.channels or z.shape[1]) != z.shape[1]:
            positions = {4: ", h, w", 5: ", T, h, w"}.get(self.rank or 0, ", ...")
            raise ValueError(
                f"`z` must be (B, {self.channels or 'C'}{positions}), latents of this autoencoder; "
                f"got {tuple(z.shape)}. Was it encoded by another one?"
            )

    def check_images(self, images: Tensor) -> None:
        """Refuse images that the encoder cannot take, or would cut or resize.

        Raises:
            ValueError: Another rank, number of channels, size or number of frames, or whole numbers.
        """
        if not images.is_floating_point():
            raise ValueError(
                f"`images` must be floating-point in [-1, 1], got {images.dtype}: bring pixels to that range."
            )
        shape = tuple(images.shape)
        channels = self.image_channels or "C"
        layout = {4: f"{channels}, H, W", 5: f"{channels}, T, H, W"}.get(self.rank or 0, f"{channels}, ...")
        sides = shape[-2:] if self.is_video else shape[2:]
        if self.image_size is not None:
            wanted, fits = f"sides of {self.image_size}", all(side == self.image_size for side in sides)
        else:
            factor = self.downscale or 1
            wanted, fits = "H and W" if self.rank else "sides", not any(side % factor for side in sides)
            wanted += f" divisible by {factor}, the autoencoder's downscaling"
        if self.frame_step is not None:
            wanted += f", and T one more than a multiple of {self.frame_step}"
            fits = fits and len(shape) == 5 and shape[2] % self.frame_step == 1
        right_rank = len(shape) == self.rank if self.rank else len(shape) > 2
        if not (right_rank and fits and shape[1] == (self.image_channels or shape[1])):
            raise ValueError(
                f"`images` must be (B, {layout}) with {wanted}; got {shape}. Choose another `image_size`"
                + (" or number of frames." if self.is_video else ".")
            )

    def checked(self, z: Tensor, images: Tensor) -> Tensor:
        """A latent as it is, refused where it is not that of images.

        Raises:
            ValueError: Its channels or sides are not those that are known.
        """
        # How many frames of latents there are to those of a video, each model has a rule of its own for.
        kept = slice(-2 if self.is_video else 2, None)
        sides = tuple(side // (self.downscale or 1) for side in images.shape[kept])
        fits = self.downscale is None or tuple(z.shape[kept]) == sides
        if not fits or len(z) != len(images) or z.shape[1] != (self.channels or z.shape[1]):
            wanted = (len(images), self.channels, *["T"] * self.is_video, *sides)
            raise ValueError(
                f"`model.encode` of images {tuple(images.shape)} must give latents {wanted}, of {self.channels} "
                f"channels with a downscaling of {self.downscale}; got {tuple(z.shape)}."
            )
        return z


def config_of(model: nn.Module) -> Mapping[str, Any]:
    """The config of a diffusers model, or an empty one: other modules need not have any."""
    config = getattr(model, "config", None)
    return config if isinstance(config, Mapping) else {}


@singledispatch
def latent_space(model: nn.Module) -> LatentSpace:
    """Read from a model's config what its latents are.

    Register a function for a class that says it in another way with ``@latent_space.register``.

    Args:
        model: An autoencoder. One without a config has scale 1, shift 0 and all else unknown.
    """
    config = config_of(model)
    levels = config.get("block_out_channels")
    return _space(
        model,
        channels=config.get("latent_channels", vars(model).get("latent_channels")),
        downscale=vars(model).get("spatial_compression_ratio") or (2 ** (len(levels) - 1) if levels else None),
        rank=None,
        image_channels=None,
        # What diffusers' autoencoders of videos say, in one place or the other.
        is_video=(vars(model).get(_FRAMES) or config.get(_FRAMES) or 1) > 1,
    )


def _space(model: nn.Module, **known: Any) -> LatentSpace:
    """Shift, scale and channels as most configs have them, with what is ``known`` better."""
    config, buffers = config_of(model), dict(model.named_buffers(recurse=False))
    mean, std = (config.get(name, buffers.get(name)) for name in ("latents_mean", "latents_std"))
    shift, scale = _numbers(config.get("shift_factor") or 0.0), _numbers(config.get("scaling_factor") or 1.0)
    if mean is not None and std is not None:
        shift, scale = _numbers(mean), tuple(scale[0] / value if value else inf for value in _numbers(std))
    found: dict[str, Any] = {
        "channels": config.get("latent_channels"),
        "rank": 4,
        "image_channels": config.get("in_channels"),
        "shift": shift,
        "scale": scale,
    }
    return LatentSpace(**(found | known))


def _numbers(value: float | Sequence[float] | Tensor) -> tuple[float, ...]:
    # Not on a default device, such as the one without data that models are counted on.
    numbers = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
    return tuple(numbers.double().flatten().tolist())


@latent_space.register(AutoencoderKL)
@latent_space.register(AutoencoderTiny)
def _(model: AutoencoderKL | AutoencoderTiny) -> LatentSpace:
    return _space(model, downscale=2 ** (len(config_of(model)["block_out_channels"]) - 1))


@latent_space.register
def _(model: AsymmetricAutoencoderKL) -> LatentSpace:
    return _space(model, downscale=2 ** (len(config_of(model)["down_block_out_channels"]) - 1))


@latent_space.register
def _(model: AutoencoderDC) -> LatentSpace:
    return _space(model, downscale=2 ** (len(config_of(model)["encoder_block_out_channels"]) - 1))


@latent_space.register
def _(model: VQModel) -> LatentSpace:
    """Latents are continuous, as they are before quantization: the decoder quantizes them."""
    config = config_of(model)
    channels = config.get("vq_embed_dim") or config["latent_channels"]
    return _space(model, channels=channels, downscale=2 ** (len(config["block_out_channels"]) - 1))


@latent_space.register
def _(model: AutoencoderKLFlux2) -> LatentSpace:
    """Latents are what FLUX.2 sees: 2 x 2 patches as channels, then normalized by ``bn``'s running statistics."""
    config = config_of(model)
    mean, variance = (_numbers(statistic) for statistic in (model.bn.running_mean, model.bn.running_var))
    return _space(
        model,
        channels=4 * config["latent_channels"],
        downscale=2 * 2 ** (len(config["block_out_channels"]) - 1),
        shift=mean,
        scale=tuple((value + config["batch_norm_eps"]) ** -0.5 for value in variance),
        pack=_patchify,
        unpack=_unpatchify,
    )


def _patchify(z: Tensor) -> Tensor:
    """(B, C, h, w) to (B, 4C, h / 2, w / 2); channel 4c + 2i + j is row i, column j of each patch of channel c."""
    return nn.functional.pixel_unshuffle(z, 2)


def _unpatchify(z: Tensor) -> Tensor:
    return nn.functional.pixel_shuffle(z, 2)


@latent_space.register(AutoencoderKLWan)
@latent_space.register(AutoencoderKLQwenImage)
def _(model: AutoencoderKLWan | AutoencoderKLQwenImage) -> LatentSpace:
    """Video: (B, 3, 1 + 4n, H, W). The encoder takes four frames at a time after the first and drops what is left."""
    config = config_of(model)
    patch = config.get("patch_size") or 1
    return _space(
        model,
        channels=config["z_dim"],
        downscale=2 ** (len(config["dim_mult"]) - 1) * patch,
        rank=5,
        image_channels=config.get("input_channels", config.get("in_channels", 3) // patch**2),
        frame_step=4,
        is_video=True,
    )


@latent_space.register
def _(model: AutoencoderRAE) -> LatentSpace:
    """It scales its latents itself, so that nothing is left to do here, and its images are in [0, 1]."""
    config = config_of(model)
    if not config["reshape_to_2d"]:
        raise ValueError(
            "`model` is an AutoencoderRAE with reshape_to_2d=False, whose latents are tokens (B, N, C); latents here "
            "are maps (B, C, h, w). Load it with reshape_to_2d=True."
        )
    grid = config["encoder_input_size"] // config["encoder_patch_size"]
    return _space(
        model,
        channels=config["encoder_hidden_size"],
        downscale=config["patch_size"],
        image_channels=config["num_channels"],
        image_size=grid * config["patch_size"],
        scales_itself=True,
        shift=(0.0,),
        scale=(1.0,),
        images_in=_to_unit,
        images_out=_from_unit,
    )


def _to_unit(images: Tensor) -> Tensor:
    return images / 2 + 0.5


def _from_unit(images: Tensor) -> Tensor:
    return images * 2 - 1
