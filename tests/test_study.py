"""The commands of the study are ones that the command line takes."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SHARED

from lpl_lightning.cli import main

SCRIPT = ROOT / "notebooks" / "study.py"


def planned(folder: Path, experiment: str, scale: str) -> list[list[str]]:
    script = [sys.executable, str(SCRIPT), "plan", experiment, "--scale", scale, "--out", str(folder / "runs")]
    script += ["--profile"] if experiment == "thin" else []
    script += (
        ["--autoencoder", str(SHARED / "weights" / "taesd")] if experiment == "ceilings" and SHARED.is_dir() else []
    )
    said = subprocess.run([*script, "--photos", str(folder)], capture_output=True, text=True, check=True, cwd=ROOT)
    return [shlex.split(line) for line in said.stdout.splitlines()]


@pytest.mark.parametrize(
    ("scale", "experiments", "kinds"),
    [("cpu", ("main", "rivals", "thin", "ceilings"), 19), pytest.param("gpu", ("thin",), 8, marks=pytest.mark.slow)],
)
def test_commands_are_understood(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scale: str,
    experiments: tuple[str, ...],
    kinds: int,
) -> None:
    """One of each kind of run: config files, options, stand-ins."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    seen = set()
    for program, command, *options in (words for name in experiments for words in planned(tmp_path, name, scale)):
        kind = (
            command,
            *(word for word in options if word.endswith(".yaml") or word.startswith("--data=")),
            "stand_ins" in str(options),
        )
        if kind in seen:
            continue
        seen.add(kind)
        assert program == "lpl"
        with pytest.raises(SystemExit) as ended:
            main([command, *options, "--print_config"])
        said = capsys.readouterr()
        assert ended.value.code == 0, said.err
    assert len(seen) == kinds
    assert {kind[0] for kind in seen} == {"fit", "encode", "test"} | ({"profile"} if "thin" in experiments else set())


def test_each_run_has_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one of two would be taken for the other, which had been trained before."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    study = import_module("study")
    for scale in study.SCALES.values():
        known: dict[str, Any] = {}
        for run in (run for runs in study.experiments(scale).values() for run in runs):
            assert known.setdefault(run.name, run) == run


def test_differences_over_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Paired by seed, a run whose other is missing left out; the interval by its formula."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    lines = ["run,step,ema,num_steps,guidance,images,against,photos,value,is"]
    values = {"none": (10.0, 20.0, 30.0, 99.0), "lpl": (8.0, 19.0, 27.0)}
    for name, found in values.items():
        lines += [f"flow-{name}-{seed},5,0.9,50,2.0,100,val,10,fd,{x}" for seed, x in enumerate(found, start=1)]
    lines += ["flow-lpl-scratch,5,0.9,50,2.0,100,val,10,fd,1.0", "ddpm_v-none-1,5,0.9,50,2.0,100,val,10,fd,1.0"]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    said = import_module("study").table(tmp_path / "results.csv").splitlines()
    # Differences -2, -1, -3: mean -2, standard error 1 / sqrt(3), and 4.302653 deviations of two degrees of freedom.
    half = 4.302653 / 3**0.5
    assert said[2:] == [f"| flow | val | fd | 3 | 20 | 18 | -2 [{-2 - half:.4g}, {-2 + half:.4g}] | -10.0 % |"]
