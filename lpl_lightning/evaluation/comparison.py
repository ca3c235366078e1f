"""``lpl compare``: evaluations side by side, as a table, as plots and as images of the same seeds."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm

from lpl_lightning.arguments import at_least
from lpl_lightning.data.listing import some
from lpl_lightning.evaluation.comparison_images import embedded, same_images, write_grid
from lpl_lightning.evaluation.comparison_runs import Run, read_runs
from lpl_lightning.evaluation.comparison_text import markdown
from lpl_lightning.evaluation.differences import FORMAT, check_references, differences, draws
from lpl_lightning.evaluation.page import page
from lpl_lightning.evaluation.report import check_folder, write_whole
from lpl_lightning.metrics.spectrum import Spectra
from lpl_lightning.metrics.spectrum_plot import plot_spectra

__all__ = ["compare"]

RESULT = "comparison.json"
FILES = frozenset({RESULT, "comparison.md", "index.html", "spectra.csv", "spectra.png", "images.png"})


def compare(
    runs: list[str],
    out: str = "comparison",
    baseline: int = 0,
    resamples: int | None = None,
    seed: int = 0,
    images: int = 64,
    trusted: bool = False,
) -> Path:
    """Compare evaluations: values with bootstrap intervals, differences to a baseline, spectra, and the same images.

    Writes ``index.html``, a page that needs no other file; ``comparison.md`` with ``images.png``; ``comparison.json``;
    and, where the runs have spectra, ``spectra.csv`` and, with matplotlib, ``spectra.png``.

    Intervals hold what other images of the same models would change, and not what another training would.

    Args:
        runs: Two or more evaluations, each a report.json or a folder at or below which exactly one lies. All must have
            been measured against the same real images.
        out: Folder to write to. An earlier comparison in it is replaced.
        baseline: Which of the runs the others are compared with, from 0.
        resamples: Number of bootstrap draws; by default 1000, and 200 for Frechet distances, which cost more.
        seed: What the draws come from.
        images: How many images of each run are shown at most.
        trusted: Whether images are shown from wherever a report says that they are, and not only from its folder and
            from beside it: for reports of your own.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError: A run has no report.
        ValueError: Runs that do not compare, an argument out of range, or other files in ``out``.
    """
    at_least(0, baseline=baseline, seed=seed, images=images)
    if resamples is not None:
        at_least(2, resamples=resamples)
    if isinstance(runs, str) or len(runs) < 2:
        raise ValueError(f"`runs` must be two evaluations or more, got {runs!r}. Give a report or a folder for each.")
    if baseline >= len(runs):
        raise ValueError(f"`baseline` must be one of the {len(runs)} runs, 0 to {len(runs) - 1}, got {baseline}.")
    folder = Path(out)
    _check_folder(folder)
    found = read_runs(runs, trusted)
    check_references(found)
    with tqdm(total=draws(found, resamples), desc="Bootstrap", disable=None) as bar:
        comparison = differences(found, baseline, resamples, seed, bar.update)
    folder.mkdir(parents=True, exist_ok=True)
    # At once, since it tells the folder as one of a comparison.
    write_whole(folder / RESULT, json.dumps(comparison.as_dict(), indent=1))
    written = {RESULT, "comparison.md", "index.html"}
    pictures = {}
    spectra, notes = _spectra(found)
    if spectra:
        written.add(write_whole(folder / "spectra.csv", _table(spectra)).name)
        why = _plot(spectra, folder / "spectra.png")
        if why:
            notes.append(why)
        else:
            pictures["spectra.png"] = "Spectra of generated images against that of real ones."
    same, said = same_images(found, baseline, images)
    notes += said
    addresses: list[str] = []
    if same is not None:
        try:
            write_grid(same, folder / "images.png")
            addresses, done = embedded([path for row in same.paths for path in row])
            notes += done
            pictures["images.png"] = f"Images of the same {same.alike}; rows from above: {', '.join(same.runs)}."
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's decoders do not agree on a type
            notes.append(f"No images are shown, since one cannot be read: {error}.")
            same = None
    comparison = replace(comparison, notes=[*comparison.notes, *notes])
    write_whole(folder / "comparison.md", markdown(comparison, pictures))
    write_whole(folder / "index.html", page(comparison, spectra, same, addresses))
    write_whole(folder / RESULT, json.dumps(comparison.as_dict(), indent=1))
    for name in set(os.listdir(folder)) - written - set(pictures):
        (folder / name).unlink()  # of an earlier comparison
    rank_zero_info(f"Comparison: {folder / 'index.html'}")
    return folder


def _check_folder(folder: Path) -> None:
    """Refuse to write among other things."""
    check_folder(folder, "out")
    if not folder.exists():
        return
    names = sorted(os.listdir(folder))
    foreign = [name for name in names if re.sub(r"\.[0-9a-f]+\.unfinished(\.png)?$", "", name) not in FILES]
    if foreign or (names and not _is_comparison(folder / RESULT)):
        raise ValueError(
            f"`out` must be a new folder or that of an earlier comparison, but {folder} holds "
            f"{some(foreign or names)}. Give another."
        )


def _is_comparison(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _spectra(runs: Sequence[Run]) -> tuple[dict[str, Spectra], list[str]]:
    """Spectra of the runs that have any, and notes of those that have none, unless no run was to have any."""
    found, notes, without = {}, [], []
    for run in runs:
        try:
            spectra = run.spectra()
        except (ValueError, OSError) as error:
            notes.append(f"No spectra of {run.name}: {error}")
            continue
        if spectra is None:
            without.append(f"No spectra of {run.name}: there is no file of them.")
        else:
            found[run.name] = spectra
    return found, notes + without if found else notes


def _table(spectra: Mapping[str, Spectra]) -> str:
    """One row a run and frequency, as ``metrics.write_spectra`` writes them."""
    columns = [name for name in Spectra._fields if name != "mean_absolute_log_difference"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *columns])
    for run, found in spectra.items():
        writer.writerows([run, *row] for row in zip(*(getattr(found, name).tolist() for name in columns), strict=True))
    return text.getvalue()


def _plot(spectra: Mapping[str, Spectra], path: Path) -> str | None:
    """Write the plot, or say why there is none."""
    part = path.with_name(f"{path.name}.{uuid4().hex}.unfinished.png")
    try:
        plot_spectra({_label(place, run): found for place, (run, found) in enumerate(spectra.items(), 1)}, part)
    except (ModuleNotFoundError, ValueError) as error:
        return f"There is no {path.name}. {error}"
    part.replace(path)
    return None


def _label(place: int, run: str) -> str:
    """A name as a legend has room for it; matplotlib hides some that begin with a line and reads $ as mathematics."""
    return f"{place} {run if len(run) <= 24 else run[:23] + '…'}".replace("$", r"\$")
