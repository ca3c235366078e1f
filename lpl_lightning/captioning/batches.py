"""Which images are captioned together, and by which process.

Batch ``b`` is made of the images ``batch_size * b`` and after of the whole listing, and process ``i`` of ``n`` takes
batches ``i``, ``i + n`` and so on. So each image has the same others beside it whether a run was killed or not, and in
whatever number of processes, and what rounding makes of it is the same. Only images that came to the folder, or
became readable, after their batch was made are put together anew.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from lpl_lightning.data.reading import load_rgb, reason

__all__ = ["Batch", "Batches", "Flags", "Images", "Share", "planned"]

Inputs = Mapping[str, Any]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Share:
    """A process's share: the batches ``index``, ``index + of``, ``index + 2 of`` and so on."""

    index: int = 0
    of: int = 1

    @property
    def name(self) -> str:
        """What the share's files are called."""
        return f"part-{self.index}-of-{self.of}"

    @classmethod
    def find(cls, shard: str | None) -> Self:
        """What ``shard`` says, or else ``RANK`` and ``WORLD_SIZE``, which torchrun sets, or else all.

        Raises:
            ValueError: It is not ``I/N`` with I below N.
        """
        given = shard is not None
        said = shard if given else f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
        index, _, of = str(said).partition("/")
        if not (index.isdecimal() and of.isdecimal() and int(index) < int(of)):
            name, remedy = ("`shard`", "Give 0/4, 1/4, 2/4 and 3/4 to four processes") if given else (
                "RANK/WORLD_SIZE", "Start by torchrun, unset both, or give `shard`"
            )  # fmt: skip
            raise ValueError(f"{name} must be I/N, with I from 0 to N - 1, got {said!r}. {remedy}.")
        return cls(int(index), int(of))


def planned(is_missing: Flags, has_failed: Flags, batch_size: int, share: Share) -> list[list[int]]:
    """The batches that a process still has to make.

    Args:
        is_missing: (N,), of each image whether nothing is known of it.
        has_failed: (N,), of each image whether it could not be captioned before; it is tried again.
        batch_size: Images a batch.
        share: The process's.

    Returns:
        Numbers of images. Batches of which some images are done already are at the end, put together anew.
    """
    whole: list[list[int]] = []
    rest: list[int] = []
    for start in range(share.index * batch_size, len(is_missing), share.of * batch_size):
        end = min(start + batch_size, len(is_missing))
        if is_missing[start:end].all():
            whole.append(list(range(start, end)))
        else:
            rest += [start + int(step) for step in np.flatnonzero((is_missing | has_failed)[start:end])]
    return whole + [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]


class Batch(NamedTuple):
    """Images, ready for the model.

    Attributes:
        numbers: All images of the batch.
        errors: Why, by number, for those that cannot be captioned.
        readable: The others.
        sizes: Width and height in pixels of each of ``readable``.
        inputs: What the model is called with: rows of ``readable``, and then rows that fill it up; None without any.
    """

    numbers: list[int]
    errors: dict[int, str]
    readable: list[int]
    sizes: list[tuple[int, int]]
    inputs: Inputs | None


class Images(Protocol):
    """The images of a listing."""

    def __getitem__(self, number: int, /) -> str | bytes:
        """The path of an image, or what is in its file."""


class Batches(Dataset[Batch]):
    """Reads images and prepares them, batch by batch, in a loader's processes.

    Args:
        images: The images of the listing.
        plan: Their numbers, batch by batch.
        rows: Rows of the inputs, whatever number of images there is: the first is repeated, since how a sum is
            rounded depends on the shape of what it is part of.
        prepare: Images to the model's inputs. What it refuses is counted as an error of the image.
    """

    def __init__(
        self,
        images: Images,
        plan: Sequence[list[int]],
        rows: int,
        prepare: Callable[[list[Image.Image]], Inputs],
    ) -> None:
        self.images, self.plan, self.rows, self.prepare = images, plan, rows, prepare

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch:
        numbers = self.plan[index]
        images: dict[int, Image.Image] = {}
        errors: dict[int, str] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files
            for number in numbers:
                try:
                    images[number] = load_rgb(self.images[number])
                except Exception as error:  # Pillow's decoders do not agree on a type.
                    errors[number] = reason(error)
            inputs = self._prepared(list(images.values()))
            if inputs is None and images:
                # One that the processor refuses, such as a strip too thin for it, must not take the others with it.
                for number, image in list(images.items()):
                    try:
                        self.prepare([image])
                    except Exception as error:
                        errors[number] = f"the model's processor refuses it: {reason(error)}"
                        del images[number]
                inputs = self._prepared(list(images.values()), strict=True)
        return Batch(numbers, errors, list(images), [image.size for image in images.values()], inputs)

    def _prepared(self, images: list[Image.Image], strict: bool = False) -> Inputs | None:
        if not images:
            return None
        try:
            return self.prepare(images + images[:1] * (self.rows - len(images)))
        except Exception:
            if strict:
                raise
            return None
