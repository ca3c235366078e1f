"""Rows of Hugging Face data sets as samples: from tables, by their number, and from streams, file by file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lpl_lightning.data.faults import Faults, Unreadable, first_readable
from lpl_lightning.data.listing import path_hash, some
from lpl_lightning.data.reading import in_threads
from lpl_lightning.data.samples import Preparation, Sample, SampleDataset, captions_of, label_of, optional
from lpl_lightning.data.streams import Handle

__all__ = ["Columns", "RowStream", "RowsDataset", "doubled_rows", "row_hashes", "spread_order"]

MOST_SHARDS = 4096
"""Parts of a stream of more files, such as single images, are of several files each."""

LOOKED_AT = 16
"""Images of a table whose contents are among what tells it from others."""


class Columns(NamedTuple):
    """Which columns hold what.

    Attributes:
        image: Images: as they are stored, or as paths or URLs.
        label: Class index or name; None without classes.
        captions: Captions: strings or lists of strings; empty without captions.
        class_names: The classes.
        folder: Where paths of images that are relative count from.
    """

    image: str
    label: str | None = None
    captions: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    folder: str = ""

    def check(self, features: Mapping[str, Any]) -> None:
        """Refuse columns that are not there, or hold what no row could be used for.

        Args:
            features: What ``datasets`` says of the columns.

        Raises:
            ValueError: They are such.
        """
        if lacking := [column for column in self.names() if column not in features]:
            raise ValueError(
                f"`image`, `label` and `caption` must be columns of the data, but {some(lacking)} is not among "
                f"{some(features)}."
            )
        image, text = features[self.image], ("string", "large_string", "string_view", "null")
        encoded = (*text, "binary", "large_binary", "binary_view")
        is_file = isinstance(image, Mapping) and {"bytes", "path"} & image.keys()
        if not is_file and type(image).__name__ != "Image" and getattr(image, "dtype", None) not in encoded:
            raise ValueError(f"`image` must be a column of images or of paths, but {self.image} holds {image}.")
        label = None if self.label is None else features[self.label]
        dtype = str(getattr(label, "dtype", ""))
        if label is not None and dtype not in text and not dtype.startswith(("int", "uint", "float")):
            raise ValueError(f"`label` must be a column of whole numbers or names, but {self.label} holds {label}.")
        for column in self.captions:
            # A list of one feature is how older versions of the library write lists.
            held = features[column][0] if isinstance(features[column], list) else features[column]
            if getattr(getattr(held, "feature", held), "dtype", None) not in text:
                raise ValueError(
                    f"`caption` must be columns of strings or lists of strings, but {column} holds {features[column]}."
                )

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

    def place(self, path: str) -> str | None:
        """Where the image of a path lies; None where the path leads out of ``folder``."""
        place = os.path.join(self.folder, path)
        leads_out = self.folder and os.path.relpath(place, self.folder).split(os.sep)[0] == os.pardir
        return None if leads_out else place

    def _encoded(self, name: str, value: object) -> bytes | str:
        if isinstance(value, Mapping):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str) and "://" not in value:
            if (path := self.place(value)) is None:
                raise Unreadable(name, f"the path in the column {self.image} leads out of `image_folder`")
            return path
        if isinstance(value, bytes | str):
            return value
        if value is None:
            raise Unreadable(name, f"no image in the column {self.image}")
        raise Unreadable(name, f"the column {self.image} holds a {type(value).__name__} instead of an image's file")


class RowsDataset(SampleDataset):
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
        self,
        table: Any,
        rows: npt.NDArray[np.int64],
        columns: Columns,
        name: str,
        prepare: Preparation,
        faults: Faults,
    ) -> None:
        super().__init__(prepare)
        self.table, self.columns, self.name = table.select_columns(columns.names()), columns, name
        # An array: a list of a million numbers would be copied to each loader process as they are counted.
        self.rows = rows
        self.faults = faults

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return first_readable(self.item, index, len(self), self.faults)

    def key(self, index: int) -> str:
        """What tells a row from others, of other tables too."""
        return f"{self.identity}/{int(self.rows[index])}"

    @cached_property
    def identity(self) -> str:
        """What tells the table from others: a hash that a table of the same rows has, wherever it lies."""
        return identity(self.table, self.columns)

    def unusable(self) -> dict[int, Unreadable]:
        """Decode all images once, in threads; give those that cannot be used, by position."""
        bad = in_threads(lambda index: self.prepare.check(self._sample(index)), range(len(self)))[1]
        return {index: Unreadable(self._name(index), why) for index, why in bad.items()}

    def _name(self, index: int) -> str:
        return f"{self.name}, row {int(self.rows[index])}"

    def _sample(self, index: int) -> Sample:
        row = int(self.rows[index])
        return self.columns.sample(self._name(index), str(row), self.table[row])

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


def row_hashes(table: Any, columns: Columns) -> tuple[npt.NDArray[np.float64], bool]:
    """A number in [0, 1) for each row, of the path of its image, and whether all rows are the files of a folder.

    The path counts from the folder that all images are in; rows without one are told apart by their numbers.
    """
    paths = _paths(table, columns)
    folders = {os.path.dirname(path) for path in paths if path is not None}
    root = Path(os.path.commonpath(folders) if folders else "")
    hashes = [path_hash(str(row), Path()) if path is None else path_hash(path, root) for row, path in enumerate(paths)]
    is_text = "string" in str(getattr(table.features[columns.image], "dtype", ""))
    return np.array(hashes), None not in paths and not is_text


def doubled_rows(table: Any, columns: Columns) -> dict[int, int]:
    """Rows that say what one before them does, of the same image by its path, and which that is."""
    paths = {row: path for row, path in enumerate(_paths(table, columns)) if path is not None}
    if len(set(paths.values())) == len(paths):
        return {}
    names = columns.names(images=False)
    said = table.select_columns(names)[:] if names else {}
    found: dict[str, int] = {}
    twice = {}
    for row, path in paths.items():
        first = found.setdefault(repr([path, *(said[name][row] for name in names)]), row)
        if first != row:
            twice[row] = first
    return twice


def _paths(table: Any, columns: Columns) -> list[str | None]:
    """Path of each row's image; None where it is no file of the disk, or one outside of the folder."""
    found: list[str | None] = []
    for batch in table.select_columns([columns.image]).with_format("arrow").iter(batch_size=1000):
        for name in _references(batch[columns.image]):
            place = columns.place(name) if name and "://" not in name else None
            found.append(None if place is None else os.path.abspath(place))
    return found


def _references(images: Any) -> list[str | None]:
    """Paths and URLs of a column of images; None where there is an image itself, whose bytes are not copied for it."""
    compute, types = optional("pyarrow.compute"), optional("pyarrow.types")
    if types.is_struct(images.type):
        fields = {field.name for field in images.type}
        if "path" not in fields:
            return [None] * len(images)
        paths = compute.struct_field(images, "path")
        if "bytes" in fields:
            paths = compute.if_else(compute.is_valid(compute.struct_field(images, "bytes")), None, paths)
        return list(paths.to_pylist())
    if types.is_binary(images.type) or types.is_large_binary(images.type):
        return [None] * len(images)
    return list(images.to_pylist())


def identity(table: Any, columns: Columns) -> str:
    """A hash of a table: of its labels and captions, of the names and sizes of its images, and of some of these.

    All images are not read for it; one that was replaced by another of as many bytes may go unseen.
    """
    digest = blake2b(repr([columns.names(), columns.class_names, len(table)]).encode(), digest_size=6)
    for batch in table.with_format("arrow").iter(batch_size=1000):
        for name in columns.names():
            held = batch[name].to_pylist() if name != columns.image else _names_and_sizes(batch[name])
            digest.update(repr(held).encode(errors="surrogatepass"))
    for row in np.unique(np.linspace(0, len(table) - 1, min(len(table), LOOKED_AT)).astype(int)).tolist():
        value = table[row][columns.image]
        content = value.get("bytes") if isinstance(value, Mapping) else value
        digest.update(content if isinstance(content, bytes) else b"")
    return digest.hexdigest()


def _names_and_sizes(images: Any) -> list[Any]:
    """Last parts of paths, and numbers of bytes, of a column of images, whose bytes are not copied for it."""
    compute, types = optional("pyarrow.compute"), optional("pyarrow.types")
    if types.is_struct(images.type):
        fields = {field.name for field in images.type}
        parts = [compute.struct_field(images, name) for name in ("bytes", "path") if name in fields]
        return [_names_and_sizes(part) for part in parts]
    if types.is_binary(images.type) or types.is_large_binary(images.type):
        return list(compute.binary_length(images).to_pylist())
    return [path and os.path.basename(str(path)) for path in images.to_pylist()]


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
