"""Square crops of images, and the record of where they were taken.

SDXL is conditioned on the size that an image had and on the place of its crop (Podell et al., 2023, section 2.2).
Both are recorded here in pixels, height or top before width or left. An image that is mirrored counts as mirrored
before it is cropped, as in diffusers' training scripts: ``left`` is measured from what is its left side then.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lpl_lightning.data.base import to_unit_range

__all__ = ["Crop", "Interpolation", "SquareCrop"]

Crop = Literal["center", "random"]
Interpolation = Literal["bilinear", "bicubic", "lanczos"]


class SquareCrop:
    """Resizes the shorter side of an image, anti-aliased, up or down, and crops the rest.

    Args:
        image_size: Side of the square, in pixels.
        crop: Which square of the resized image: the centre, or one drawn anew each time.
        horizontal_flip: Mirror half of the images, drawn anew each time.
        interpolation: How to resize.
    """

    def __init__(
        self,
        image_size: int,
        crop: Crop = "center",
        horizontal_flip: bool = False,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        for name, value, choices in (
            ("crop", crop, get_args(Crop)),
            ("interpolation", interpolation, get_args(Interpolation)),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        self.image_size = image_size
        self.resize = v2.Resize(image_size, interpolation=v2.InterpolationMode(interpolation), antialias=True)
        self.random_crop = v2.RandomCrop(image_size) if crop == "random" else None
        self.flip_probability = 0.5 if horizontal_flip else 0.0

    def provenance(self) -> dict[str, str | int | bool]:
        """What is done to images: the shorter side is resized to ``image_size``, and a square of it is taken."""
        return {
            "image_size": self.image_size,
            "resize": self.resize.interpolation.value,
            "antialias": bool(self.resize.antialias),
            "crop": "center" if self.random_crop is None else "random",
        }

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """Make the square.

        Args:
            image: RGB, upright.

        Returns:
            ``image``: (3, S, S) float32 in [-1, 1];
            ``original_size``: (2,) int64, height and width of the image given;
            ``crop_top_left``: (2,) int64, top and left of the square in the resized image.
        """
        size = self.image_size
        original_size = torch.tensor([image.height, image.width])
        resized = self.resize(image)
        height, width = resized.height, resized.width
        if self.random_crop is None:
            # As CenterCrop rounds.
            top, left = round((height - size) / 2), round((width - size) / 2)
        else:
            drawn = self.random_crop.make_params([resized])
            top, left = drawn["top"], drawn["left"]
        square = v2.functional.crop(resized, top, left, size, size)
        # Drawn also where crops are and nothing is mirrored, so that switching it on leaves the crops of a seed as they
        # are; not where nothing is drawn, so that validation leaves what training draws as it is.
        is_drawn = self.random_crop is not None or self.flip_probability > 0
        if is_drawn and torch.rand(1).item() < self.flip_probability:
            square = v2.functional.horizontal_flip(square)
            left = width - size - left
        return {
            "image": to_unit_range(v2.functional.pil_to_tensor(square)),
            "original_size": original_size,
            "crop_top_left": torch.tensor([top, left]),
        }
