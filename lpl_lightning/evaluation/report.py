"""What an evaluation found, as JSON and as Markdown: each value beside how it was made.

A folder that an evaluation has written holds

- ``report.json``: this;
- ``report.md``: the same for people;
- ``samples.safetensors``: what was found of each image, for confidence intervals (``Resampling`` says of what);
- ``reference_NAME.safetensors``: ``ReferenceStatistics`` of the real images' features by extractor;
- ``spectra.csv`` and plots.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

__all__ = [
    "REPORT",
    "SAMPLES",
    "VALIDATION",
    "Provenance",
    "Report",
    "Resampling",
    "Value",
    "check_folder",
    "check_other",
    "formatted",
    "write_whole",
]

REPORT = "report.json"
SAMPLES = "samples.safetensors"
VALIDATION = "validation"
"""Folder, in a run's, of what ``lpl validate`` has found."""

_FORMAT = "lpl_lightning evaluation 2"

Provenance = Mapping[str, Any]
"""What something depends on, by name; plain values, as JSON holds them."""


@dataclass(frozen=True)
class Resampling:
    """How a value is computed anew of other images, for confidence intervals.

    Attributes:
        kind: ``mean`` of one number an image, times ``scale``; ``frechet``, the squared Frechet distance of features to
            ``reference_NAME.safetensors``; ``spectrum``, the mean over frequencies above 0 of the absolute difference
            of mean log power.
        key: For ``mean`` the tensor (N,) in ``samples.safetensors``; for ``frechet`` that of the features (N, D), which
            is ``features_NAME``; for ``spectrum`` that of the log power (N, bins), beside which ``KEY_real`` (bins,)
            holds the real images' mean.
        of: Whose images are drawn anew: ``generated`` or ``real``. Row i belongs to the image at the position that
            ``index_generated`` or ``index_real`` (N,) gives.
        scale: What a mean is multiplied by.
    """

    kind: Literal["mean", "frechet", "spectrum"]
    key: str
    of: Literal["generated", "real"] = "generated"
    scale: float = 1.0


@dataclass(frozen=True)
class Value:
    """One number, and how it was made.

    Attributes:
        value: It.
        better: Which way is better; None where neither is.
        provenance: What it depends on besides the images: extractor, weights' hash, resizing, counts of images.
        std: Standard deviation over the splits or subsets that it is a mean of, where it is one.
        resampling: How it is computed anew of other images; None where it is not.
        biased_by: Which counts in ``provenance`` move its expectation, so that it compares with none of another count;
            empty for means over images and other unbiased estimates.
    """

    value: float
    better: Literal["lower", "higher"] | None
    provenance: Provenance
    std: float | None = None
    resampling: Resampling | None = None
    biased_by: tuple[str, ...] = ()


@dataclass
class Report:
    """Values of one set of generated images.

    Attributes:
        name: What the set is called.
        values: By name.
        images: What was evaluated: ``folder``, ``count``, ``image_size`` in pixels, and ``hash`` of the pixels.
        reference: What it was compared with: ``name``, ``count``, ``hash``.
        generation: How the images were made: weights' hash, step, EMA's decay, sampler, steps, guidance, seed, ...;
            empty for images from elsewhere.
        made: All that the values depend on besides the generated images: ``suite``, the settings of each measure; the
            ``reference``'s hash; numbers and side of the images.
        versions: Of the libraries.
        notes: What a reader must know, such as what was left out and why.
    """

    name: str
    values: dict[str, Value]
    images: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; numbers that are not finite are strings."""
        found = {"format": _FORMAT, **asdict(self)}
        for value in found["values"].values():
            for key in ("value", "std"):
                if value[key] is not None and not math.isfinite(value[key]):
                    value[key] = str(value[key])
        return found

    def write(self, folder: str | Path) -> Path:
        """Write ``report.json`` and ``report.md``; returns the former's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "report.md", self.markdown())
        return write_whole(folder / REPORT, json.dumps(self.as_dict(), indent=1))

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """Read a ``report.json``, or that of a folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is something else, or of a version whose values do not compare with this one's.
        """
        path = Path(path)
        path = path / REPORT if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path}: make one by `lpl test` or `lpl evaluate`.")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if (written := found.pop("format")) != _FORMAT:
                raise ValueError(f"its `format` is {written!r}, not {_FORMAT!r}; evaluate the images again")
            values = found.pop("values")
            for value in values.values():
                if value["resampling"] is not None:
                    value["resampling"] = Resampling(**value["resampling"])
                value["value"] = float(value["value"])
                value["std"] = None if value["std"] is None else float(value["std"])
                value["biased_by"] = tuple(value["biased_by"])
            return cls(values={name: Value(**value) for name, value in values.items()}, **found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is no report as this version writes it: {error}.") from error

    def markdown(self) -> str:
        """The values as a table, and below it all that they depend on."""
        lines = [f"# {self.name}", "", "| value | | better | made with |", "|---|---|---|---|"]
        for name, value in self.values.items():
            spread = "" if value.std is None else f" ± {formatted(value.std)}"
            made = ", ".join(f"{key} {_short(said)}" for key, said in value.provenance.items())
            lines.append(f"| {name} | {formatted(value.value)}{spread} | {value.better or ''} | {made} |")
        for title, part in (
            ("Images", self.images),
            ("Reference", self.reference),
            ("Generation", self.generation),
            ("Versions", self.versions),
        ):
            if part:
                lines += ["", f"## {title}", "", *(f"- {key}: {_short(said)}" for key, said in part.items())]
        if self.notes:
            lines += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"


def formatted(value: float) -> str:
    """A number with four digits that count."""
    return f"{value:.4g}" if not math.isfinite(value) or abs(value) < 1000 else f"{value:.1f}"


def _short(said: Any) -> str:
    text = said if isinstance(said, str) else json.dumps(said)
    return text.replace("|", "\\|")


def check_folder(folder: Path, argument: str) -> None:
    """Refuse a folder that cannot be made, before what it is for takes time.

    Raises:
        ValueError: It, or one of those that it is to lie in, is a file.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"`{argument}` must be a folder, but {there} is a file. Give another.")


def check_other(folder: Path, argument: str, made: Mapping[str, Any]) -> None:
    """Refuse to write over a report that was made otherwise.

    Args:
        folder: Where a report is to be written.
        argument: What it was given as.
        made: What will make the new report, or as much of it as is known.

    Raises:
        ValueError: There is one that was made with something else.
    """
    if not (folder / REPORT).is_file():
        return
    known = Report.read(folder)
    if differ := sorted(key for key in made if known.made.get(key) != made[key]):
        raise ValueError(
            f"`{argument}`: {folder} holds a report that was made otherwise ({', '.join(differ)}; see `made` in "
            f"{REPORT}). Give another folder, or delete that file."
        )


def write_whole(path: Path, text: str) -> Path:
    """Write a UTF-8 text file, which appears whole or not at all; returns its path."""
    part = path.with_name(f"{path.name}.{uuid4().hex}.unfinished")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)
    return path
