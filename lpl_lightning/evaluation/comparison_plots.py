"""Plots of a comparison as HTML with SVG in it: text keeps its size and lines their width at any width of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from lpl_lightning.evaluation.differences import Comparison, Row
from lpl_lightning.evaluation.report import formatted
from lpl_lightning.metrics.spectrum import Spectra

__all__ = ["COLOURS", "dots", "spectra_charts", "ticks"]

COLOURS = 8
"""Runs that have a colour of their own."""


def dots(name: str, row: Row, comparison: Comparison) -> str:
    """One value of all runs on one axis, with its intervals.

    Args:
        name: Of the value.
        row: It.
        comparison: Whose row it is.
    """
    ends = [
        end
        for cell in row.cells.values()
        for end in (cell.value, *(cell.interval if cell.interval is not None else ()))
        if math.isfinite(end)
    ]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    base = row.cells.get(comparison.baseline)
    lines = []
    for number, run in enumerate(comparison.runs):
        if run not in row.cells:
            continue
        cell, drawn = row.cells[run], ""
        if base is not None and math.isfinite(base.value):
            drawn += f'<line class="base" x1="{at(base.value)}" x2="{at(base.value)}" y1="0" y2="100%"/>'
        if cell.interval is not None and all(map(math.isfinite, cell.interval)):
            ends_at = f'x1="{at(cell.interval.low)}" x2="{at(cell.interval.high)}"'
            drawn += f'<line class="whisker" {ends_at} y1="50%" y2="50%"/>'
        if math.isfinite(cell.value):
            drawn += f'<circle cx="{at(cell.value)}" cy="50%" r="5"/>'
        lines.append(
            f'<div class="dot run-{number % COLOURS}"><span class="who">{escape(run)}</span>'
            f'<svg aria-hidden="true">{drawn}</svg><span class="number">{formatted(cell.value)}</span></div>'
        )
    better = f" <small>{row.better} is better</small>" if row.better else ""
    return f'<section class="card"><h3>{escape(name)}{better}</h3>{"".join(lines)}</section>'


def spectra_charts(spectra: Mapping[str, Spectra], runs: Sequence[str]) -> str:
    """Log power difference and relative error by frequency, frequency 0 left out.

    Args:
        spectra: By run.
        runs: All runs, whose places give the colours.
    """
    charts = []
    for title, field in (
        ("Mean log power, generated - real", "log_difference"),
        ("Relative error of the mean power", "error"),
    ):
        lines = {
            runs.index(run): list(zip(found.frequency[1:].tolist(), getattr(found, field)[1:].tolist(), strict=True))
            for run, found in spectra.items()
        }
        charts.append(_chart(title, lines))
    return "".join(charts)


def _chart(title: str, lines: Mapping[int, Sequence[tuple[float, float]]]) -> str:
    points = [point for line in lines.values() for point in line if math.isfinite(point[1])]
    left, right = min((x for x, _ in points), default=0.0), max((x for x, _ in points), default=1.0)
    low, high = min([0.0, *(y for _, y in points)]), max([0.0, *(y for _, y in points)])
    right, high = (right if right > left else left + 1), (high if high > low else low + 1)
    room = 0.04 * (high - low)
    low, high = low - room, high + room

    def across(x: float) -> float:
        return 100 * (x - left) / (right - left)

    def down(y: float) -> float:
        return 100 * (high - y) / (high - low)

    drawn, labels = [], []
    for y in ticks(low, high, 5):
        kind = "zero" if y == 0 else "grid"
        drawn.append(f'<line class="{kind}" x1="0" x2="100" y1="{down(y):.2f}" y2="{down(y):.2f}"/>')
        labels.append(f'<span class="y" style="top:{down(y):.2f}%">{y:g}</span>')
    for x in ticks(left, right, 6):
        labels.append(f'<span class="x" style="left:{across(x):.2f}%">{x:g}</span>')
    for number, line in lines.items():
        path = " ".join(f"{across(x):.2f},{down(y):.2f}" for x, y in line if math.isfinite(y))
        drawn.append(f'<polyline class="run-{number % COLOURS}" points="{path}"/>')
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><div class="plot">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f'{"".join(drawn)}</svg>{"".join(labels)}</div><p class="axis">cycles per image</p></figure>'
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, ``about`` as many as that."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 12) + 0.0 for number in range(first, last + 1)]
