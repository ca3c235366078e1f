"""Captions as files that ``ImageFolderDataModule`` reads.

A file is written whole or not at all, and one that holds anything else than this wrote is left alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from lpl_lightning.captioning.journal import Journal, Row
from lpl_lightning.captioning.record import write_whole
from lpl_lightning.data.listing import as_line, some

__all__ = ["TABLE", "Sidecars", "Table"]

TABLE = "metadata.jsonl"
_OTHER_TABLES = ("metadata.csv", "metadata.parquet")


class Table:
    """Captions as ``metadata.jsonl``: a row for each image that has one, in the order of the listing.

    Args:
        folder: Where it is.
        overwrite: Whether a table that holds something else may be replaced.
    """

    def __init__(self, folder: Path, overwrite: bool) -> None:
        self.path, self.overwrite = folder / TABLE, overwrite

    def check(self, journal: Journal, numbers: Iterable[int]) -> None:
        """Refuse a folder that has a table already, before time is spent.

        Args:
            journal: What has been captioned.
            numbers: The images that will be.

        Raises:
            ValueError: It has.
        """
        if others := [path for name in _OTHER_TABLES if (path := self.path.with_name(name)).exists()]:
            raise ValueError(
                f"`out`: {some(others)} is there already, and a folder may hold one table alone. Move it, or give "
                "another `out`."
            )
        if self.path.exists() and not self.overwrite and (foreign := self._foreign(journal)):
            # Another process may have written it just now, of rows that were not looked up yet.
            if journal.read_parts() and not (foreign := self._foreign(journal)):
                return
            raise ValueError(
                f"`out`: {len(foreign)} rows of {self.path} are not as `lpl caption` wrote them: {some(foreign)}. Move "
                "it, give another `out`, or set `overwrite` to replace it."
            )

    def add(self, rows: Sequence[Row]) -> None:
        """Nothing: the journal has them until the table is written."""

    def finish(self, journal: Journal) -> str:
        """Write the table of all that has been captioned by now, and say where it is.

        Raises:
            ValueError: There is one that holds something else.
        """
        self.check(journal, ())
        rows = (row for row in journal.rows() if row.text is not None)
        lines = (as_line({"file_name": row.name, "text": row.text}) for row in rows)
        write_whole(self.path, lines, journal.writer)
        return f"a row each in {self.path}"

    def _foreign(self, journal: Journal) -> list[str]:
        """Lines of the table that the journal does not know; those of images that are gone are passed over."""
        foreign = []
        with self.path.open("rb") as file:
            for place, line in enumerate(file, 1):
                try:
                    found = json.loads(line)
                    number = journal.number(found["file_name"])
                    own = found.keys() == {"file_name", "text"} and (
                        number is None or ((row := journal.row(number)) is not None and row.text == found["text"])
                    )
                except (ValueError, KeyError, TypeError, AttributeError):
                    own = False
                if not own:
                    foreign.append(f"line {place}")
        return foreign


class Sidecars:
    """Captions as text files beside images: ``cat/1.txt`` for ``cat/1.jpg``. Empty captions have none.

    Args:
        names: Names of the images, in the order of the listing.
        paths: Their paths.
        overwrite: Whether captions that are there already may be replaced.
        writer: Name of this process's share.

    Raises:
        ValueError: Two images would have the same one.
    """

    def __init__(self, names: Sequence[str], paths: Sequence[str], overwrite: bool, writer: str) -> None:
        self.files = {name: Path(path).with_suffix(".txt") for name, path in zip(names, paths, strict=True)}
        self.overwrite, self.writer = overwrite, writer
        sharing: dict[Path, list[str]] = defaultdict(list)
        for name, file in self.files.items():
            sharing[file].append(name)
        if twice := [" and ".join(shared) for shared in sharing.values() if len(shared) > 1]:
            raise ValueError(
                f"`format`: sidecar gives each image a text file of its name, but {len(twice)} would be of several: "
                f"{some(twice)}. Rename them, or set `format` to metadata."
            )

    def check(self, journal: Journal, numbers: Iterable[int]) -> None:
        """Refuse images that have a caption of another source, before time is spent.

        Args:
            journal: What has been captioned.
            numbers: The images that will be.

        Raises:
            ValueError: They have.
        """
        names = [journal.names[number] for number in numbers]
        if not self.overwrite and (there := [self.files[name] for name in names if self.files[name].exists()]):
            raise ValueError(
                f"`images`: {len(there)} captions are there already that `lpl caption` did not write: {some(there)}. "
                "Set `overwrite` to replace them, or `format` to metadata and `out` to another folder."
            )

    def add(self, rows: Sequence[Row]) -> None:
        """Write those of a batch.

        Raises:
            ValueError: One has appeared since ``check``.
        """
        for row in rows:
            file = self.files[row.name]
            # Another process that ends may have written it just now, from the journal.
            if row.text and file.exists() and not self.overwrite and not self._is_written(row):
                raise ValueError(f"`images`: {file} has appeared since this run began. Move it, or set `overwrite`.")
            self._write(row)

    def finish(self, journal: Journal) -> str:
        """Write those that a kill has left out, and say where they are."""
        for row in journal.rows():
            if not self.files[row.name].exists() or (self.overwrite and not self._is_written(row)):
                self._write(row)
        return "a text file each beside the images"

    def _is_written(self, row: Row) -> bool:
        return self.files[row.name].read_bytes() == f"{row.text}\n".encode()

    def _write(self, row: Row) -> None:
        if row.text:
            write_whole(self.files[row.name], [f"{row.text}\n".encode()], self.writer)
        elif row.text is not None and self.overwrite:
            self.files[row.name].unlink(missing_ok=True)  # that of another source
