"""Reading image files of any mode as RGB, and finding those that cannot be read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["load_rgb", "reason", "unreadable"]

CHUNK = 64  # images per task: a task for each of a million images would itself fill the memory


def load_rgb(path: str) -> Image.Image:
    """Decode an image upright and as RGB: 16-bit grey scaled to 8 bits, transparent parts over white."""
    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image).astype(np.float64)
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError("the range of its values is not known; save it with 8 or 16 bits a channel")
            return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")


def reason(error: Exception) -> str:
    """Why an image could not be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can identify"
    return f"{type(error).__name__}: {error}"


def unreadable(paths: Sequence[str]) -> dict[str, str]:
    """Decode images once, in threads; return why, by path, for those that cannot be."""

    def check(start: int) -> list[tuple[str, str]]:
        bad = []
        for path in paths[start : start + CHUNK]:
            try:
                load_rgb(path)
            except Exception as error:  # Pillow's decoders do not agree on a type.
                bad.append((path, reason(error)))
        return bad

    # The filters belong to the process: they are set here once, not by threads that would undo one another's.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        return dict(pair for chunk in pool.map(check, range(0, len(paths), CHUNK)) for pair in chunk)
