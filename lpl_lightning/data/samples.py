"""Samples of data sets whose images are not files in folders, and what becomes of them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch.utils.data import Dataset

from lpl_lightning.data.captions import read_prompts, texts_of
from lpl_lightning.data.crops import SquareCrop, check_covering
from lpl_lightning.data.faults import Unreadable
from lpl_lightning.data.reading import read_rgb, reason

__all__ = [
    "Preparation",
    "Sample",
    "SampleDataset",
    "captions_of",
    "key_number",
    "label_of",
    "optional",
    "read_classes",
]


class Sample(NamedTuple):
    """An image as it is stored, and what is said of it.

    Attributes:
        name: What it is called in reports.
        key: What its draws come from: the same wherever the data lie.
        image: What is in the image's file; or its path; or its URL, which has ``://``.
        label: Index of its class; None without classes.
        captions: At least one; None without captions.
    """

    name: str
    key: str
    image: bytes | str
    label: int | None = None
    captions: tuple[str, ...] | None = None


class Preparation:
    """Decodes samples and makes items of them: ``image``, ``original_size``, ``crop_top_left``, ``label``, ``caption``.

    Args:
        transform: What makes the square image.
        draw_caption: Give one of the captions, drawn anew each time; otherwise the first.
    """

    def __init__(self, transform: SquareCrop, draw_caption: bool = False) -> None:
        self.transform, self.draw_caption = transform, draw_caption

    def mirrored(self, probability: float) -> Preparation:
        """The same, mirroring images with a probability."""
        found = copy.deepcopy(self)
        found.transform.covering.flip_probability = probability
        return found

    def __call__(self, sample: Sample) -> dict[str, Any]:
        """Make the item.

        Raises:
            Unreadable: The image cannot be read.
        """
        item: dict[str, Any] = {**self.transform(_decoded(sample), sample.name)}
        if sample.label is not None:
            item["label"] = sample.label
        if captions := sample.captions:
            item["caption"] = captions[int(torch.randint(len(captions), ())) if self.draw_caption else 0]
        return item

    def check(self, sample: Sample) -> tuple[int, int]:
        """See whether an item could be made, and give the height and width that its image would be resized to.

        Raises:
            Unreadable: It could not.
        """
        return check_covering(_decoded(sample), self.transform.size, sample.name)


class SampleDataset(Dataset[dict[str, Any]]):
    """Samples by position, as items.

    Args:
        prepare: Makes items of samples.
    """

    def __init__(self, prepare: Preparation) -> None:
        self.prepare = prepare

    @abstractmethod
    def _sample(self, index: int) -> Sample:
        """The sample at a position, or an error, ``Unreadable``."""

    def item(self, index: int) -> dict[str, Any]:
        """A sample's item, and not another's in its place.

        Raises:
            Unreadable: It cannot be used.
        """
        return self.prepare(self._sample(index))

    def key(self, index: int) -> str:
        """Key of a sample."""
        return self._sample(index).key

    def captions_of(self, index: int) -> Sequence[str]:
        """All captions of a sample."""
        return self._sample(index).captions or ()

    def mirrored(self, probability: float) -> Self:
        """The same images, each of which is mirrored with a probability, read from the same place."""
        found = copy.copy(self)
        found.prepare = self.prepare.mirrored(probability)
        return found

    def preparation(self) -> dict[str, str | bool]:
        """What is done to images besides the size that they are brought to."""
        return self.prepare.transform.covering.provenance()


def _decoded(sample: Sample) -> Image.Image:
    is_url = isinstance(sample.image, str) and "://" in sample.image
    return read_rgb(_fetched(sample) if is_url else sample.image, sample.name)


def _fetched(sample: Sample) -> bytes:
    try:
        with optional("fsspec").open(str(sample.image), "rb") as file:
            content: bytes = file.read()
    except Exception as error:  # File systems do not agree on a type.
        raise Unreadable(sample.name, reason(error)) from error
    return content


def key_number(key: str) -> int:
    """A number of 64 bits that stands for a sample's key."""
    return int.from_bytes(blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def captions_of(name: str, values: dict[str, Any]) -> tuple[str, ...]:
    """The captions of a sample, without white space at their ends.

    Args:
        name: What the sample is called.
        values: A string, a list of strings or None by column.

    Raises:
        Unreadable: There are none, or a column holds something else.
    """
    try:
        found = tuple(text for column, value in values.items() for text in texts_of(value, "it", column))
    except ValueError as error:
        raise Unreadable(name, str(error)) from error
    if not found:
        raise Unreadable(name, f"no caption in {', '.join(values)}")
    return found


def label_of(name: str, value: object, class_names: tuple[str, ...]) -> int:
    """The class index of a sample.

    Args:
        name: What the sample is called.
        value: An index, in digits or as a float too, as tables with gaps have it; or the name of a class.
        class_names: The classes.

    Raises:
        Unreadable: It is neither.
    """
    if isinstance(value, str):
        value = value.strip()
        if value in class_names:
            return class_names.index(value)
        value = int(value) if value.isascii() and value.isdigit() else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(class_names):
        return value
    if value is None:
        raise Unreadable(name, "no label")
    raise Unreadable(name, f"label {value!r} is neither a class nor an index below {len(class_names)}")


def read_classes(classes: int | list[str] | str | None) -> tuple[str, ...]:
    """Names of classes: those of a list or of a text file with one a line, or numbers below a count.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: There are none, or two of one name.
    """
    if classes is None:
        return ()
    if isinstance(classes, int):
        names = tuple(map(str, range(classes)))
    elif isinstance(classes, str):
        names = read_prompts(Path(classes).expanduser(), "classes", "class")
    else:
        names = tuple(classes)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`classes` must be at least one class, each named once, got {classes!r}.")
    return names


def optional(library: str) -> Any:
    """Import a library that not everyone has.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise ModuleNotFoundError(f'Run pip install "lpl-lightning[data]": {error}', name=library) from error
