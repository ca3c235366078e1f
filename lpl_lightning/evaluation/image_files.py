"""Sets of images for evaluation: from a folder, as they are, and told by their pixels.

Metrics of image sets move with what is done to the images before (``metrics.preparation``), so that a folder is taken
only if nothing has to be done to it, or if an argument says what may be.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from lpl_lightning.arguments import at_least
from lpl_lightning.data.base import to_unit_range
from lpl_lightning.data.captions import read_sidecars
from lpl_lightning.data.crops import SquareCrop
from lpl_lightning.data.listing import images_below, some
from lpl_lightning.data.reading import load_rgb, reason
from lpl_lightning.evaluation.content_key import content_key
from lpl_lightning.metrics.preparation import check_images

__all__ = ["ImageFiles", "PixelHash"]

_CHUNK = 64  # files per task of a thread
_COLORS = np.array([[[70, 160, 90], [200, 60, 60], [60, 60, 200], [128, 128, 128], [230, 200, 60]]], np.uint8)


class ImageFiles(Dataset[dict[str, Any]]):
    """All images of a folder and its sub-folders, as one set of squares of one size.

    Items hold the ``image``, (3, S, S) float32 in [-1, 1]; its ``index``; and, where asked for, its ``caption``, the
    first line of the text file of its name beside it. Where all files have different whole numbers for names, as
    ``ImageWriter`` gives them, they come in the order of these; otherwise in that of their paths.

    Args:
        folder: The folder. Hidden files and files of other types are passed over.
        argument: The argument that named it, for the errors.
        image_size: Side that images are brought to, in pixels: the shorter side is resized, anti-aliased bicubic, and
            the middle square is taken, as in validation. None takes images as they are, which must then be square and
            of one size.
        convert: Read images that are not RGB of 8 bits as training does. Otherwise they are refused.
        captions: Give captions. Every image must have one.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: It holds no images, or an image lacks its caption.
    """

    def __init__(
        self,
        folder: str | Path,
        argument: str,
        image_size: int | None = None,
        convert: bool = False,
        captions: bool = False,
    ) -> None:
        if image_size is not None:
            at_least(1, image_size=image_size)
        self.folder = Path(folder).expanduser().absolute()
        self.argument, self.image_size, self.convert = argument, image_size, convert
        self.paths = _ordered(images_below(self.folder, argument))
        self.captions = self._captions() if captions else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        self.check()
        try:
            image = load_rgb(self.paths[index])
        except Exception as error:  # Pillow's decoders do not agree on a type.
            raise ValueError(
                f"`{self.argument}`: {self.paths[index]} cannot be read ({reason(error)}). Make it anew or remove it."
            ) from error
        square = to_unit_range(pil_to_tensor(image)) if self._crop is None else self._crop(image)["image"]
        item = {"image": square, "index": index}
        return item if self.captions is None else {**item, "caption": self.captions[index]}

    def check(self) -> None:
        """Refuse images that are not as the arguments ask, by their headers; done once, at the latest by the first use.

        Whether all of a file is there is seen only when it is decoded: an item that cannot be is an error of its own.

        Raises:
            ValueError: Files are no images, images are not RGB of 8 bits without ``convert``, or they are not square or
                of several sizes without ``image_size``.
        """
        _ = self._sizes

    def provenance(self) -> dict[str, str | int | bool]:
        """What the set is and what is done to its images; ``enlarged`` counts those smaller than ``image_size``."""
        side = self._side
        shorter = [min(size) for size in self._sizes]
        return {
            "folder": self.folder.name,
            "count": len(self),
            "image_size": side,
            "resize": "none" if set(shorter) == {side} else "bicubic, antialiased",
            "crop": "none" if all(width == height for width, height in self._sizes) else "middle square",
            "enlarged": sum(length < side for length in shorter),
            "convert": self.convert,
        }

    def quick_key(self) -> str:
        """A hash of the files, and of what is done to the images; ``content_key`` says what of the files.

        It tells without decoding whether results of an earlier run are of the same images; captions are no part.
        """
        return content_key(self.paths, [self._name(path) for path in self.paths], f"{self.image_size} {self.convert}")

    @cached_property
    def _sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each image as its header says them.

        Not turned upright, which would need PNGs to be decoded, and makes no difference to squares.
        """
        headers = {self._name(path): header for path, header in zip(self.paths, _headers(self.paths), strict=True)}
        total = f"{len(self)} images in {self.folder}"
        if bad := [f"{name} ({header.fault})" for name, header in headers.items() if header.fault]:
            raise ValueError(
                f"`{self.argument}`: {len(bad)} of {total} cannot be read: {some(bad)}. Make them anew or remove them."
            )
        other = [f"{name} ({header.unlike})" for name, header in headers.items() if header.unlike]
        if other and not self.convert:
            raise ValueError(
                f"`{self.argument}`: {len(other)} of {total} are not RGB of 8 bits: {some(other)}. Metrics change with "
                "how they are read; set `convert` to read them as training does: grey to three channels, transparency "
                "over white, 16 bits to 8, values as they are whatever their color profile."
            )
        sizes = {name: header.size for name, header in headers.items()}
        squares = Counter(size for size in sizes.values() if size[0] == size[1])
        common = squares.most_common(1)[0][0] if squares else None
        other = [f"{name} with {size[0]} x {size[1]}" for name, size in sizes.items() if size != common]
        if other and self.image_size is None:
            first = next((name for name, size in sizes.items() if size == common), None)
            like = "" if common is None else f", which {first} with {common[0]} x {common[1]} is"
            raise ValueError(
                f"`{self.argument}`: {len(other)} of {total} are not squares of one size{like}: {some(other)}. Set "
                "`image_size` to resize the shorter side (anti-aliased bicubic) and take the middle square."
            )
        return tuple(sizes.values())

    @property
    def _side(self) -> int:
        return self.image_size or self._sizes[0][0]

    @cached_property
    def _crop(self) -> SquareCrop | None:
        return None if self.image_size is None else SquareCrop(self.image_size)

    def _captions(self) -> list[str]:
        found = read_sidecars(self.paths).texts
        if bare := [self._name(path) for path in self.paths if path not in found]:
            raise ValueError(
                f"`{self.argument}`: {len(bare)} of {len(self)} images in {self.folder} have no caption: {some(bare)}. "
                "Write it to a text file of the image's name beside it, such as 1.txt for 1.png."
            )
        return [found[path][0] for path in self.paths]

    def _name(self, path: str) -> str:
        return PurePath(path).relative_to(self.folder).as_posix()


@dataclass
class PixelHash:
    """A hash of a set of images, whatever their order, their batches and the process that each came by.

    It is the sum modulo 2^128 of the images' own hashes, of shape and pixels in 8 bits, rounded as metrics round them.
    That tells sets apart which differ by mistake, not by forgery.

    Attributes:
        count: Number of images.
        total: The sum.
    """

    count: int = 0
    total: int = 0

    def add(self, images: Tensor) -> None:
        """Take a batch.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: They are not such.
        """
        check_images(images)
        pixels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8).contiguous()
        for image in pixels.numpy():
            digest = blake2b(str(image.shape).encode(), digest_size=16)
            digest.update(image)
            self._add(1, int.from_bytes(digest.digest(), "big"))

    def merge(self, other: PixelHash) -> None:
        """Take what another process has seen."""
        self._add(other.count, other.total)

    def hexdigest(self) -> str:
        """32 hexadecimal digits, which depend on the number of images too."""
        return blake2b(f"{self.count} {self.total}".encode(), digest_size=16).hexdigest()

    def _add(self, count: int, total: int) -> None:
        self.count += count
        self.total = (self.total + total) % 2**128


class _Header(NamedTuple):
    """What is known of an image before it is decoded.

    Attributes:
        size: Width and height.
        unlike: In what it is unlike RGB of 8 bits, if it is.
        fault: Why it cannot be read, if it cannot.
    """

    size: tuple[int, int] = (0, 0)
    unlike: str | None = None
    fault: str | None = None


def _ordered(paths: list[str]) -> list[str]:
    """By number where the names are different numbers, or else as they come, by path."""
    stems = {path: PurePath(path).stem for path in paths}
    if all(stem.isascii() and stem.isdigit() for stem in stems.values()):
        numbers = {path: int(stem) for path, stem in stems.items()}
        if len(set(numbers.values())) == len(paths):
            return sorted(paths, key=numbers.__getitem__)
    return paths


def _headers(paths: Sequence[str]) -> list[_Header]:
    """The header of each file."""

    def read(start: int) -> list[_Header]:
        return [_header(path) for path in paths[start : start + _CHUNK]]

    # The filters belong to the process: they are set here once, not by threads that would undo one another's.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        return list(chain.from_iterable(pool.map(read, range(0, len(paths), _CHUNK))))


def _header(path: str) -> _Header:
    try:
        if not os.path.getsize(path):
            return _Header(fault="it is empty")
        with Image.open(path) as image:
            return _Header(image.size, _unlike(image))
    except Exception as error:  # Pillow's readers do not agree on a type.
        return _Header(fault=reason(error))


@lru_cache(maxsize=64)
def _is_srgb(profile: bytes | None) -> bool:
    """Whether colors mean with a profile what they mean without; so for one that cannot be read, which none applies."""
    if not profile:
        return True
    try:
        given = Image.fromarray(_COLORS)
        shown = ImageCms.profileToProfile(given, io.BytesIO(profile), ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, ImportError):
        return True
    return int(np.abs(np.asarray(shown, np.int16) - _COLORS).max()) <= 4  # of 255: profiles round


def _unlike(image: ImageFile.ImageFile) -> str | None:
    if image.mode != "RGB":
        return f"mode {image.mode}"
    if image.has_transparency_data:
        return "a transparent color"
    if not _is_srgb(image.info.get("icc_profile")):
        return "a color profile that is not sRGB"
    # Pillow gives RGB of 16 bits as RGB of 8; what is stored, it says only to its decoders.
    for codec, _, _, settings in image.tile:
        stored, *rest = settings if isinstance(settings, tuple) else (settings,)
        if ";16" in str(stored) or ";15" in str(stored) or (codec.startswith("ppm") and rest[-1] != 255):
            return "not 8 bits a channel"
    return None
