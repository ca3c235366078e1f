"""Real runs of ``lpl fit`` that are killed and go on; ``soak.py`` has the long form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from soak import differences, losses


@pytest.mark.parametrize("seed", [2])
def test_a_run_through_kills_and_faults_equals_one_left_alone(tmp_path: Path, seed: int) -> None:
    """In weights, averages, optimizer, schedule, callbacks and the losses of batches and validations, bit for bit."""
    options = {"kills": 3, "steps": 16, "every": 4, "photos": 60, "batch_size": 4, "seed": seed}
    script = [sys.executable, str(Path(__file__).parent / "soak.py"), str(tmp_path / "soak")]
    ran = subprocess.run(
        [*script, *(f"--{name}={value}" for name, value in options.items())],
        capture_output=True,
        text=True,
        timeout=900,
    )
    log = tmp_path / "soak" / "killed.log"
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}{log.read_text() if log.exists() else ''}"
    verdict = json.loads((tmp_path / "soak" / "verdict.json").read_text())
    assert verdict["equal"]
    assert verdict["SIGKILL"] + verdict["SIGTERM"] == 3
    assert len(losses(tmp_path / "soak" / "killed")) == verdict["batch losses"] == 32
    assert verdict["validation losses"] in (1, 2)


def test_differences_are_found() -> None:
    """What the verdict rests on."""
    one = {"a": [torch.ones(2), {"b": 1.0}], "c": 2}
    assert differences(one, {"a": [torch.ones(2), {"b": 1.0}], "c": 2}) == []
    assert differences(one, {"a": [torch.tensor([1.0, 1.0 + 2**-23]), {"b": 1.0}], "c": 2}) == ["/a/0"]
    assert differences(one, {"a": [torch.ones(2, dtype=torch.float64), {"b": 2.0}]}) == ["/c", "/a/0", "/a/1/b"]
    assert differences([1], [1, 2]) == [""]
