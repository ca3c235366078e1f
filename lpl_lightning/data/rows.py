"""Rows of Hugging Face data sets as samples: from tables, by their number, and from streams, file by file."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from lpl_lightning.data.faults import Faults, Unreadable, first_readable
from lpl_lightning.data.listing import path_hash
from lpl_lightning.data.samples import Preparation, Sample, captions_of, label_of, optional
from lpl_lightning.data.streams import Handle

__all__ = ["Columns", "RowStream", "RowsDataset", "row_hashes", "spread_order"]

MOST_SHARDS = 4096
"""Parts of a stream of more files, such as single images, are of several files each."""


class Columns(NamedTuple):
    """Which columns hold what.

    Attributes:
        image: Images: as they are stored, or as paths or URLs.
        label: Class index or name; None without classes.
        captions: Captions: strings or lists of strings; empty without captions.
        class_names: The classes.
    """

    image: str
    label: str | None = None
    captions: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    def names(self, images: bool = True) -> list[str]:
        """Names of the columns, without that of images if they are not wanted."""
        image = [self.image] if images else []
        return [*image, *([] if self.label is None else [self.label]), *self.captions]

    def sample(self, name: str, key: str, row: Mapping[str, Any], images: bool = True) -> Sample:
        """Make a sample of a row.

        Raises:
            Unreadable: The row lacks something, or has it in another form.
        """
        image = self._encoded(name, row.get(self.image)) if images else b""
        label = captions = None
        if self.label is not None:
            label = label_of(name, row.get(self.label), self.class_names)
        if self.captions:
            captions = captions_of(name, {column: row.get(column) for column in self.captions})
        return Sample(name, key, image, label, captions)

    def _encoded(self, name: str, value: object) -> bytes | str:
        if isinstance(value, Mapping):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes | str):
            return value
        if value is None:
            raise Unreadable(name, f"no image in the column {self.image}")
        raise Unreadable(name, f"the column {self.image} holds a {type(value).__name__} instead of an image's file")


class RowsDataset(Dataset[dict[str, Any]]):
    """Rows of a table as square images.

    Args:
        table: A ``datasets.Dataset`` whose images are not decoded.
        rows: Numbers of the rows, in the order of the items.
        columns: Which columns hold what.
        name: What the table is called in reports.
        prepare: Makes items of samples.
        faults: What becomes of rows that cannot be used; one that is skipped is replaced by the next.
    """

    def __init__(
        self, table: Any, rows: Sequence[int], columns: Columns, name: str, prepare: Preparation, faults: Faults
    ) -> None:
        self.table, self.columns, self.name = table.select_columns(columns.names()), columns, name
        # An array: a list of a million numbers would be copied to each loader process as they are counted.
        self.rows: npt.NDArray[np.int64] = np.asarray(rows, np.int64)
        self.prepare, self.faults = prepare, faults

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return first_readable(self.item, index, len(self), self.faults)

    def item(self, index: int) -> dict[str, Any]:
        """A row, and not another in its place.

        Raises:
            Unreadable: It cannot be used.
        """
        return self.prepare(self._sample(index))

    def key(self, index: int) -> str:
        """Number of a row in the table."""
        return str(int(self.rows[index]))

    def captions_of(self, index: int) -> Sequence[str]:
        """All captions of a row."""
        return self._sample(index).captions or ()

    def mirrored(self, probability: float) -> Self:
        """The same images, each of which is mirrored with a probability."""
        found = copy.copy(self)
        found.prepare = self.prepare.mirrored(probability)
        return found

    def preparation(self) -> dict[str, str | bool]:
        """What is done to images besides the size that they are brought to."""
        return self.prepare.transform.covering.provenance()

    def _sample(self, index: int) -> Sample:
        row = int(self.rows[index])
        return self.columns.sample(f"{self.name}, row {row}", str(row), self.table[row])

    def captions(self) -> Iterator[str]:
        """The first caption of each row that has one, in order, without reading images."""
        texts = self.table.select_columns(self.columns.names(images=False))
        for row in self.rows.tolist():
            try:
                captions = self.columns.sample(self.name, "", texts[row], images=False).captions
            except Unreadable:
                continue
            if captions:
                yield captions[0]


class RowStream:
    """Rows of a streaming data set; the ``Stream`` of a ``StreamDataset``.

    Args:
        rows: A ``datasets.IterableDataset`` whose images are not decoded.
        columns: Which columns hold what.
        name: What it is called in reports.
    """

    def __init__(self, rows: Any, columns: Columns, name: str) -> None:
        self.rows, self.columns = rows, columns
        self.shards = [f"{name}, part {part}" for part in range(min(rows.num_shards, MOST_SHARDS))]

    def read(self, shard: int, images: bool = True) -> Iterator[Handle]:
        """Handles of the rows of one of the files, or of some."""
        # File systems that were used before this process was forked would hang in it.
        optional("fsspec.asyn").reset_lock()
        part = self.rows.shard(len(self.shards), shard)
        if not images:
            part = part.select_columns(self.columns.names(images=False) or self.columns.names())
        # Batches of one: iterating row by row, `datasets` would give each loader process its share of the files.
        for place, batch in enumerate(part.iter(batch_size=1)):
            row = {column: values[0] for column, values in batch.items()}
            yield partial(self.columns.sample, f"{self.shards[shard]}, row {place}", f"{shard}/{place}", row, images)

    def count(self, shard: int) -> int:
        """How many rows a part has, which it takes to read them."""
        return sum(1 for _ in self.read(shard, images=False))


def row_hashes(table: Any, image: str) -> tuple[npt.NDArray[np.float64], bool]:
    """A number in [0, 1) for each row, and whether it comes from the path of its image, as in image folders.

    The path counts from the folder that all images are in; other rows are told apart by their numbers.
    """
    rows = range(len(table))
    first = table[0][image] if len(table) else None
    if isinstance(first, Mapping) and first.get("bytes") is None and os.path.isabs(str(first.get("path"))):
        found = [value and value["path"] for value in table.select_columns([image])[image]]
        if all(path and os.path.isabs(path) for path in found):
            root = Path(os.path.commonpath([os.path.dirname(path) for path in found]))
            return np.array([path_hash(path, root) for path in found]), True
    return np.array([path_hash(str(row), Path()) for row in rows]), False


def spread_order(
    table: Any, label: str | None, rows: npt.NDArray[np.int64], hashes: npt.NDArray[np.float64], paths: bool
) -> npt.NDArray[np.int64]:
    """Order of rows for validation, whose first batches must show all classes.

    That in which they are stored, save class by class, or as files of a folder: then by their hashes.
    """
    if not paths and label is not None and len(rows):
        labels = table.select_columns([label])[:][label]
        found = [labels[row] for row in rows.tolist() if labels[row] is not None]
        paths = len(set(found)) > 1 and found == sorted(found)
    return rows[np.argsort(hashes[rows], kind="stable")] if paths else rows
