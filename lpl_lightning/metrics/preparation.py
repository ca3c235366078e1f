"""What happens to an image before a feature network sees it: 8 bits, size, normalization.

These steps move a metric by more than many methods do (Parmar et al., 2022, "On Aliased Resizing and Surprising
Subtleties in GAN Evaluation"), so that each is named and becomes part of a value's provenance. Images are rounded to 8
bits first: a set scores the same from memory and from the files that it is written to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from lpl_lightning.arguments import at_least

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Filter", "Fit", "Pixels", "Preparation", "check_images"]

Filter = Literal["bilinear", "bicubic"]
Fit = Literal["crop", "stretch"]
Pixels = Literal["normalized", "uint8"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's images in [0, 1], per channel, as classifiers are trained with."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their standard deviation."""

_TOLERANCE = 1e-3  # what rounding to bfloat16 and back adds to a value of 1


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of images in [-1, 1].

    Args:
        images: To be (B, 3, H, W), floating point, B >= 1.

    Raises:
        ValueError: Another shape, kind or range, or values that are not finite.
    """
    wanted = "`images` must be (B, 3, H, W) floating point in [-1, 1]"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{wanted}, got {kind}. For 8 bits give `images.float() / 127.5 - 1`.")
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(
            f"{wanted}, got the shape {tuple(images.shape)}. Convert grey and RGBA images to RGB first, and give one "
            "image as a batch of one."
        )
    low, high = (float(value) for value in images.detach().aminmax())
    if not low >= -1 - _TOLERANCE or not high <= 1 + _TOLERANCE:  # written so that NaN is refused too
        bad = int((~images.isfinite()).any(dim=(1, 2, 3)).sum())
        what = f"{bad} of {len(images)} images with values that are not finite" if bad else f"[{low:g}, {high:g}]"
        raise ValueError(f"{wanted}, got {what}. Clamp what a decoder gives; look for NaN in the weights or latents.")


@dataclass(frozen=True)
class Preparation:
    """From images in [-1, 1] to the input of a feature network.

    Attributes:
        size: Side that images are resized to, in pixels; None leaves them as they are.
        resize: Filter, where images have another size.
        antialias: Widen the filter by the factor of shrinking, as PIL does. It changes nothing in enlarging, except
            that bicubic is Catmull-Rom's (-0.5) with it and -0.75 without.
        fit: ``crop`` resizes the shorter side and takes the middle; ``stretch`` resizes both.
        mean: What is subtracted from pixels in [0, 1], per channel.
        std: What they are divided by then.
        pixels: ``normalized`` applies ``mean`` and ``std``; ``uint8`` hands over 0 .. 255 for a network that
            normalizes its input itself.
    """

    size: int | None = None
    resize: Filter = "bilinear"
    antialias: bool = True
    fit: Fit = "crop"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    pixels: Pixels = "normalized"

    def __post_init__(self) -> None:
        if self.size is not None:
            at_least(1, size=self.size)
        for name, kind in (("resize", Filter), ("fit", Fit), ("pixels", Pixels)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"`{name}` must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}.")
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                above = " above 0" if name == "std" else ""
                raise ValueError(f"`{name}` must be three numbers{above}, one a channel, got {values}.")
            object.__setattr__(self, name, values)

    def given(self, **settings: Any) -> Preparation:
        """The same with other settings, of which those that are None are left alone."""
        return replace(self, **{name: value for name, value in settings.items() if value is not None})

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare images.

        Args:
            images: (B, 3, H, W) in [-1, 1]; see ``check_images``.

        Returns:
            (B, 3, h, w) float32, normalized, or uint8.
        """
        x = ((images.float() + 1) * 127.5).round().clamp(0, 255)
        if self.size is not None:
            x = self._resized(x, self.size)
        if self.pixels == "uint8":
            return x.round().to(torch.uint8)
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (x / 255 - mean) / std

    def _resized(self, x: Tensor, side: int) -> Tensor:
        mode = transforms.InterpolationMode[self.resize.upper()]
        to = [side] if self.fit == "crop" else [side, side]
        x = transforms.resize(x, to, interpolation=mode, antialias=self.antialias)
        x = x.clamp(0, 255)  # bicubic overshoots at edges, where 8 bits clip
        return cast(Tensor, transforms.center_crop(x, [side, side]))

    def provenance(self) -> Mapping[str, str | int | bool]:
        """The settings, as they stand beside a value."""
        normalized = f"mean {self.mean}, std {self.std} of [0, 1]"
        return {
            "input_size": self.size or "as it is",
            "resize": f"{self.resize}, {self.fit}" if self.size else "none",
            "antialias": self.antialias if self.size else False,
            "normalization": normalized if self.pixels == "normalized" else "by the network, of 8 bits",
        }
