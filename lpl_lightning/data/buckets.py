r"""Aspect-ratio buckets: sizes of one area and many shapes, and which of them each image is brought to.

For an image size S and a divisor d the short sides are the multiples of d up to S, and the long side of each is the
largest multiple of d with

.. math:: H W \le S^2 \quad \text{and so} \quad H W > S^2 - S d,

once upright and once across, up to a largest aspect ratio. An image belongs to the size whose aspect ratio
:math:`W / H` is nearest to its own in the logarithm, in which 2:1 and 1:2 are equally far from 1:1. It is resized to
just cover that size and the rest is cropped: the share by which the two ratios differ.

A size with fewer images than a batch would make no batch. It is dropped, the smallest first, and its images go to the
nearest of those that are left: they are cropped a little more, but are not lost. Smaller batches would keep the shape,
but weigh each of these images more than the others in a step, and leave processes without any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

__all__ = ["AspectBuckets", "Assignment"]

Size = tuple[int, int]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AspectBuckets:
    """Which sizes there are.

    Attributes:
        divisor: What heights and widths are multiples of, in pixels, and ``image_size`` too. The model needs its
            autoencoder's downscaling times what its latents must be a multiple of: 16 for a transformer with patches of
            2 over an autoencoder of 8, 64 for Stable Diffusion 1.5, 32 for SDXL and Sana. 64 does for all of them; a
            smaller one makes more sizes, so that less is cropped.
        max_aspect: Largest ratio of the longer side to the shorter, 1 or more. Images beyond it are cropped to it.
    """

    divisor: int = 64
    max_aspect: float = 2.0

    # Not in __post_init__: a config's parser would take the error for another type's and say something else.
    def check(self, image_size: int) -> None:
        """Refuse settings that make no buckets of an image size.

        Raises:
            ValueError: An attribute is out of its range, does not fit the size, or leaves one size only.
        """
        if self.divisor < 1:
            raise ValueError(f"`divisor` of `buckets` must be 1 or more, got {self.divisor}.")
        if not 1 <= self.max_aspect < float("inf"):
            raise ValueError(f"`max_aspect` of `buckets` must be 1 or more and finite, got {self.max_aspect}.")
        if image_size % self.divisor:
            below = max(self.divisor, image_size // self.divisor * self.divisor)
            raise ValueError(
                f"`image_size`={image_size} must be a multiple of `divisor`={self.divisor} of `buckets`; the nearest "
                f"are {(below, below + self.divisor)}. Take one of them, or a smaller divisor that the model allows."
            )
        if len(self.sizes(image_size)) == 1:
            raise ValueError(
                f"`buckets` leave one size, {image_size} x {image_size}: no other with sides that are multiples of "
                f"`divisor`={self.divisor} has an aspect ratio up to `max_aspect`={self.max_aspect:g}. Lower `divisor` "
                "to what the model needs, raise `max_aspect` or `image_size`, or leave `buckets` out."
            )

    def sizes(self, image_size: int) -> tuple[Size, ...]:
        """All sizes, height and width in pixels, from the tallest to the widest."""
        found: set[Size] = set()
        for short in range(self.divisor, image_size + 1, self.divisor):
            long = image_size**2 // short // self.divisor * self.divisor
            if long <= self.max_aspect * short:
                found |= {(short, long), (long, short)}
        return tuple(sorted(found, key=lambda size: size[1] / size[0]))

    def assign(self, images: Sequence[Size], image_size: int, least: int = 1) -> Assignment:
        """Choose a size for each image.

        Args:
            images: Height and width of each, upright.
            image_size: Square root of the area, in pixels.
            least: Images that a size must have to be kept: those of a batch of all processes.

        Returns:
            The sizes kept and each image's choice among them; one, even if there are fewer images than ``least``.
        """
        sizes = np.array(self.sizes(image_size))
        of_sizes = np.log(sizes[:, 1] / sizes[:, 0])
        of_images = np.array([width / height for height, width in images], dtype=np.float64)
        np.log(of_images, out=of_images)
        kept = np.arange(len(sizes))
        chosen = kept[_nearest(of_images, of_sizes)]
        before = chosen.copy()
        while len(kept) > 1:
            counts = np.bincount(chosen, minlength=len(sizes))[kept]
            if counts.min() >= least:
                break
            # The empty ones at once; else one, as those that are left may fill up with its images.
            gone = kept[counts == 0] if counts.min() == 0 else kept[[counts.argmin()]]
            kept = np.setdiff1d(kept, gone)
            moved = np.isin(chosen, gone)
            chosen[moved] = kept[_nearest(of_images[moved], of_sizes[kept])]
        return Assignment(
            tuple((int(height), int(width)) for height, width in sizes[kept]),
            np.searchsorted(kept, chosen),
            int((chosen != before).sum()),
        )


def _nearest(values: npt.NDArray[np.float64], ascending: npt.NDArray[np.float64]) -> Integers:
    """Position of the nearest of some ascending numbers, for each value; of two as near, the first."""
    return np.searchsorted((ascending[1:] + ascending[:-1]) / 2, values)


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which size each image is brought to.

    Attributes:
        sizes: Height and width of each bucket, in pixels, from the tallest to the widest.
        bucket_of: (N,) the bucket of each image.
        moved: How many images are not in the bucket nearest to them, which was too small.
    """

    sizes: tuple[Size, ...]
    bucket_of: Integers
    moved: int = 0

    @cached_property
    def members(self) -> tuple[Integers, ...]:
        """Positions of the images of each bucket, ascending."""
        return tuple(np.flatnonzero(self.bucket_of == bucket) for bucket in range(len(self.sizes)))

    def size_of(self, index: int) -> Size:
        """Height and width of an image, in pixels."""
        return self.sizes[int(self.bucket_of[index])]
