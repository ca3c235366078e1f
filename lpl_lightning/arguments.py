"""Checks of arguments that many parts share."""

from __future__ import annotations

__all__ = ["at_least", "check_divides"]


def at_least(least: float, **values: float) -> None:
    """Refuse numbers that are too small.

    Args:
        least: The smallest that is allowed.
        values: Arguments by name.

    Raises:
        ValueError: One is smaller.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"`{name}` must be {least} or more, got {value}.")


def check_divides(image_size: int, downscale: int) -> None:
    """Refuse images that an autoencoder cannot take.

    Args:
        image_size: Side of the data's images, in pixels.
        downscale: Side of an image over the side of its latent.

    Raises:
        ValueError: The one does not divide the other.
    """
    if image_size % downscale:
        below = max(downscale, image_size // downscale * downscale)
        raise ValueError(
            f"`image_size`={image_size} of the data must be divisible by {downscale}, the autoencoder's "
            f"downscaling; the nearest are {(below, below + downscale)}."
        )
