from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lpl_lightning.metrics.spectrum import PowerSpectrum, Spectra
from lpl_lightning.metrics.spectrum_plot import plot_spectra, read_spectra, spectra_figure, write_spectra


def spectra(scale: float = 0.5, side: int = 16) -> Spectra:
    metric = PowerSpectrum(side)
    generator = torch.Generator().manual_seed(1)
    metric.update(torch.rand(4, 3, side, side, generator=generator) * 2 - 1, real=True)
    metric.update((torch.rand(4, 3, side, side, generator=generator) * 2 - 1) * scale, real=False)
    found: Spectra = metric.compute()
    return found


def test_csv_holds_every_digit(tmp_path: Path) -> None:
    written = spectra()
    path = write_spectra(written, tmp_path / "new" / "spectra.csv")
    read = read_spectra(path)
    assert read == {
        name: values.tolist() for name, values in written._asdict().items() if name != "mean_absolute_log_difference"
    }
    assert path.read_text().splitlines()[0].startswith("frequency,real_power,generated_power,")
    assert len(path.read_text().splitlines()) == 1 + 9


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    for text in ("", "a,b\n1,2\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="spectra with the columns"):
            read_spectra(path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = write_spectra(spectra(), tmp_path / "spectra.csv")
    path.write_text(path.read_text().rpartition(",")[0])
    with pytest.raises(ValueError, match=r"values in each line, got \d+ in line 10: it is cut off"):
        read_spectra(path)


def test_the_figure_shows_what_was_measured() -> None:
    pytest.importorskip("matplotlib")
    sets = {"with LPL": spectra(0.9), "without": spectra(0.5)}
    log_power, difference, error = spectra_figure(sets).axes
    for axes, field in ((log_power, "generated_log_power"), (difference, "log_difference"), (error, "error")):
        lines = {line.get_label(): line for line in axes.get_lines()}
        for name, found in sets.items():
            assert lines[name].get_xdata().tolist() == list(range(1, 9))
            assert lines[name].get_ydata().tolist() == getattr(found, field)[1:].tolist()
    real = next(line for line in log_power.get_lines() if line.get_label() == "real")
    assert real.get_ydata().tolist() == sets["without"].real_log_power[1:].tolist()


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot_spectra({"a": spectra()}, tmp_path / "new" / "spectra.png")
    with Image.open(path) as image:
        assert image.size == (1800, 540)
        assert len(set(image.convert("L").tobytes())) > 10


def test_sets_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="one image size"):
        spectra_figure({"a": spectra(), "b": spectra(side=8)})
    with pytest.raises(ValueError, match="one image size"):
        spectra_figure({})


def test_without_matplotlib_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        spectra_figure({"a": spectra()})
