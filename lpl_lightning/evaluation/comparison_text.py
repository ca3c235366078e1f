"""A comparison as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lpl_lightning.evaluation.bootstrap import Interval
from lpl_lightning.evaluation.differences import Comparison
from lpl_lightning.evaluation.report import formatted

__all__ = ["markdown", "signed"]


def markdown(comparison: Comparison, pictures: Mapping[str, str]) -> str:
    """A comparison as Markdown.

    Args:
        comparison: What it shows.
        pictures: Images to show: what each says by file name.
    """
    others = [run for run in comparison.runs if run != comparison.baseline]
    heads = ["value", "better", *comparison.runs, *(f"{run} - {comparison.baseline}" for run in others)]
    lines = [f"# {_cell(' against '.join([', '.join(others), comparison.baseline]))}", "", *_head(heads)]
    for name, row in comparison.rows.items():
        cells = [row.cells.get(run) for run in comparison.runs]
        said = ["" if cell is None else _with(formatted(cell.value), cell.interval, cell.std) for cell in cells]
        for cell in (row.cells.get(run) for run in others):
            if cell is None or cell.difference is None:
                said.append("")
            else:
                verdict = f" **{cell.verdict}**" if cell.verdict else ""
                said.append(_with(signed(cell.difference), cell.difference_interval) + verdict)
        lines.append("| " + " | ".join([_cell(name), row.better or "", *said]) + " |")
    if comparison.made:
        lines += ["", "## What differs in how they were made", "", *_head(["", *comparison.runs])]
        for key, values in comparison.made.items():
            lines.append(
                "| " + " | ".join(_cell(text) for text in (key, *(values[run] for run in comparison.runs))) + " |"
            )
    for name, shown in pictures.items():
        lines += ["", f"![{_cell(shown)}]({name})", "", _cell(shown)]
    if comparison.notes:
        lines += ["", "## Notes", "", *(f"- {_cell(note)}" for note in comparison.notes)]
    return "\n".join(lines) + "\n"


def signed(value: float) -> str:
    """``formatted`` with its sign."""
    return f"+{formatted(value)}" if value > 0 else formatted(value)


def _head(names: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(_cell(name) for name in names) + " |", "|---" * len(names) + "|"]


def _with(said: str, spread: Interval | None, std: float | None = None) -> str:
    if spread is not None:
        return f"{said} [{formatted(spread.low)}, {formatted(spread.high)}]"
    return said if std is None else f"{said} ± {formatted(std)}"


def _cell(text: str) -> str:
    """As a cell of a Markdown table: on one line, and nothing in it is markup."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", line)
