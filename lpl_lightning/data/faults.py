"""Images and other items of data that cannot be used: what becomes of them, and where it is written down.

Nothing is left out in silence. Each item that is skipped stands in a report, a file of one JSON object a line::

    {"name": "cat/7.jpg", "reason": "OSError: image file is truncated (12 bytes not processed)"}

to which loader processes and ranks all append, each item once, whoever meets it and however often.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, get_args

from lpl_lightning.data.listing import some

__all__ = ["Faults", "OnError", "Unreadable", "first_readable", "read_faults"]

Item = TypeVar("Item")

OnError = Literal["skip", "raise"]

FIRST_LOOK = 100
"""Items after which the share of bad ones among those met is looked at."""


class Unreadable(ValueError):
    """An item that cannot be used.

    Attributes:
        name: What it is called, such as a path.
        reason: Why, in one line.
    """

    # One argument does: a loader process hands its errors on as text.
    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        if not self.reason:
            return self.name
        return f"{self.name} cannot be read ({self.reason}). Mend or remove it, or set `on_error` to skip it."


class Faults:
    """What becomes of items that cannot be used.

    Args:
        on_error: ``skip`` them and write them down, or ``raise`` an error that names the first.
        max_bad_share: Share of bad items, in [0, 1], above which even ``skip`` ends with an error that names them: of a
            set whose items are looked at beforehand, or else of the items that a process has met, 100 or more.
        report: File of those skipped; None writes none.

    Raises:
        ValueError: An argument is none of these.
    """

    def __init__(self, on_error: OnError = "skip", max_bad_share: float = 0.1, report: Path | None = None) -> None:
        if on_error not in get_args(OnError):
            raise ValueError(f"`on_error` must be one of {', '.join(get_args(OnError))}, got {on_error!r}.")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"`max_bad_share` must be in [0, 1], got {max_bad_share}.")
        _check_report(report)
        self.on_error: OnError = on_error
        self.max_bad_share, self.report = max_bad_share, report
        self.good = 0
        self.met: dict[str, str] = {}
        self._written: set[str] = set()
        self._read_to = 0

    def begin(self, report: Path | None) -> None:
        """Count anew, for another run.

        Args:
            report: File of the items that this one skips; None writes none.

        Raises:
            ValueError: It cannot be a file.
        """
        _check_report(report)
        self.report, self.good, self._read_to = report, 0, 0
        self.met.clear()
        self._written.clear()

    def passed(self, count: int = 1) -> None:
        """Count items that this process could use.

        Raises:
            ValueError: Too many of those met are bad.
        """
        self.good += count
        if self.met:
            self._check_met()

    def take(self, fault: Unreadable) -> None:
        """Skip an item that was met, or refuse to.

        Raises:
            Unreadable: It is not to be skipped.
            ValueError: Too many are bad.
        """
        if self.on_error == "raise":
            raise fault
        if fault.name in self.met:
            return
        self.met[fault.name] = fault.reason
        self.write({fault.name: fault.reason})
        self._check_met()

    def _check_met(self) -> None:
        # Bad items count once, good ones each time they are met: the share can only be too low.
        self.check_share(len(self.met), self.good + len(self.met), self.met, FIRST_LOOK)

    def check_share(self, bad: int, total: int, named: Mapping[str, str], least: int = 1) -> None:
        """Refuse to go on where too many items are bad.

        Args:
            bad: Number of bad items.
            total: Number of items that they are among.
            named: Reasons by name.
            least: Number of items below which nothing is said.

        Raises:
            ValueError: Too many are.
        """
        if total >= least and bad > self.max_bad_share * total:
            where = "" if self.report is None else f"; {self.report} names them"
            raise ValueError(
                f"{bad} of {total} items cannot be read, more than `max_bad_share` ({self.max_bad_share:g}) allows"
                f"{where}: {_list(named)}. Mend or remove them, or raise `max_bad_share`."
            )

    def write(self, found: Mapping[str, str]) -> None:
        """Append to the report what it does not name yet."""
        if self.report is None or not found:
            return
        self.report.parent.mkdir(parents=True, exist_ok=True)
        with self.report.open("ab+", buffering=0) as file:
            _lock(file)
            is_begun = self._catch_up(file)
            new = {name: reason for name, reason in found.items() if name not in self._written}
            lines = "".join(json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in new.items())
            if new:
                # One write: where a system has no locks, lines of several processes do not mix.
                file.write(("\n" * is_begun + lines).encode())
                self._written |= new.keys()

    def _catch_up(self, file: IO[bytes]) -> bool:
        """See what has been written since; whether its last line was begun and not ended, as by a kill."""
        if file.seek(0, 2) < self._read_to:  # another file than before
            self._read_to = 0
            self._written.clear()
        file.seek(self._read_to)
        *lines, begun = file.read().split(b"\n")
        self._written |= {fault["name"] for fault in _parsed(lines)}
        self._read_to = file.tell() - len(begun)
        return bool(begun)


def _check_report(report: Path | None) -> None:
    """Refuse a report that could not be written, before it is to be."""
    if report is None:
        return
    if report.is_dir():
        raise ValueError(f"`report` must be a file, but {report} is a folder. Give a file in it.")
    there = next(path for path in report.absolute().parents if path.exists())
    if not there.is_dir():
        raise ValueError(f"`report` must lie in a folder, but {there} is a file. Give another.")


def _list(named: Mapping[str, str]) -> str:
    return some(f"{name} ({reason})" for name, reason in named.items())


def first_readable(get: Callable[[int], Item], index: int, count: int, faults: Faults) -> Item:
    """The item at a position or, where that cannot be read, the next that can.

    So a batch keeps its size, and what takes an item's place is the same each time.

    Args:
        get: Gives an item by its position, or raises ``Unreadable``.
        index: The position.
        count: Number of items, behind the last of which comes the first.
        faults: What becomes of those that cannot be read.

    Raises:
        Unreadable: An item cannot be read, and is not to be skipped.
        ValueError: Too many cannot be read.
    """
    for step in range(count):
        try:
            item = get((index + step) % count)
        except Unreadable as fault:
            faults.take(fault)
        else:
            faults.passed()
            return item
    raise ValueError(
        f"None of {count} items can be read: {_list(faults.met)}. Mend them, or name other columns, members or classes."
    )


def read_faults(report: str | Path) -> dict[str, str]:
    """Read a report: reasons by name; nothing where there is no file."""
    path = Path(report)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {fault["name"]: fault["reason"] for fault in _parsed(lines)}


def _parsed(lines: Iterable[str | bytes]) -> list[dict[str, Any]]:
    """Lines of a report, without one that a kill or a full disk cut off."""
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [fault for fault in found if isinstance(fault, dict) and fault.keys() >= {"name", "reason"}]


def _lock(file: IO[bytes]) -> None:
    """Wait until no other process holds a file, and hold it until it is closed, where the system can do that."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
