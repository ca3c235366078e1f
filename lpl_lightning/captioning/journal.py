"""What has been captioned, kept so that a kill at any moment loses no more than a batch.

Each process appends to a part of its own, ``captions-parts/part-0-of-1.jsonl``, one row an image:
``{"file_name": ..., "text": ..., "left": 3}``, or with ``error`` in the place of ``text`` where there is none; ``left``
counts the rows of the batch that follow. A batch is written at once and is on the disk before the next begins. What a
kill leaves of the last one, half a line or half a batch, is taken off again before a run goes on, so that the batch is
made anew as a whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from lpl_lightning.captioning.batches import Flags, Share
from lpl_lightning.captioning.record import writing
from lpl_lightning.data.listing import as_line

__all__ = ["PARTS", "Journal", "Row"]

PARTS = "captions-parts"


class Row(NamedTuple):
    """What became of one image.

    Attributes:
        name: Its path, as the table names it.
        text: Its caption, in one line; None where it has none because of an error.
        error: Why not.
        is_long: Whether the caption reached the most tokens that were allowed, and may be cut off.
    """

    name: str
    text: str | None
    error: str | None = None
    is_long: bool = False


class Journal:
    """The rows of the images of one listing, in the parts of all processes.

    Rows are found by the number of an image in the listing. They are left on the disk: in memory is where each is.

    Args:
        folder: Where the parts are, or will be: ``captions-parts``, or a folder in it.
        names: Names of the images, in the order of the listing.
        share: Which part is this process's.
    """

    def __init__(self, folder: Path, names: Sequence[str], share: Share) -> None:
        self.folder, self.names = folder, names
        self.writer = share.name
        self.own = self.folder / f"{share.name}.jsonl"
        self._numbers = {name: number for number, name in enumerate(names)}
        self._files = ExitStack()
        self._parts: dict[Path, BinaryIO] = {}
        self._part = np.full(len(names), -1, np.int32)
        self._start = np.zeros(len(names), np.int64)
        self._failed = np.zeros(len(names), bool)

    def __enter__(self) -> Self:
        """Open it to write.

        Raises:
            BlockingIOError: Another process writes this part.
            ValueError: A part is damaged elsewhere than at its end.
        """
        try:
            self._open()
        except BaseException:
            self._files.close()
            raise
        return self

    def _open(self) -> None:
        with writing(self.own):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._out = self._files.enter_context(self.own.open("ab", buffering=0))
        if not _lock(self._out):
            raise BlockingIOError(
                f"{self.own} is being written by another process. Let it end, or give each process its own `shard`."
            )
        self.read_parts()
        end = self._read(self.own)
        if end < self._size():
            self._out.truncate(end)
            os.fsync(self._out.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def read_parts(self) -> bool:
        """Look up what all processes have written by now, and whether there is anything new."""
        part, start = self._part.copy(), self._start.copy()
        self._part[:] = -1
        for path in sorted(self.folder.glob("part-*.jsonl")):
            self._read(path)
        return not (np.array_equal(part, self._part) and np.array_equal(start, self._start))

    @property
    def is_missing(self) -> Flags:
        """Of each image, whether nothing is known of it; (N,) bool."""
        return np.asarray(self._part < 0)

    @property
    def has_failed(self) -> Flags:
        """Of each image, whether it could not be captioned when that was last tried; (N,) bool."""
        return np.asarray(~self.is_missing & self._failed)

    def row(self, number: int) -> Row | None:
        """What became of an image; None where nothing is known of it."""
        if self._part[number] < 0:
            return None
        file = list(self._parts.values())[self._part[number]]
        file.seek(int(self._start[number]))
        return _parse(file.readline())[0]

    def rows(self) -> Iterator[Row]:
        """What is known, in the order of the listing."""
        return (row for number in range(len(self.names)) if (row := self.row(number)) is not None)

    def number(self, name: str) -> int | None:
        """The number of an image in the listing; None where it is not in it."""
        return self._numbers.get(name)

    def append(self, rows: Iterable[Row]) -> None:
        """Write a batch; it is on the disk when this returns. What failed again for the same reason is not repeated.

        Raises:
            ValueError: It cannot be written.
        """
        new = [row for row in rows if row.text is not None or self.row(self._numbers[row.name]) != row]
        if new:
            start = self._size()
            left = b"".join(_line(row, len(new) - 1 - number) for number, row in enumerate(new))
            with writing(self.own):
                # Without a buffer, which a full disk would keep from being closed.
                while left:
                    left = left[self._out.write(left) :]
                os.fsync(self._out.fileno())
            self._read(self.own, start)

    def _size(self) -> int:
        return os.fstat(self._out.fileno()).st_size

    def _read(self, path: Path, start: int = 0) -> int:
        """Find the rows of a part from a place on, and where its last whole batch ends."""
        if path not in self._parts:
            self._parts[path] = self._files.enter_context(path.open("rb"))
        file, part = self._parts[path], list(self._parts).index(path)
        file.seek(start)
        end, found = start, list[tuple[int, int, bool]]()
        while line := file.readline():
            try:
                row, left = _parse(line)
            except ValueError as error:
                # The last one: what a kill has left, or what another process is about to end.
                if not line.endswith(b"\n") or not file.readline():
                    break
                raise ValueError(
                    f"{path}: the line at byte {start} is damaged ({error}). Remove it; its image is captioned anew."
                ) from error
            if (number := self._numbers.get(row.name)) is not None:
                found.append((number, start, row.text is None))
            start += len(line)
            if not left:
                for number, place, failed in found:
                    # Of rows in several parts, a caption is never hidden by a failure of an earlier run.
                    if not failed or self._part[number] < 0 or self._failed[number]:
                        self._part[number], self._start[number], self._failed[number] = part, place, failed
                end, found = start, []
        return end


def _line(row: Row, left: int) -> bytes:
    known = {"file_name": row.name, "text": row.text, "error": row.error, "is_long": row.is_long or None}
    return as_line({key: value for key, value in known.items() if value is not None} | {"left": left})


def _parse(line: bytes) -> tuple[Row, int]:
    """A row, and how many more there are in its batch."""
    if not line.endswith(b"\n"):
        raise ValueError("it has no end")
    content = json.loads(line)
    if not isinstance(content, dict) or not {"file_name", "left"} <= content.keys():
        raise ValueError("it is no row")
    row = Row(content["file_name"], content.get("text"), content.get("error"), content.get("is_long", False))
    return row, content["left"]


def _lock(file: BinaryIO) -> bool:
    """Whether no other process holds a file; it is then held until it is closed, where the system can do that."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a network file system without locks
            pass
    return True
