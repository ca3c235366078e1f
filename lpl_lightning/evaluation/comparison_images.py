"""The same images of several runs: which they are, as a grid, and as what a page holds."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Literal
from uuid import uuid4

from PIL import Image

from lpl_lightning.data.reading import read_rgb
from lpl_lightning.evaluation.comparison_runs import Run

__all__ = ["SameImages", "embedded", "same_images", "write_grid"]

LARGEST = 20 * 10**6
"""Bytes of images that a page holds at most."""

COLUMNS = 12
"""Images in a row of the grid."""

CELL = 256
"""Largest side of an image in the grid, in pixels."""


@dataclass(frozen=True)
class SameImages:
    """Images of several runs that belong together.

    Attributes:
        runs: Names of the runs that have them, the baseline first.
        names: CLASS/INDEX of each.
        captions: Of each; empty where there is none.
        paths: By run, in the order of ``runs``, then by image.
        alike: What they have in common: ``seeds`` that they were drawn from, or ``names`` where no seed is known.
    """

    runs: Sequence[str]
    names: Sequence[str]
    captions: Sequence[str]
    paths: Sequence[Sequence[Path]]
    alike: Literal["seeds", "names"] = "seeds"


def same_images(runs: Sequence[Run], baseline: int, count: int) -> tuple[SameImages | None, list[str]]:
    """Find the first images that the baseline and others have in common.

    Args:
        runs: The runs.
        baseline: Which of them the others are compared with.
        count: How many images at most.

    Returns:
        The images, or None where the baseline has none, or none in common with another; and what is left out and why.
    """
    base = runs[baseline]
    if not count:
        return None, []
    notes = [f"No images of {run.name}: {_why(run)}" for run in runs if not run.images]
    if not base.images:
        return None, notes
    chosen, names = [base], list(base.images)
    for run in runs:
        if run is base or not run.images:
            continue
        if run.seed != base.seed:
            notes.append(
                f"No images of {run.name} are shown: they were drawn from the seed {run.seed}, those of {base.name} "
                f"from {base.seed}."
            )
            continue
        common = [name for name in names if name in run.images]
        if not common:
            notes.append(f"No images of {run.name} are shown: none is called like one of {base.name}.")
            continue
        other = next((name for name in common if not _alike(base.images[name], run.images[name])), None)
        if other is not None:
            notes.append(f"No images of {run.name} are shown: {other} is of another caption than that of {base.name}.")
            continue
        chosen.append(run)
        names = common
    if len(chosen) < 2:
        return None, notes
    if base.seed is None:
        notes.append("The reports say no seed: images are paired by the names of their files.")
    names = names[:count]
    captions = [next(filter(None, (_caption(run.images[name]) for run in chosen)), "") for name in names]
    paths = [[run.images[name] for name in names] for run in chosen]
    alike: Literal["seeds", "names"] = "names" if base.seed is None else "seeds"
    return SameImages([run.name for run in chosen], names, captions, paths, alike), notes


def _why(run: Run) -> str:
    if (place := run.images_elsewhere) is not None:
        return f"its report says that they are in {place}, which is not beside it; `trusted` shows them all the same."
    return "its report names no folder of images that is there."


def _caption(image: Path) -> str:
    path = image.with_suffix(".txt")
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def _alike(image: Path, other: Path) -> bool:
    """Whether nothing says that images are of other captions."""
    captions = _caption(image), _caption(other)
    return captions[0] == captions[1] or not all(captions)


def write_grid(images: SameImages, path: Path) -> Path:
    """Write a PNG whose rows are the runs and whose columns the first of the images; it appears whole or not at all."""
    shown = [row[:COLUMNS] for row in images.paths]
    side = min(CELL, max(max(_read(row[0]).size) for row in shown))
    gap = max(2, side // 32)
    grid = Image.new("RGB", (len(shown[0]) * (side + gap) + gap, len(shown) * (side + gap) + gap), "white")
    for row, column in product(range(len(shown)), range(len(shown[0]))):
        image = _read(shown[row][column])
        scale = side / max(image.size)
        # Enlarged pixel by pixel: smoothing would hide what differs.
        filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        grid.paste(image.resize(size, filter_), (gap + column * (side + gap), gap + row * (side + gap)))
    part = path.with_name(f"{path.name}.{uuid4().hex}.unfinished")
    grid.save(part, format="PNG")
    part.replace(path)
    return path


def embedded(paths: Sequence[Path], largest: int = LARGEST) -> tuple[list[str], list[str]]:
    """Image files as ``data:`` addresses of together at most a number of bytes.

    Args:
        paths: The files.
        largest: Bytes at most. If they are more, images are encoded anew as JPEG, and made smaller if need be.

    Returns:
        The addresses, and a note of what was done to the images, if anything was.
    """
    share = 3 / 4 * largest  # base64 writes three bytes as four
    if all(path.suffix.lower() == ".png" for path in paths) and sum(path.stat().st_size for path in paths) <= share:
        return [_address("png", path.read_bytes()) for path in paths], []
    shrink = 1
    while True:
        for quality in (95, 85):
            files = [_jpeg(path, shrink, quality) for path in paths]
            if sum(map(len, files)) <= share or shrink >= 64:
                said = f"Images on the page are JPEG of quality {quality}"
                smaller = f", 1/{shrink} of their side" if shrink > 1 else ""
                return [_address("jpeg", file) for file in files], [f"{said}{smaller}, to keep it small."]
        shrink *= 2


def _read(path: Path) -> Image.Image:
    return read_rgb(str(path))


def _jpeg(path: Path, shrink: int, quality: int) -> bytes:
    buffer, image = BytesIO(), _read(path)
    if shrink > 1:
        image = image.resize((max(1, image.width // shrink), max(1, image.height // shrink)), Image.Resampling.LANCZOS)
    image.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _address(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
