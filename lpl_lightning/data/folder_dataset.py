"""Image files as a data set: square images, or of the size that is asked for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.data import Dataset

from lpl_lightning.data.crops import CoveringCrop, Crop, Interpolation
from lpl_lightning.data.faults import Faults, first_readable
from lpl_lightning.data.reading import read_rgb
from lpl_lightning.data.texts import LabeledFiles, TextLists

__all__ = ["ImageFolderDataset"]


class ImageFolderDataset(Dataset[dict[str, Any]]):
    """Image files as square images.

    The shorter side is resized to ``image_size``, anti-aliased, up or down; the rest is cropped. Items also hold the
    ``original_size`` and ``crop_top_left`` of ``CoveringCrop``.

    Args:
        files: Path and class index of each image; an index of None leaves out the item's ``label``.
        image_size: Side of the images, in pixels.
        crop: Which square of the resized image: the centre, or one drawn anew each time.
        horizontal_flip: Mirror half of the images, drawn anew each time.
        interpolation: How to resize.
        captions: Captions of each image, at least one; None leaves out the items' ``caption``.
        draw_caption: Give one of an image's captions, drawn anew each time; otherwise its first.
        faults: What becomes of images that cannot be read; one that is skipped is replaced by the next. None refuses
            them.
        root: Folder that all of them lie in.

    Raises:
        Unreadable: An image cannot be read, and is not skipped.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int | None]],
        image_size: int,
        crop: Crop = "center",
        horizontal_flip: bool = False,
        interpolation: Interpolation = "bicubic",
        captions: Sequence[Sequence[str]] | None = None,
        draw_caption: bool = False,
        faults: Faults | None = None,
        root: Path | None = None,
    ) -> None:
        if captions is not None and len(captions) != len(files):
            raise ValueError(f"`captions` must be those of {len(files)} files, got {len(captions)}.")
        self.files = LabeledFiles(files)
        self.size = (image_size, image_size)
        self.transform = CoveringCrop(crop, horizontal_flip, interpolation)
        self.captions = None if captions is None else TextLists(captions)
        self.draw_caption = draw_caption
        self.faults = Faults("raise") if faults is None else faults
        self.root = root

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Behind the end there is none, which is where a loop over the data set ends.
        return first_readable(self.item, range(len(self))[index], len(self), self.faults)

    def mirrored(self, probability: float) -> Self:
        """The same images, each of which is mirrored with a probability."""
        found = copy.copy(self)
        found.transform = copy.copy(self.transform)
        found.transform.flip_probability = probability
        return found

    def preparation(self) -> dict[str, str | bool]:
        """What is done to images besides the size that they are brought to."""
        return self.transform.provenance()

    def key(self, index: int) -> str:
        """Path of an image, in ``root`` if it lies there."""
        path = self.files[index][0]
        return path if self.root is None else Path(path).relative_to(self.root).as_posix()

    def captions_of(self, index: int) -> Sequence[str]:
        """All captions of an image."""
        return () if self.captions is None else self.captions[index]

    def item(self, index: int, size: tuple[int, int] | None = None) -> dict[str, Any]:
        """An image, and not another in its place.

        Args:
            index: Its position.
            size: Height and width, in pixels, to resize and crop to; by default the square.

        Raises:
            Unreadable: It cannot be read.
        """
        path, label = self.files[index]
        item: dict[str, Any] = {**self.transform(read_rgb(path), size or self.size, path)}
        if label is not None:
            item["label"] = label
        if self.captions is not None:
            captions = self.captions[index]
            item["caption"] = captions[int(torch.randint(len(captions), ())) if self.draw_caption else 0]
        return item
