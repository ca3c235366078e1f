"""Many texts in a few objects, which loader processes share.

A forked process shares its parent's memory until either writes to it, and Python writes to each object that it looks
at, for it counts references. A list of a million texts would so be copied to each loader process as they are read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TypeVar, overload

import numpy as np

__all__ = ["LabeledFiles", "TextLists", "Texts"]

Item = TypeVar("Item")


class _Packed(Sequence[Item]):
    """A sequence, which cannot be changed, whose items are made when they are asked for."""

    @abstractmethod
    def at(self, index: int) -> Item:
        """The item of an index of 0 to the length less one."""

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        places = range(len(self))[index]
        return self.at(places) if isinstance(places, int) else [self.at(place) for place in places]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Texts(_Packed[str]):
    """Texts as one string of bytes and the places where they begin.

    Args:
        texts: What it holds; also paths of any bytes.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._bytes = b"".join(encoded)
        self._starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def at(self, index: int) -> str:
        """One of them."""
        return self._bytes[self._starts[index] : self._starts[index + 1]].decode("utf-8", "surrogatepass")


class TextLists(_Packed[Sequence[str]]):
    """Lists of texts, such as the captions of each image.

    Args:
        lists: What it holds.
    """

    def __init__(self, lists: Sequence[Sequence[str]]) -> None:
        self._texts = Texts(text for texts in lists for text in texts)
        self._starts = np.cumsum([0, *map(len, lists)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def at(self, index: int) -> tuple[str, ...]:
        """One of them."""
        return tuple(self._texts[int(self._starts[index]) : int(self._starts[index + 1])])


class LabeledFiles(_Packed[tuple[str, int | None]]):
    """Paths, each with the index of its class, or None.

    Args:
        files: What it holds.
    """

    def __init__(self, files: Sequence[tuple[str, int | None]]) -> None:
        self._paths = Texts(path for path, _ in files)
        self._labels = np.array([-1 if label is None else label for _, label in files], np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def at(self, index: int) -> tuple[str, int | None]:
        """One of them."""
        label = int(self._labels[index])
        return self._paths[index], None if label < 0 else label
