"""Images and other items of data that cannot be used: what becomes of them, and where it is written down.

Nothing is left out in silence. Each item that is skipped stands in a report, a file of one JSON object a line::

    {"name": "cat/7.jpg", "reason": "OSError: image file is truncated (12 bytes not processed)"}

to which loader processes and ranks all append.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeVar, get_args

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

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
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
        self.on_error: OnError = on_error
        self.max_bad_share, self.report = max_bad_share, report
        self.good = 0
        self.met: dict[str, str] = {}

    def passed(self, count: int = 1) -> None:
        """Count items that this process could use."""
        self.good += count

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
                f"{where}: {some(f'{name} ({reason})' for name, reason in named.items())}. Mend or remove them, or "
                "raise `max_bad_share`."
            )

    def write(self, found: Mapping[str, str]) -> None:
        """Append to the report."""
        if self.report is None or not found:
            return
        self.report.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in found.items())
        # One write: lines of several processes do not mix.
        file = os.open(self.report, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, lines.encode())
        finally:
            os.close(file)


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
    raise ValueError(f"None of {count} items can be read: {some(map(str, faults.met.items()))}.")


def read_faults(report: str | Path) -> dict[str, str]:
    """Read a report: reasons by name; nothing where there is no file."""
    path = Path(report)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines]
    return {fault["name"]: fault["reason"] for fault in found}
