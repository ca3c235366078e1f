"""Evaluated runs as a comparison reads them: a report, what was found of each image, spectra and images."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpl_lightning.data.listing import images_below, some
from lpl_lightning.evaluation.bootstrap import FrechetToReference, LogPowerDifference, Mean, Statistic
from lpl_lightning.evaluation.report import REPORT, SAMPLES, VALIDATION, Report, Value, formatted
from lpl_lightning.file_names import inside
from lpl_lightning.metrics.reference import ReferenceStatistics
from lpl_lightning.metrics.spectrum import Spectra
from lpl_lightning.metrics.spectrum_plot import read_spectra

__all__ = ["Run", "read_runs"]

SPECTRA = "spectra.csv"

_CLOSE = 1e-2
"""Part of a value by which what its samples give may differ from it: features are kept in single precision."""


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        name: What a comparison calls it, other than all others.
        folder: Where its report lies.
        report: It.
        trusted: Whether its images are taken from wherever it says.
    """

    name: str
    folder: Path
    report: Report
    trusted: bool = False

    @property
    def seed(self) -> int | None:
        """Seed of the first image; None where it is unknown."""
        said: int | None = self.report.generation.get("seed")
        return said

    def index(self, of: Literal["generated", "real"]) -> Tensor:
        """Positions (N,) of the images that were measured, rising.

        Raises:
            ValueError: They are not to be had.
        """
        return self._tensor(f"index_{of}").sort().values

    def statistic(self, value: Value) -> Statistic | None:
        """A value as something that can be computed of other images, of which row i is that of ``index``'s i-th.

        Args:
            value: One of the report's.

        Returns:
            The statistic; None where the value says of no samples.

        Raises:
            ValueError: Its samples are missing, or are not those that gave the value.
        """
        how = value.resampling
        if how is None:
            return None
        order = self._tensor(f"index_{how.of}").argsort()
        rows = self._tensor(how.key)
        if len(rows) != len(order) or len(order) < 2:
            raise ValueError(f"`{how.key}` in {SAMPLES} has {len(rows)} rows for {len(order)} images, 2 or more")
        rows = rows[order]
        statistic: Statistic
        if how.kind == "mean":
            statistic = Mean(rows, how.scale)
        elif how.kind == "spectrum":
            statistic = LogPowerDifference(rows, self._tensor(f"{how.key}_real"))
        else:
            statistic = FrechetToReference(rows, self._reference(how.key.removeprefix("features_"), rows.shape[1]))
        given = float(statistic(torch.ones(1, len(rows), dtype=torch.float64)))
        if not math.isclose(given, value.value, rel_tol=_CLOSE, abs_tol=1e-6):
            raise ValueError(
                f"`{how.key}` in {SAMPLES} gives {formatted(given)}, the report says {formatted(value.value)}: they "
                "are of two evaluations"
            )
        return statistic

    def spectra(self) -> Spectra | None:
        """Mean spectra; None where the run has none.

        Raises:
            ValueError: The file is no such file.
        """
        if not (self.folder / SPECTRA).is_file():
            return None
        columns = {
            name: torch.tensor(column, dtype=torch.float64)
            for name, column in read_spectra(self.folder / SPECTRA).items()
        }
        return Spectra(**columns, mean_absolute_log_difference=columns["log_difference"][1:].abs().mean())

    @property
    def images_elsewhere(self) -> Path | None:
        """Where the report says that the images are, if that is neither in its folder nor beside it.

        Whoever wrote it could have images of anywhere shown on a page. Beside it are ``images``, those of several
        reports, and what ``lpl evaluate`` calls its folder after.
        """
        folder = self._images_folder
        if folder is None or self.trusted:
            return None
        place, own = (Path(os.path.realpath(path)) for path in (folder, self.folder))
        beside = [own.with_name(name) for name in ("images", own.name.removesuffix("-evaluation")) if own.name]
        return None if place.is_relative_to(own) or place in beside else folder

    @property
    def _images_folder(self) -> Path | None:
        said = self.report.images.get("folder")
        return None if said is None else self.folder / str(said)

    @cached_property
    def images(self) -> dict[str, Path]:
        """The generated images, FOLDER/CLASS/INDEX.png, by CLASS/INDEX, in the order of INDEX; empty where none are."""
        folder = self._images_folder
        if folder is None or self.images_elsewhere is not None:
            return {}
        try:
            paths = [Path(path) for path in images_below(folder, "folder")]
        except (ValueError, OSError):
            return {}
        # By number, since classes take turns: by folder, the first ones would all be of the first class.
        paths.sort(key=lambda path: (0, int(path.stem), "") if path.stem.isdecimal() else (1, 0, str(path)))
        return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}

    def _reference(self, name: str, dim: int) -> ReferenceStatistics:
        reference = ReferenceStatistics.load(inside(self.folder, f"reference_{name}.safetensors"))
        if len(reference.mean) != dim:
            raise ValueError(f"the reference's features are {len(reference.mean)}, those of the images {dim}")
        return reference

    def _tensor(self, key: str) -> Tensor:
        path = self.folder / SAMPLES
        if not path.is_file():
            raise ValueError(f"there is no {SAMPLES}")
        try:
            with safe_open(path, framework="pt") as file:  # one tensor at a time: features are large
                tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{SAMPLES} cannot be read: {error}") from error
        if not tensor.isfinite().all():
            raise ValueError(f"`{key}` in {SAMPLES} holds values that are not finite")
        return tensor


def read_runs(given: Sequence[str], trusted: bool = False) -> list[Run]:
    """Find and read reports.

    Args:
        given: For each run a ``report.json``, or a folder in which, or anywhere below which, exactly one lies; those of
            ``lpl validate`` count only where there are no others.
        trusted: Whether images are taken from wherever a report says.

    Returns:
        The runs, with names that differ.

    Raises:
        FileNotFoundError: There is none.
        ValueError: There are several, or one cannot be read.
    """
    paths = [_find(Path(run)) for run in given]
    reports = [Report.read(path) for path in paths]
    names = [report.name for report in reports]
    said = list(given)
    while len(set(names)) < len(names):
        times = Counter(names)
        names = [f"{name} ({more})" if times[name] > 1 else name for name, more in zip(names, said, strict=True)]
        said = [str(number) for number in range(1, len(names) + 1)]
    return [Run(name, path.parent, report, trusted) for name, path, report in zip(names, paths, reports, strict=True)]


def _find(run: Path) -> Path:
    if run.is_file():
        return run
    if not run.is_dir():
        raise FileNotFoundError(f"`runs`: there is no {run}. Give the folder of an evaluation, or its {REPORT}.")
    if (run / REPORT).is_file():
        return run / REPORT
    found = sorted(run.rglob(REPORT))
    found = [path for path in found if VALIDATION not in path.relative_to(run).parts] or found
    if not found:
        raise FileNotFoundError(
            f"`runs`: no {REPORT} lies in {run} or below it. Make one by `lpl test` or `lpl evaluate`."
        )
    if len(found) > 1:
        raise ValueError(f"`runs`: {run} holds {len(found)} reports: {some(map(_about, found))}. Give one of them.")
    return found[0]


def _about(path: Path) -> str:
    """Where a report lies, and what tells it from others."""
    try:
        report = Report.read(path)
    except (ValueError, OSError):
        return f"{path} (damaged)"
    real = report.reference.get("name", "real ones")
    return f"{path} ({report.images.get('count')} images against {real}: {some(report.values)})"
