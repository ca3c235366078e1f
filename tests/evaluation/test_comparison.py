from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reports import COUNT, DIM, SIDE, write_run
from safetensors.torch import load_file, save_file

from lpl_lightning.cli import main
from lpl_lightning.evaluation.bootstrap import FrechetToReference, Mean, interval, replicates
from lpl_lightning.evaluation.comparison import compare
from lpl_lightning.evaluation.comparison_images import embedded
from lpl_lightning.evaluation.comparison_runs import read_runs
from lpl_lightning.evaluation.comparison_text import markdown
from lpl_lightning.evaluation.differences import differences
from lpl_lightning.evaluation.report import Report, Resampling
from lpl_lightning.metrics.reference import ReferenceStatistics
from lpl_lightning.metrics.spectrum_plot import read_spectra

DRAWS = 60


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """A baseline, and a better run of the same seeds."""
    return [
        str(write_run(tmp_path / "base", "base", 0.6)),
        str(write_run(tmp_path / "lpl", "lpl", 0.1)),
    ]


def result(runs: list[str], out: Path, **settings: Any) -> dict[str, Any]:
    compare(runs, str(out), **({"resamples": DRAWS} | settings))
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def said(found: dict[str, Any], *words: str) -> bool:
    """Whether a note has all these words."""
    return any(all(word in note for word in words) for note in found["notes"])


def test_differences_and_their_intervals(two: list[str], tmp_path: Path) -> None:
    found = result(two, tmp_path / "out", seed=3)
    assert found["runs"] == ["base", "lpl"]
    assert found["baseline"] == "base"
    reports = [Report.read(run) for run in two]
    for name, row in found["rows"].items():
        base, lpl = row["cells"]["base"], row["cells"]["lpl"]
        assert [base["value"], lpl["value"]] == [report.values[name].value for report in reports]
        assert lpl["difference"] == pytest.approx(lpl["value"] - base["value"])
        assert base["difference"] is None
        for cell in (base, lpl):
            assert (cell["interval"] is None) == (name == "kid")
            assert name == "kid" or cell["interval"]["low"] < cell["value"] < cell["interval"]["high"]
    # By hand, of pairs: the same draws of both.
    tensors = [load_file(Path(run) / "samples.safetensors") for run in two]
    spread = found["rows"]["clip_score"]["cells"]["lpl"]["difference_interval"]
    draws = [replicates(Mean(each["clip"], 100), DRAWS, 3) for each in tensors]
    value = 100 * (tensors[1]["clip"].double().mean() - tensors[0]["clip"].double().mean()).item()
    assert (spread["low"], spread["high"]) == pytest.approx(interval(value, draws[1] - draws[0], False), abs=1e-5)
    reference = ReferenceStatistics.load(Path(two[0]) / "reference_given.safetensors")
    draws = [replicates(FrechetToReference(each["features_given"], reference), DRAWS, 3) for each in tensors]
    cell = found["rows"]["fid"]["cells"]["lpl"]
    expected = interval(cell["difference"], draws[1] - draws[0], True)
    assert (cell["difference_interval"]["low"], cell["difference_interval"]["high"]) == pytest.approx(expected)


def test_intervals_of_means_are_not_shifted(two: list[str], tmp_path: Path) -> None:
    """Of few draws the shift, which takes the bias of other values away, would be noise alone."""
    found = result(two, tmp_path / "out", resamples=10)["rows"]["clip_score"]["cells"]["base"]
    scores = load_file(Path(two[0]) / "samples.safetensors")["clip"]
    replicated = replicates(Mean(scores, 100), 10, 0)
    ends = replicated.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert [found["interval"]["low"], found["interval"]["high"]] == pytest.approx(ends, rel=1e-9)
    shift = found["value"] - replicated.mean().item()
    assert abs(shift) > 1e-3 * (ends[1] - ends[0])


def changed(run: str, name: str, **changes: Any) -> None:
    """Write a run's report with another value in the place of one."""
    report = Report.read(run)
    report.values[name] = replace(report.values[name], **changes)
    report.write(run)


def test_values_that_are_resampled_in_two_ways_have_no_interval_of_the_difference(
    two: list[str], tmp_path: Path
) -> None:
    """Of one number of the generated images, and of another of the real ones: no draw is of both."""
    how = Resampling("mean", "ssim", "real", 1.0)
    mean = load_file(Path(two[1]) / "samples.safetensors")["ssim"].mean().item()
    changed(two[1], "clip_score", value=mean, resampling=how)
    found = result(two, tmp_path / "out")["rows"]["clip_score"]["cells"]["lpl"]
    assert found["interval"] is not None
    assert found["difference"] is not None
    assert found["difference_interval"] is found["verdict"] is found["paired"] is None


def test_intervals_that_are_not_finite_are_left_out(two: list[str], tmp_path: Path) -> None:
    """A mean of numbers too large for their sum is infinite, and a difference of two such means is not a number."""
    for run in two:
        tensors = load_file(Path(run) / "samples.safetensors")
        tensors["clip"] = torch.full((COUNT,), 1e308, dtype=torch.float64)
        save_file(tensors, Path(run) / "samples.safetensors")
        changed(run, "clip_score", value=float("inf"))
    found = result(two, tmp_path / "out")
    for cell in found["rows"]["clip_score"]["cells"].values():
        assert cell["interval"] is cell["difference_interval"] is cell["verdict"] is None
    for run in ("base", "lpl"):
        assert said(found, f"clip_score: no interval of {run}, since it is not finite")


def test_verdicts_go_by_what_is_better(two: list[str], tmp_path: Path) -> None:
    rows = result(two, tmp_path / "out")["rows"]
    verdicts = {name: row["cells"]["lpl"]["verdict"] for name, row in rows.items()}
    assert verdicts["fid"] == verdicts["clip_score"] == verdicts["reconstruction_ssim"] == "better"
    assert verdicts["kid"] is None  # without an interval nothing is clear
    rows = result(two[::-1], tmp_path / "turned")["rows"]
    verdicts = {name: row["cells"]["base"]["verdict"] for name, row in rows.items()}
    assert verdicts["fid"] == verdicts["clip_score"] == verdicts["reconstruction_ssim"] == "worse"
    again = result(two, tmp_path / "other", baseline=1)
    assert again["baseline"] == "lpl"
    assert again["rows"]["fid"]["cells"]["base"]["verdict"] == "worse"
    # Neither way of brightness is better; all images are made brighter.
    tensors = load_file(Path(two[1]) / "samples.safetensors")
    report = Report.read(two[1])
    write_run(Path(two[1]), "lpl", 0.1)
    tensors["brightness"] += 1
    value = report.values["brightness"]
    report.values["brightness"] = type(value)(**{**vars(value), "value": tensors["brightness"].mean().item()})
    save_file(tensors, Path(two[1]) / "samples.safetensors")
    report.write(two[1])
    assert result(two, tmp_path / "third")["rows"]["brightness"]["cells"]["lpl"]["verdict"] == "differs"


def test_no_difference_is_clear_between_a_run_and_itself(two: list[str], tmp_path: Path) -> None:
    found = result([two[0], two[0]], tmp_path / "out")
    assert len(set(found["runs"])) == 2
    for row in found["rows"].values():
        cell = row["cells"][found["runs"][1]]
        assert cell["difference"] == 0
        assert cell["verdict"] is None
        assert cell["difference_interval"] in (None, {"low": 0, "high": 0})


def test_runs_of_other_seeds_are_no_pairs(two: list[str], tmp_path: Path) -> None:
    paired = result(two, tmp_path / "out")["rows"]
    assert {row["cells"]["lpl"]["paired"] for row in paired.values()} == {True, None}
    for seed in (1, None):
        write_run(Path(two[1]), "lpl", 0.1, seed=seed)
        found = result(two, tmp_path / "out")
        cells = {name: row["cells"]["lpl"] for name, row in found["rows"].items()}
        assert cells["clip_score"]["paired"] is cells["fid"]["paired"] is False
        assert cells["reconstruction_ssim"]["paired"] is True  # of real images, which are the same
        width = {
            name: cell["difference_interval"]["high"] - cell["difference_interval"]["low"]
            for name, cell in cells.items()
            if cell["difference_interval"]
        }
        before = paired["clip_score"]["cells"]["lpl"]["difference_interval"]
        assert width["clip_score"] > 5 * (before["high"] - before["low"])
        assert said(found, "No images of lpl", "seed")
    # Seeds that are unknown on both sides are not the same.
    write_run(Path(two[0]), "base", 0.6, seed=None)
    assert result(two, tmp_path / "out")["rows"]["fid"]["cells"]["lpl"]["paired"] is False


def test_images_of_other_captions_are_no_pairs(two: list[str], tmp_path: Path) -> None:
    """Of several runs, those are left out whose captions are others; one without captions is not."""
    captions = [f"a photo of {animal}" for animal in ("a dog", "a cat", "a cow", "an owl", "an ant")]
    write_run(Path(two[0]), "base", 0.6, captions=captions)
    write_run(Path(two[1]), "lpl", 0.1, captions=[*captions[:4], "a drawing of an ant"])
    two.append(str(write_run(tmp_path / "silent", "silent", 0.2)))
    found = result(two, tmp_path / "out", images=2)
    assert said(found, "No images of lpl are shown", "0000/000004 is of another caption")
    assert not said(found, "No images of silent")
    write_run(Path(two[1]), "lpl", 0.1, captions=captions)
    assert not said(result(two, tmp_path / "out"), "No images of lpl")


def test_rows_are_paired_by_their_images(two: list[str], tmp_path: Path) -> None:
    """Samples in another order are put in that of the images; other images are no pairs."""
    expected = result(two, tmp_path / "out")["rows"]
    path = Path(two[1]) / "samples.safetensors"
    tensors = load_file(path)
    order = torch.randperm(COUNT)
    for name in ("index_generated", "features_given", "clip", "brightness", "log_power"):
        tensors[name] = tensors[name][order]
    save_file(tensors, path)
    found = result(two, tmp_path / "out")["rows"]
    for name, row in expected.items():
        one, other = (each["cells"]["lpl"]["difference_interval"] for each in (row, found[name]))
        assert one is None or list(one.values()) == pytest.approx(list(other.values()), rel=1e-4, abs=1e-9)
    tensors["index_generated"] += 7
    save_file(tensors, path)
    assert result(two, tmp_path / "out")["rows"]["clip_score"]["cells"]["lpl"]["paired"] is False
    assert result(two, tmp_path / "out")["rows"]["reconstruction_ssim"]["cells"]["lpl"]["paired"] is True


def test_a_run_with_a_value_more(two: list[str], tmp_path: Path) -> None:
    for run, lost in zip(two, ("fid", "reconstruction_ssim"), strict=True):
        report = Report.read(run)
        del report.values[lost]
        report.write(run)
    found = result(two, tmp_path / "out")
    assert found["rows"]["fid"]["cells"]["lpl"]["interval"] is not None
    assert found["rows"]["fid"]["cells"]["lpl"]["difference"] is None
    assert list(found["rows"]["fid"]["cells"]) == ["lpl"]
    assert list(found["rows"]["reconstruction_ssim"]["cells"]) == ["base"]
    assert said(found, "fid: no difference of lpl to base, since the latter does not have it")


def test_references_that_differ_are_refused(two: list[str], tmp_path: Path) -> None:
    write_run(Path(two[1]), "lpl", 0.1, reference_hash="r1")
    with pytest.raises(ValueError, match=r"same real images, got photos \(hash r0.* for base.*hash r1.* for lpl"):
        compare(two, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_values_of_other_extractors_have_no_difference(two: list[str], tmp_path: Path) -> None:
    write_run(Path(two[1]), "lpl", 0.1, extractor={"weights": "xyz", "library": "given 2"})
    found = result(two, tmp_path / "out")
    cell = found["rows"]["fid"]["cells"]["lpl"]
    assert cell["difference"] is cell["difference_interval"] is None
    assert cell["interval"] is not None
    assert said(found, "fid: no difference of lpl", "`weights` (xyz, not abc)")
    assert not said(found, "library")
    assert found["rows"]["clip_score"]["cells"]["lpl"]["difference"] is not None
    # Another version of the library alone computes the same, and of another autoencoder it is the difference made.
    for measured in ({"library": "given 2"}, {"autoencoder": "another"}):
        write_run(Path(two[1]), "lpl", 0.1, extractor=measured)
        rows = result(two, tmp_path / "out")["rows"]
        assert rows["fid"]["cells"]["lpl"]["difference"] is not None
        ssim = rows["reconstruction_ssim"]["cells"]["lpl"]
        assert ssim["difference"] is not None
        assert ssim["difference_interval"] is not None


def test_other_numbers_of_images(two: list[str], tmp_path: Path) -> None:
    write_run(Path(two[1]), "lpl", 0.1, count=COUNT + 20)
    found = result(two, tmp_path / "out")
    assert said(found, "The numbers of images differ (60 of base, 80 of lpl)", "do not compare")
    assert found["rows"]["fid"]["cells"]["lpl"]["difference"] is None
    assert said(found, "fid: no difference", "biased by the number of images (`generated` 80, not 60)")
    clip = found["rows"]["clip_score"]["cells"]["lpl"]
    assert clip["difference"] is not None
    assert clip["paired"] is False
    assert found["rows"]["kid"]["cells"]["lpl"]["difference"] is not None


@pytest.mark.parametrize("biased", ["both", "base", "lpl"])
def test_what_is_biased_by_a_count_has_no_difference_where_it_differs(
    two: list[str], tmp_path: Path, biased: str
) -> None:
    """Whether it is resampled or not."""
    write_run(Path(two[1]), "lpl", 0.1, count=COUNT + 20)
    for run, name in zip(two, ("base", "lpl"), strict=True):
        if biased in ("both", name):
            changed(run, "kid", biased_by=("generated",))
    found = result(two, tmp_path / "out")
    assert found["rows"]["kid"]["cells"]["lpl"]["difference"] is None
    assert said(found, "kid: no difference of lpl to base, since it is biased", "(`generated` 80, not 60)")
    # Of a count that is the same, nothing follows.
    for run in two:
        changed(run, "kid", biased_by=("real",))
    assert result(two, tmp_path / "out")["rows"]["kid"]["cells"]["lpl"]["difference"] is not None


def test_what_differs_in_how_they_were_made(two: list[str], tmp_path: Path) -> None:
    write_run(Path(two[1]), "lpl", 0.1, versions={"torch": "3"}, generation={"seed": 0, "weights": "w", "eta": [0.5]})
    made = result(two, tmp_path / "out")["made"]
    assert made == {
        "weights": {"base": "w0.6", "lpl": "w"},
        "steps": {"base": "50", "lpl": "-"},
        "eta": {"base": "-", "lpl": "[0.5]"},
        "version of torch": {"base": "2", "lpl": "3"},
    }


@pytest.mark.parametrize("broken", ["missing", "damaged", "short", "lacking", "of another", "not finite"])
def test_without_samples_there_are_values_alone(two: list[str], tmp_path: Path, broken: str) -> None:
    path = Path(two[1]) / "samples.safetensors"
    tensors = load_file(path)
    if broken == "missing":
        path.unlink()
    elif broken == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    else:
        if broken == "short":
            tensors["features_given"] = tensors["features_given"][:9].clone()
        elif broken == "lacking":
            del tensors["features_given"]
        elif broken == "of another":
            tensors["features_given"] += 1
        else:
            tensors["features_given"][3, 2] = torch.nan
        save_file(tensors, path)
    found = result(two, tmp_path / "out")
    base, lpl = found["rows"]["fid"]["cells"]["base"], found["rows"]["fid"]["cells"]["lpl"]
    assert base["interval"] is not None
    assert lpl["interval"] is lpl["difference_interval"] is lpl["paired"] is lpl["verdict"] is None
    assert lpl["difference"] == pytest.approx(lpl["value"] - base["value"])
    assert said(found, "fid: no interval of lpl, since", "samples.safetensors")
    whole = broken in ("missing", "damaged")
    assert (found["rows"]["clip_score"]["cells"]["lpl"]["interval"] is None) == whole


def test_without_statistics_of_the_reference(two: list[str], tmp_path: Path) -> None:
    (Path(two[0]) / "reference_given.safetensors").unlink()
    found = result(two, tmp_path / "out")
    assert found["rows"]["fid"]["cells"]["base"]["interval"] is None
    assert found["rows"]["fid"]["cells"]["lpl"]["difference_interval"] is None
    assert said(found, "fid: no interval of base", "reference_given")
    other = ReferenceStatistics(torch.zeros(3).double(), torch.eye(3).double(), 9, {})
    other.save(Path(two[0]) / "reference_given.safetensors")
    assert said(result(two, tmp_path / "out"), "fid: no interval of base", f"features are 3, those of the images {DIM}")


def test_the_number_of_draws_and_the_seed(two: list[str], tmp_path: Path) -> None:
    one = result(two, tmp_path / "out")["rows"]
    assert result(two, tmp_path / "out")["rows"] == one
    assert result(two, tmp_path / "out", seed=1)["rows"] != one
    seen: list[int] = []
    differences(read_runs(two), advance=seen.append)
    assert sum(seen) == 2 * (200 + 4 * 1000)
    seen.clear()
    (Path(two[1]) / "samples.safetensors").unlink()
    differences(read_runs(two), resamples=DRAWS, advance=seen.append)
    assert sum(seen) == 2 * 5 * DRAWS


def test_runs_are_found_below_a_folder(two: list[str], tmp_path: Path) -> None:
    deep = tmp_path / "outer" / "deeper"
    shutil.copytree(two[0], deep / "run")
    runs = read_runs([str(tmp_path / "outer"), str(Path(two[1]) / "report.json")])
    assert [run.folder for run in runs] == [deep / "run", Path(two[1])]
    shutil.copytree(two[0], tmp_path / "outer" / "validation" / "last")
    assert [run.folder for run in read_runs([str(tmp_path / "outer"), two[1]])] == [deep / "run", Path(two[1])]
    validated = tmp_path / "outer" / "validation"
    assert read_runs([str(validated), two[1]])[0].folder == validated / "last"
    shutil.copytree(two[0], deep / "more")
    with pytest.raises(
        ValueError,
        match=r"2 reports: .*more.report.json \(60 images against photos: fid, .*run.report.json \(.*\)\. Give one",
    ):
        read_runs([str(tmp_path / "outer"), two[1]])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"`runs`: no report.json lies in .*empty or below it"):
        read_runs([str(tmp_path / "empty"), two[1]])
    with pytest.raises(FileNotFoundError, match="`runs`: there is no .*nowhere"):
        read_runs([str(tmp_path / "nowhere"), two[1]])


def test_names_are_made_unique(tmp_path: Path) -> None:
    folders = [str(write_run(tmp_path / name, "run")) for name in ("a", "b")]
    names = [run.name for run in read_runs([*folders, folders[0]])]
    assert names == [f"run ({folders[0]}) (1)", f"run ({folders[1]})", f"run ({folders[0]}) (3)"]
    write_run(tmp_path / "c", f"run ({folders[0]})")
    runs = read_runs([*folders, str(tmp_path / "c")])
    assert len({run.name for run in runs}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseline": 2}, "`baseline` must be one of the 2 runs, 0 to 1, got 2"),
        ({"baseline": -1}, "`baseline` must be 0 or more"),
        ({"resamples": 1}, "`resamples` must be 2 or more"),
        ({"images": -1}, "`images` must be 0 or more"),
        ({"seed": -1}, "`seed` must be 0 or more"),
    ],
)
def test_arguments_out_of_range_are_refused(two: list[str], settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(two, **settings)  # type: ignore[arg-type]


def test_one_run_is_refused(two: list[str]) -> None:
    with pytest.raises(ValueError, match="`runs` must be two evaluations or more, got"):
        compare(two[:1])


def test_folders_with_other_things_are_refused(two: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    compare(two, str(out), resamples=DRAWS)
    for name in ("comparison.md.123.unfinished", "spectra.png.45.unfinished.png"):
        (out / name).write_text("of a run that was stopped")
    for run in two:
        (Path(run) / "spectra.csv").unlink()
    compare(two, str(out), resamples=DRAWS)
    assert {path.name for path in out.iterdir()} == {"comparison.json", "comparison.md", "index.html", "images.png"}
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="`out` must be .*an earlier comparison.* holds thesis.tex"):
        compare(two, str(out))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("a page of one's own")
    with pytest.raises(ValueError, match="holds index.html"):
        compare(two, str(tmp_path / "site"))
    with pytest.raises(ValueError, match="`out` must be a folder"):
        compare(two, str(Path(two[0]) / "report.json"))
    assert (tmp_path / "site" / "index.html").read_text() == "a page of one's own"


def test_spectra(two: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    compare(two, str(tmp_path / "out"), resamples=DRAWS)
    with (tmp_path / "out" / "spectra.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for run, name in zip(two, ("base", "lpl"), strict=True):
        for column, values in read_spectra(Path(run) / "spectra.csv").items():
            assert [float(row[column]) for row in rows if row["run"] == name] == values
    with Image.open(tmp_path / "out" / "spectra.png") as image:
        assert image.size[0] > 1000
    assert "](spectra.png)" in (tmp_path / "out" / "comparison.md").read_text()
    (Path(two[1]) / "spectra.csv").write_text("a,b\n")
    found = result(two, tmp_path / "out")
    assert said(found, "No spectra of lpl", "with the columns")
    with (tmp_path / "out" / "spectra.csv").open(newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"base"}
    (Path(two[1]) / "spectra.csv").unlink()
    assert said(result(two, tmp_path / "out"), "No spectra of lpl: there is no file")
    (Path(two[0]) / "spectra.csv").unlink()
    assert not said(result(two, tmp_path / "out"), "No spectra")
    assert not (tmp_path / "out" / "spectra.csv").exists()


@pytest.mark.parametrize("name", ["_hidden", "$x_1$ costs $", "long " * 40])
def test_any_name_can_be_plotted(two: list[str], tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    write_run(Path(two[1]), name, 0.1)
    found = result(two, tmp_path / "out")
    assert (tmp_path / "out" / "spectra.png").exists()
    assert found["notes"] == []


def test_without_matplotlib_the_plot_alone_is_missing(
    two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = result(two, tmp_path / "out")
    assert said(found, "There is no spectra.png", "matplotlib")
    assert not (tmp_path / "out" / "spectra.png").exists()
    assert (tmp_path / "out" / "spectra.csv").exists()
    assert "](spectra.png)" not in (tmp_path / "out" / "comparison.md").read_text()
    assert "<polyline" in (tmp_path / "out" / "index.html").read_text()


def flat(*colours: str, side: int = SIDE) -> list[Image.Image]:
    return [Image.new("RGB", (side, side), colour) for colour in colours]


def test_the_grid_shows_runs_below_one_another(tmp_path: Path) -> None:
    runs = [
        str(write_run(tmp_path / "a", "a", pictures=flat("#100000", "#200000", "#300000"))),
        # One image more, one fewer, and another size.
        str(write_run(tmp_path / "b", "b", pictures=flat("#001000", "#002000", "#003000", "#004000", side=8))),
    ]
    (tmp_path / "b" / "images" / "0001" / "000001.png").unlink()
    found = result(runs, tmp_path / "out")
    with Image.open(tmp_path / "out" / "images.png") as grid:
        cell = SIDE + 2
        assert grid.size == (2 * cell + 2, 2 * cell + 2)
        colours = [[grid.getpixel((2 + cell * x + 8, 2 + cell * y + 8)) for x in (0, 1)] for y in (0, 1)]
    assert colours == [[(16, 0, 0), (48, 0, 0)], [(0, 16, 0), (0, 48, 0)]]
    assert "rows from above: a, b" in (tmp_path / "out" / "comparison.md").read_text()
    assert not said(found, "No images")
    compare(runs, str(tmp_path / "out"), resamples=DRAWS, images=1)
    with Image.open(tmp_path / "out" / "images.png") as grid:
        assert grid.size == (cell + 2, 2 * cell + 2)
    compare(runs, str(tmp_path / "out"), resamples=DRAWS, images=0)
    assert not (tmp_path / "out" / "images.png").exists()


def test_images_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    runs = read_runs([str(write_run(tmp_path / "a", "a", pictures=flat(*["red"] * 12)))])
    assert list(runs[0].images)[:3] == ["0000/000000", "0001/000001", "0000/000002"]
    assert list(runs[0].images)[-1] == "0001/000011"


def test_without_images_there_is_a_note(two: list[str], tmp_path: Path) -> None:
    shutil.rmtree(Path(two[1]) / "images")
    found = result(two, tmp_path / "out")
    assert said(found, "No images of lpl")
    assert not said(found, "No images of base")
    assert not (tmp_path / "out" / "images.png").exists()
    write_run(Path(two[1]), "lpl", 0.1)
    for path in (Path(two[1]) / "images").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    found = result(two, tmp_path / "out")
    assert said(found, "No images are shown, since one cannot be read")
    assert not list((tmp_path / "out").glob("*unfinished*"))


def test_many_bytes_of_images_are_made_fewer(tmp_path: Path) -> None:
    paths = []
    for number in range(4):
        noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(noise).save(paths[-1])
    addresses, notes = embedded(paths)
    assert notes == []
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    whole = sum(map(len, addresses))
    for largest in (whole // 2, whole // 20):
        addresses, notes = embedded(paths, largest)
        assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
        assert sum(map(len, addresses)) <= 1.05 * largest
        assert "JPEG of quality" in notes[0]
    assert "of their side" in notes[0]


def test_markdown_is_a_table(two: list[str], tmp_path: Path) -> None:
    write_run(Path(two[1]), "l|p<l>\n*x*", 0.1, notes=["seen | heard"])
    text = markdown(differences(read_runs(two), resamples=DRAWS), {})
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table[:8]} == {6}
    assert "l\\|p&lt;l> \\*x\\*" in table[0]
    fid = next(line for line in table if line.startswith("| fid"))
    report = Report.read(two[0])
    assert f"| lower | {report.values['fid'].value:.4g} [" in fid
    assert fid.endswith("] **better** |")
    assert "- l\\|p&lt;l> \\*x\\*: seen \\| heard" in text


def test_values_that_are_not_finite(two: list[str], tmp_path: Path) -> None:
    report = Report.read(two[1])
    value = report.values["kid"]
    report.values["kid"] = type(value)(**{**vars(value), "value": float("nan")})
    report.write(two[1])
    found = result(two, tmp_path / "out")
    assert found["rows"]["kid"]["cells"]["lpl"]["value"] == "nan"
    assert "nan" in (tmp_path / "out" / "index.html").read_text()


def test_runs_may_stand_after_options(two: list[str], tmp_path: Path) -> None:
    main(["compare", "--out", str(tmp_path / "a"), *two, "--resamples=5"])
    main(["compare", two[0], "--resamples", "5", two[1], f"--out={tmp_path / 'b'}"])
    assert (tmp_path / "a" / "index.html").read_text() == (tmp_path / "b" / "index.html").read_text()


def test_a_folder_that_cannot_be_made_is_refused(two: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`out` must be a folder, but .*file is a file"):
        compare(two, str(tmp_path / "file" / "out"))


def test_without_seeds_images_are_those_of_the_same_names(two: list[str], tmp_path: Path) -> None:
    for seed, alike in ((0, "seeds"), (None, "names")):
        for run, quality in zip(two, (0.6, 0.1), strict=True):
            write_run(Path(run), Path(run).name, quality, seed=seed)
        compare(two, str(tmp_path / "out"), resamples=DRAWS)
        for name in ("index.html", "comparison.md"):
            text = (tmp_path / "out" / name).read_text()
            assert f"Images of the same {alike}" in text
            assert text.count("Images of the same") == text.count(f"Images of the same {alike}")


def test_the_same_images_are_pairs_whatever_is_known_of_seeds(two: list[str], tmp_path: Path) -> None:
    copy = str(write_run(tmp_path / "copy", "copy", 0.6, seed=None))
    for seed in (None, 5):
        write_run(Path(two[0]), "base", 0.6, seed=seed)
        cell = result([two[0], copy], tmp_path / "out")["rows"]["clip_score"]["cells"]["copy"]
        assert cell["paired"] is True
        assert cell["difference_interval"] == {"low": 0, "high": 0}


def test_a_report_shows_no_images_of_elsewhere(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        folder = write_run(tmp_path / name, name, pictures=[Image.new("RGB", (8, 8), "red")] * 4)
        (folder / "images").rename(tmp_path / f"secret-{name}")
        said = json.loads((folder / "report.json").read_text())
        said["images"]["folder"] = f"../secret-{name}" if name == "a" else str(tmp_path / f"secret-{name}")
        (folder / "report.json").write_text(json.dumps(said))
        runs.append(str(folder))
    for options, shown in (([], 0), (["--trusted", "true"], 8)):
        main(["compare", *runs, "--out", str(tmp_path / "out"), "--resamples", "10", *options])
        page = (tmp_path / "out" / "index.html").read_text()
        assert page.count("data:image") == shown
        notes = json.loads((tmp_path / "out" / "comparison.json").read_text())["notes"]
        assert sum("which is not beside it" in note for note in notes) == (0 if shown else 2)


def test_a_report_that_names_a_reference_elsewhere(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, name)) for name in ("a", "b")]
    for run in runs:
        said = json.loads((Path(run) / "report.json").read_text())
        for value in said["values"].values():
            if (value["resampling"] or {}).get("kind") == "frechet":
                value["resampling"]["key"] = "features_/../../secret"
        (Path(run) / "report.json").write_text(json.dumps(said))
        tensors = load_file(Path(run) / "samples.safetensors")
        (feature,) = (name for name in tensors if name.startswith("features_"))
        save_file(tensors | {"features_/../../secret": tensors[feature].clone()}, Path(run) / "samples.safetensors")
        (Path(run) / "reference_").mkdir()
        (Path(run) / "reference_given.safetensors").rename(tmp_path / "secret.safetensors")
    main(["compare", *runs, "--out", str(tmp_path / "out"), "--resamples", "10"])
    notes = json.loads((tmp_path / "out" / "comparison.json").read_text())["notes"]
    assert any("does not lie in" in note for note in notes), notes
