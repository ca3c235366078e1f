"""Values of several runs side by side: intervals of each, and of the differences to one of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lpl_lightning.evaluation.bootstrap import LEVEL, Interval, interval, replicates
from lpl_lightning.evaluation.comparison_runs import Run
from lpl_lightning.evaluation.report import Value

__all__ = ["Cell", "Comparison", "Row", "check_references", "differences", "draws"]

RESAMPLES = {"mean": 1000, "spectrum": 1000, "frechet": 200}
"""Draws by kind; a Frechet distance takes the eigenvalues of a matrix for each."""

NO_MATTER = frozenset({"library", "autoencoder"})
"""What a provenance says that forbids no difference: what computed a value, and what is measured by it."""

COUNTS = frozenset({"count", "images", "generated", "real", "reconstructed"})
"""Names under which a provenance holds numbers of images."""

FORMAT = "lpl_lightning comparison 1"

Verdict = Literal["better", "worse", "differs"]


@dataclass(frozen=True)
class Cell:
    """One value of one run.

    Attributes:
        value: It.
        std: Standard deviation over splits or subsets, where the report gives one.
        interval: Where it lies for other images; None where their number cannot be told from the samples.
        difference: ``value`` less the baseline's; None for the baseline, and where the two do not compare.
        difference_interval: That of the difference.
        paired: Whether both runs were resampled by the same images; None without an interval of the difference.
        verdict: Which way it differs, where 0 lies outside that interval.
    """

    value: float
    std: float | None = None
    interval: Interval | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    paired: bool | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Row:
    """One value of all runs that have it.

    Attributes:
        better: Which way is better; None where neither is.
        cells: By run.
    """

    better: Literal["lower", "higher"] | None
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        runs: Names, in the order given.
        baseline: The one that the others are compared with.
        rows: By value.
        made: What differs in how they were made: by key, what each run says of it.
        notes: What a reader must know.
        reports: Where each run's report lies.
        seed: What the draws came from.
    """

    runs: Sequence[str]
    baseline: str
    rows: Mapping[str, Row]
    made: Mapping[str, Mapping[str, str]]
    notes: Sequence[str]
    reports: Mapping[str, str]
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; numbers that are not finite are strings."""
        found: dict[str, Any] = _plain({"format": FORMAT, "level": LEVEL, **asdict(self)})
        return found

    def verdicts(self, run: str) -> dict[str, list[str]]:
        """Names of values by what is clear of them: ``better``, ``worse``, ``differs``, or ``unclear``."""
        found: dict[str, list[str]] = {"better": [], "worse": [], "differs": [], "unclear": []}
        for name, row in self.rows.items():
            if run in row.cells and row.cells[run].difference_interval is not None:
                found[row.cells[run].verdict or "unclear"].append(name)
        return found


def check_references(runs: Sequence[Run]) -> None:
    """Refuse runs that were measured against different real images.

    Raises:
        ValueError: Two hashes differ.
    """
    known = [run for run in runs if run.report.reference.get("hash") is not None]
    for run in known[1:]:
        first, second = known[0].report.reference, run.report.reference
        if first["hash"] != second["hash"]:
            raise ValueError(
                f"`runs` must be measured against the same real images, got {_reference(known[0])} and "
                f"{_reference(run)}: their values do not compare. Evaluate both against one reference by "
                "`lpl evaluate`."
            )


def draws(runs: Sequence[Run], resamples: int | None) -> int:
    """How many draws ``differences`` makes in all."""
    values = [value for run in runs for value in run.report.values.values()]
    return sum(_resamples(value, resamples) for value in values)


def differences(
    runs: Sequence[Run],
    baseline: int = 0,
    resamples: int | None = None,
    seed: int = 0,
    advance: Callable[[int], object] = lambda count: None,
) -> Comparison:
    """Compare the values of runs with those of one of them.

    Both are resampled by the same images, as pairs, where row i of both is of the same image: one generated from the
    same seed, or the same real one. Otherwise their draws are independent.

    Args:
        runs: What ``read_runs`` gave.
        baseline: Which of them the others are compared with.
        resamples: Number of draws; None takes 1000, and 200 for Frechet distances.
        seed: What the draws come from.
        advance: Told how many of ``draws`` were done, as they are.
    """
    base = runs[baseline]
    notes = _counts(runs)

    def replicated(run: Run, value: Value, stream: int) -> Tensor | None:
        count = _resamples(value, resamples)
        try:
            statistic = run.statistic(value)
        except (ValueError, FileNotFoundError) as error:
            notes.append(f"{name}: no interval of {run.name}, since {error}.")
            advance(count)
            return None
        if statistic is None:
            return None
        found = replicates(statistic, count, seed, stream, advance)
        if found.isfinite().all():
            return found
        notes.append(f"{name}: no interval of {run.name}, since it is not finite for other images.")
        return None

    rows = {}
    for name in dict.fromkeys(name for run in runs for name in run.report.values):
        values = {run.name: run.report.values[name] for run in runs if name in run.report.values}
        first = values.get(base.name)
        first_draws = None if first is None else replicated(base, first, 0)
        cells = {}
        for number, run in enumerate(runs):
            if run.name not in values:
                continue
            value = values[run.name]
            if run is base:
                cells[run.name] = _cell(value, first_draws)
                continue
            paired = _paired(base, run, value)
            found = replicated(run, value, 0 if paired else number + 1)
            if reason := _incomparable(first, value):
                notes.append(f"{name}: no difference of {run.name} to {base.name}, since {reason}.")
                cells[run.name] = _cell(value, found)
            else:
                cells[run.name] = _cell(value, found, first, first_draws, paired)
        rows[name] = Row(next(iter(values.values())).better, cells)
    return Comparison(
        runs=[run.name for run in runs],
        baseline=base.name,
        rows=rows,
        made=_made(runs),
        notes=[*notes, *(f"{run.name}: {note}" for run in runs for note in run.report.notes)],
        reports={run.name: str(run.folder) for run in runs},
        seed=seed,
    )


def _resamples(value: Value, given: int | None) -> int:
    if value.resampling is None:
        return 0
    return RESAMPLES[value.resampling.kind] if given is None else given


def _cell(
    value: Value,
    found: Tensor | None,
    first: Value | None = None,
    first_draws: Tensor | None = None,
    paired: bool | None = None,
) -> Cell:
    """A value and its replicates, and its difference to the baseline's, if that is given."""
    cell = Cell(value.value, value.std, _interval(value, value.value, found))
    if first is None:
        return cell
    cell = replace(cell, difference=value.value - first.value)
    if found is None or first_draws is None or value.resampling != first.resampling:
        return cell
    spread = _interval(value, value.value - first.value, found - first_draws)
    return replace(cell, difference_interval=spread, paired=paired, verdict=_verdict(spread, value.better))


def _interval(value: Value, found: float, replicated: Tensor | None) -> Interval | None:
    if replicated is None or value.resampling is None:
        return None
    return interval(found, replicated, biased=value.resampling.kind != "mean")


def _verdict(spread: Interval | None, better: str | None) -> Verdict | None:
    if spread is None or 0 in spread:
        return None
    if better is None:
        return "differs"
    return "better" if (spread.high < 0) == (better == "lower") else "worse"


def _paired(base: Run, run: Run, value: Value) -> bool:
    """Whether row i of both is of one image: drawn from the same seed or the same altogether, or the same real one."""
    if value.resampling is None:
        return False
    of = value.resampling.of
    reports = [each.report for each in (base, run)]
    hashes = [(report.reference if of == "real" else report.images).get("hash") for report in reports]
    seeds = [None if of == "real" else each.seed for each in (base, run)]
    if not any(one is not None and one == other for one, other in (hashes, seeds)):
        return False
    try:
        return torch.equal(base.index(of), run.index(of))
    except ValueError:
        return False


def _incomparable(base: Value | None, value: Value) -> str:
    """Why two values have no difference; empty where they have."""
    if base is None:
        return "the latter does not have it"
    one, other = base.provenance, value.provenance
    keys = [key for key in dict.fromkeys((*one, *other)) if one.get(key) != other.get(key) and key not in NO_MATTER]
    if keys and not COUNTS.issuperset(keys):
        differ = [f"`{key}` ({_text(other.get(key))}, not {_text(one.get(key))})" for key in keys if key not in COUNTS]
        return f"it was made with another {', '.join(differ)}"
    if counts := [key for key in keys if key in (*base.biased_by, *value.biased_by)]:
        differ = [f"`{key}` {_text(other.get(key))}, not {_text(one.get(key))}" for key in counts]
        return f"it is biased by the number of images ({', '.join(differ)})"
    return ""


def _counts(runs: Sequence[Run]) -> list[str]:
    """A note, where the numbers of images differ."""
    counts = {run.name: run.report.images["count"] for run in runs if "count" in run.report.images}
    if len(set(counts.values())) < 2:
        return []
    said = ", ".join(f"{count} of {name}" for name, count in counts.items())
    return [
        f"The numbers of images differ ({said}). Metrics that are biased by it, as Frechet distances, recall and "
        "coverage are, do not compare."
    ]


def _made(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """What differs, by key."""
    parts = [
        {
            **run.report.generation,
            **{f"images: {key}": run.report.images.get(key) for key in ("count", "image_size")},
            **{f"version of {key}": version for key, version in run.report.versions.items()},
        }
        for run in runs
    ]
    made = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        said = [_text(part.get(key)) for part in parts]
        if len(set(said)) > 1:
            made[key] = {run.name: text for run, text in zip(runs, said, strict=True)}
    return made


def _reference(run: Run) -> str:
    said = run.report.reference
    return f"{said.get('name', 'a reference')} (hash {said['hash']}, {said.get('count', '?')} images) for {run.name}"


def _text(said: Any) -> str:
    if said is None:
        return "-"
    return said if isinstance(said, str) else json.dumps(said)


def _plain(said: Any) -> Any:
    """As JSON holds it."""
    if isinstance(said, Interval):
        return {"low": _plain(said.low), "high": _plain(said.high)}
    if isinstance(said, Mapping):
        return {key: _plain(value) for key, value in said.items()}
    if isinstance(said, list | tuple):
        return [_plain(value) for value in said]
    return str(said) if isinstance(said, float) and not math.isfinite(said) else said
