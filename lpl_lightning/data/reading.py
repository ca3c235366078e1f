"""Reading images of any mode as RGB, from files or from memory; their sizes; and finding those that cannot be read."""

from __future__ import annotations

import functools
import io
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lpl_lightning.data.faults import Unreadable

__all__ = ["in_threads", "load_rgb", "read_rgb", "reason", "upright_size", "upright_sizes"]

Found = TypeVar("Found")
Item = TypeVar("Item", str, int)

CHUNK = 64  # items per task: a task for each of a million images would itself fill the memory

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow's names of what is read, whatever a file is called. It knows more, such as EPS, which runs a program."""


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def load_rgb(source: str | bytes) -> Image.Image:
    """Decode an image upright and as RGB: 16-bit grey scaled to 8 bits, transparent parts over white.

    Args:
        source: Path of a file, or what is in one.

    Raises:
        ValueError: It has several frames, or values whose range is not known.
        Exception: Whatever Pillow's decoders say of a file that they cannot read.
    """
    with _opened(source) as image:
        # Cameras write a preview beside a photo as a second picture (MPO), which is no animation.
        if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
            raise ValueError(f"it has {frames} frames; save the one that is meant by itself")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image).astype(np.float64)
            # A TIFF of 32 bits may hold 8 bits or 16 where no value is above 255.
            either = image.mode == "I" and image.format == "TIFF" and values.max() < 256
            if image.mode == "F" or either or values.min() < 0 or values.max() > 65535:
                raise ValueError("the range of its values is not known; save it with 8 or 16 bits a channel")
            return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")


def _opened(source: str | bytes) -> Image.Image:
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source), formats=_formats())
    # A pipe would be waited for, and a device read without end.
    if not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("it is no file")
    return Image.open(source, formats=_formats())


def read_rgb(source: str | bytes, name: str | None = None) -> Image.Image:
    """``load_rgb`` with one error for all that may be wrong.

    Args:
        source: Path of a file, or what is in one.
        name: What the image is called in the error; by default its path.

    Raises:
        Unreadable: It cannot be read.
    """
    try:
        if isinstance(source, bytes) and not source:
            raise ValueError("it is empty")
        try:
            return load_rgb(source)
        except Warning:
            # Pillow's remark on an odd file, where warnings are errors: no reason to end a run. The filters are left
            # alone otherwise: a change to them makes Python repeat warnings once shown.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return load_rgb(source)
    except Exception as error:  # Pillow's decoders do not agree on a type.
        raise Unreadable(name or str(source), reason(error)) from error


def reason(error: Exception) -> str:
    """Why an image could not be read, in one line."""
    if isinstance(error, Unreadable):
        return error.reason
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can identify"
    return f"{type(error).__name__}: {error}"


def upright_size(path: str) -> tuple[int, int]:
    """Height and width of an image as it is seen upright, from its file's header: nothing is decoded.

    A PNG whose EXIF data stand behind its pixels is the exception, since Pillow finds them no other way.

    Raises:
        Exception: Whatever Pillow says of a file that is no image.
    """
    with _opened(path) as image:
        width, height = image.size
        if tags := getattr(image, "tag_v2", None):  # newer versions of Pillow turn the size of a TIFF themselves
            width, height = tags.get(ExifTags.Base.ImageWidth, width), tags.get(ExifTags.Base.ImageLength, height)
        if image.format == "PNG" and "exif" not in image.info and not _text_behind_pixels(path):
            exif = Image.Image.getexif(image)  # a PNG's own decodes it
        else:
            exif = image.getexif()
        turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def _text_behind_pixels(path: str) -> bool:
    """Whether a PNG holds data about it, such as its orientation, behind its pixels."""
    with open(path, "rb") as file:
        file.seek(8)
        behind = False
        while len(head := file.read(8)) == 8:
            behind |= head[4:] == b"IDAT"
            if behind and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return False


def upright_sizes(paths: Sequence[str]) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Read sizes, in threads.

    Returns:
        Height and width by path, and why, by path, for those that have none; see ``upright_size``.
    """
    return in_threads(upright_size, paths)


def in_threads(function: Callable[[Item], Found], items: Sequence[Item]) -> tuple[dict[Item, Found], dict[Item, str]]:
    """What a function makes of images, in threads.

    Args:
        function: Makes something, not None, of an image, or raises an error.
        items: Paths or positions of images.

    Returns:
        What was made, by item, and why, by item, nothing could be.
    """

    def each(start: int) -> list[tuple[Item, Found | None, str | None]]:
        made: list[tuple[Item, Found | None, str | None]] = []
        for item in items[start : start + CHUNK]:
            try:
                made.append((item, function(item), None))
            except Exception as error:  # Pillow's decoders do not agree on a type.
                made.append((item, None, reason(error)))
        return made

    found, bad = {}, {}
    # The filters belong to the process: they are set here once, not by threads that would undo one another's.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        for item, value, why in chain.from_iterable(pool.map(each, range(0, len(items), CHUNK))):
            if value is not None:
                found[item] = value
            elif why is not None:
                bad[item] = why
    return found, bad
