"""Evaluations in the midst of training that a signal stops, and what becomes of them."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import pytest
import torch
from forked import run_ranks
from stopped_evaluation import fit

from lpl_lightning.evaluation import Report

CHECKPOINT = "version_0/checkpoints/preempted.ckpt"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]


def images(folder: Path) -> dict[Path, int]:
    """The images of the second step, in the folder of whatever run, and when they were written."""
    return {
        path: path.stat().st_mtime_ns for path in folder.glob("version_*/evaluation/step-00000002-*/images/*/*.png")
    }


def reports(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("version_*/evaluation/*/*/report.json"))


def test_a_signal_stops_it_and_the_run_makes_the_rest(tmp_path: Path) -> None:
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    losses = fit(whole)
    with pytest.raises(SystemExit) as ended:
        fit(folder, at=2)
    assert ended.value.code == 128 + signal.SIGUSR1
    assert reports(folder) == []
    first = images(folder)
    assert len(first) == 10  # two batches of five
    checkpoint = folder / CHECKPOINT
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2

    written = checkpoint.stat().st_mtime_ns
    with pytest.raises(SystemExit) as ended:  # it may be stopped once more, before anything new is trained
        fit(folder, at=1, ckpt_path=str(checkpoint))
    assert ended.value.code == 128 + signal.SIGUSR1
    assert checkpoint.stat().st_mtime_ns == written
    second = images(folder)
    assert len(second) == 15

    found = fit(folder, ckpt_path=str(checkpoint))
    assert found == {step: losses[step] for step in (3, 4)}
    assert images(folder).items() >= second.items() >= first.items()
    assert len(images(folder)) == 24
    assert all("version_0" in path.parts for path in images(folder)), "where they were begun"
    assert [path.parent.name[:13] for path in reports(folder)] == ["step-00000002", "step-00000004"]
    for path, expected in zip(reports(folder), reports(whole), strict=True):
        assert Report.read(path).images["hash"] == Report.read(expected).images["hash"]
        assert Report.read(path).generation["ema"] == 0.5
    with (folder / "version_2" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("eval_frechet_wavelet")]
    assert [int(row["step"]) for row in rows] == [2, 4]

    # What has been done is not done again, although the run begins where it was due.
    stamp = (reports(folder)[0] / "report.json").stat().st_mtime_ns
    fit(folder, ckpt_path=str(checkpoint))
    assert (reports(folder)[0] / "report.json").stat().st_mtime_ns == stamp


def test_one_that_had_not_begun_is_not_made_up_for(tmp_path: Path) -> None:
    """Such as of another command, whose settings are other ones."""
    with pytest.raises(SystemExit):
        fit(tmp_path, at=2)
    (found,) = (tmp_path / "version_0" / "evaluation").iterdir()
    found.rename(tmp_path / "elsewhere")
    fit(tmp_path, ckpt_path=str(tmp_path / CHECKPOINT))
    assert [path.parent.name[:13] for path in reports(tmp_path)] == ["step-00000004"]


def test_processes_stop_together(tmp_path: Path) -> None:
    """Also where the signal has reached one of them alone, and end at that very step."""
    script = Path(__file__).with_name("stopped_evaluation.py")
    run_ranks(script, tmp_path)
    assert reports(tmp_path) == []
    assert len(images(tmp_path)) == 20  # two batches of five on each
    checkpoint = tmp_path / CHECKPOINT
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    run_ranks(script, tmp_path, checkpoint)
    assert [path.parent.name[:13] for path in reports(tmp_path)] == ["step-00000002", "step-00000004"]
    assert [int(step) for step in json.loads((tmp_path / "losses-0.json").read_text())] == [3, 4]
