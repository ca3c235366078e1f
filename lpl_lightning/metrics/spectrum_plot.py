"""Spectra as CSV and as a plot of the two figures of Berrada et al. (ICLR 2025) on frequencies."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lpl_lightning.metrics.spectrum import PAPER_BANDS, Spectra

__all__ = ["plot_spectra", "read_spectra", "spectra_figure", "write_spectra"]

_COLUMNS = [name for name in Spectra._fields if name != "mean_absolute_log_difference"]


def write_spectra(spectra: Spectra, path: str | Path) -> Path:
    """Write one row per frequency, one column per field of ``Spectra`` but the scalar.

    Numbers are written with all their digits, so that what is read back is the same.

    Args:
        spectra: What ``PowerSpectrum.compute`` gave.
        path: A .csv file, in a folder that exists or not. It is overwritten.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows(zip(*(getattr(spectra, name).tolist() for name in _COLUMNS), strict=True))
    return path


def read_spectra(path: str | Path) -> dict[str, list[float]]:
    """Read what ``write_spectra`` wrote: a list per column, by its name.

    Args:
        path: The .csv file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is something else.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0] != _COLUMNS:
        raise ValueError(
            f"`path`={str(path)!r} must be spectra with the columns {_COLUMNS}, got {rows[0] if rows else 'no rows'}. "
            "Give a file that `write_spectra` wrote."
        )
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(_COLUMNS):
            raise ValueError(
                f"`path`={str(path)!r} must have {len(_COLUMNS)} values in each line, got {len(row)} in line {number}: "
                "it is cut off or damaged. Make it anew by `write_spectra`."
            )
    values = [list(map(float, row)) for row in rows[1:]]
    return {name: [row[index] for row in values] for index, name in enumerate(_COLUMNS)}


def spectra_figure(sets: Mapping[str, Spectra]) -> Any:
    """Draw spectra of generated sets against that of real images.

    The panels, by frequency in cycles per image: mean log power; its difference from real images (Figure 4 of the
    paper); the relative error of the mean power (Figure 5), with lines where the paper parts low, middle and high
    frequencies. The mean of the images, frequency 0, is left out.

    Args:
        sets: Spectra by the name of the run they are of, all with the same real images.

    Returns:
        A ``matplotlib.figure.Figure``, which loggers take too, as TensorBoard's ``add_figure`` does.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There are none, or not all are of one image size.
    """
    sizes = {name: len(spectra.frequency) for name, spectra in sets.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"`sets` must hold spectra of one image size, got numbers of frequencies {sizes}.")
    try:
        figures: Any = import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plots need matplotlib, which is not installed: `pip install matplotlib`. "
            "Without it `write_spectra` writes the same numbers as CSV."
        ) from error
    figure = figures.Figure(figsize=(12, 3.6), layout="constrained")  # not pyplot's: nothing global holds it
    log_power, difference, error_of_mean = figure.subplots(1, 3)
    first = next(iter(sets.values()))
    frequency = first.frequency[1:].tolist()
    log_power.plot(frequency, first.real_log_power[1:].tolist(), color="black", label="real")
    difference.axhline(0.0, color="black", linewidth=0.8)
    for edge in PAPER_BANDS:
        error_of_mean.axvline(edge * frequency[-1], color="grey", linewidth=0.8, linestyle=":")
    for name, spectra in sets.items():
        log_power.plot(frequency, spectra.generated_log_power[1:].tolist(), label=name)
        difference.plot(frequency, spectra.log_difference[1:].tolist(), label=name)
        error_of_mean.plot(frequency, spectra.error[1:].tolist(), label=name)
    log_power.set_ylabel("mean log power")
    difference.set_ylabel("log power, generated - real")
    error_of_mean.set_ylabel("relative error of mean power")
    for axes in (log_power, difference, error_of_mean):
        axes.set_xlabel("cycles per image")
        axes.legend()
    return figure


def plot_spectra(sets: Mapping[str, Spectra], path: str | Path) -> Path:
    """Write ``spectra_figure`` to a file.

    Args:
        sets: Spectra by the name of the run they are of.
        path: Where to; the suffix says how: .png, .svg or .pdf. It is overwritten.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There are none, or not all are of one image size.
    """
    figure = spectra_figure(sets)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
