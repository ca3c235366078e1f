"""Crops of images, square or of any size, and the record of where they were taken.

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
from lpl_lightning.data.faults import Unreadable

__all__ = ["CoveringCrop", "Crop", "Interpolation", "SquareCrop", "check_covering"]

Crop = Literal["center", "random"]
Interpolation = Literal["bilinear", "bicubic", "lanczos"]

LARGEST = 2**27
"""Pixels of the largest image that one is resized to: 0.4 GB."""


class CoveringCrop:
    """Resizes an image so that it just covers a size, anti-aliased, up or down, and crops the rest.

    Args:
        crop: Which part of the resized image: the centre, or one drawn anew each time.
        horizontal_flip: Mirror half of the images, drawn anew each time.
        interpolation: How to resize.
    """

    def __init__(
        self, crop: Crop = "center", horizontal_flip: bool = False, interpolation: Interpolation = "bicubic"
    ) -> None:
        for name, value, choices in (
            ("crop", crop, get_args(Crop)),
            ("interpolation", interpolation, get_args(Interpolation)),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        self.crop: Crop = crop
        self.interpolation = v2.InterpolationMode(interpolation)
        self.flip_probability = 0.5 if horizontal_flip else 0.0

    def provenance(self) -> dict[str, str | bool]:
        """What is done to images besides the size that they are brought to."""
        return {"resize": self.interpolation.value, "antialias": True, "crop": self.crop}

    def __call__(self, image: Image.Image, size: tuple[int, int], name: str = "The image") -> dict[str, Tensor]:
        """Make an image of a size.

        Args:
            image: RGB, upright.
            size: Height H and width W, in pixels.
            name: What the image is called in errors.

        Returns:
            ``image``: (3, H, W) float32 in [-1, 1];
            ``original_size``: (2,) int64, height and width of the image given;
            ``crop_top_left``: (2,) int64, top and left of the crop in the resized image.

        Raises:
            Unreadable: The image is so long that what it would be resized to does not fit memory.
        """
        height, width = check_covering(image, size, name)
        resized = v2.functional.resize(image, [height, width], self.interpolation, antialias=True)
        if self.crop == "center":
            # As CenterCrop rounds.
            top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
        else:
            drawn = v2.RandomCrop(size).make_params([resized])
            top, left = drawn["top"], drawn["left"]
        cropped = v2.functional.crop(resized, top, left, *size)
        # Drawn also where crops are and nothing is mirrored, so that switching it on leaves the crops of a seed as they
        # are; not where nothing is drawn, so that validation leaves what training draws as it is.
        is_drawn = self.crop == "random" or self.flip_probability > 0
        if is_drawn and torch.rand(1).item() < self.flip_probability:
            cropped = v2.functional.horizontal_flip(cropped)
            left = width - size[1] - left
        return {
            "image": to_unit_range(v2.functional.pil_to_tensor(cropped)),
            "original_size": torch.tensor([image.height, image.width]),
            "crop_top_left": torch.tensor([top, left]),
        }


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width, in whole pixels, of the smallest image of the same shape that covers a size."""
    # In integers: the side that is not met exactly is never rounded to less than it must cover.
    if size[0] * width >= size[1] * height:
        return size[0], width * size[0] // height
    return height * size[1] // width, size[1]


def check_covering(image: Image.Image, size: tuple[int, int], name: str = "The image") -> tuple[int, int]:
    """``covering``, unless the sides of the image are too far apart for it.

    Raises:
        Unreadable: It would be resized to more than ``LARGEST`` pixels.
    """
    height, width = covering(image.height, image.width, size)
    if height * width > LARGEST:
        raise Unreadable(
            name,
            f"it is {image.height} pixels high and {image.width} wide, and would be {height} x {width} where it covers "
            f"{size[0]} x {size[1]}; crop it",
        )
    return height, width


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
        self.size = (image_size, image_size)
        self.covering = CoveringCrop(crop, horizontal_flip, interpolation)

    def __call__(self, image: Image.Image, name: str = "The image") -> dict[str, Tensor]:
        """Make the square of an RGB, upright image; see ``CoveringCrop``."""
        return self.covering(image, self.size, name)
