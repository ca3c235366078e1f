"""Processes agree on a step that is not finite on one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import guard_ranks
import pytest
from forked import run_ranks
from safetensors.torch import load_file

from lpl_lightning.replay import ReplayingTrainer
from lpl_lightning.step_record import StepRecord


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(guard_ranks.__file__, folder)
    return folder


def said(folder: Path, strategy: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{strategy}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_processes_leave_out_what_one_cannot_use(strategy: str, folder: Path) -> None:
    found = said(folder, strategy)
    for own in found:
        assert own["skipped"] == 1
        assert own["unchanged"]
        assert own["went_on"]
        assert own["finite"]
    assert (found[0]["sum"] == found[1]["sum"]) == (strategy == "ddp")
    records = folder / strategy / "nonfinite"
    assert sorted(path.name for path in records.iterdir()) == [
        "asked-00000002-rank-0",
        "asked-00000002-rank-1",
        "asked-00000002-weights.safetensors",
        "step-00000001-rank-1",
        "step-00000001-weights.safetensors",
    ]
    assert StepRecord.read(records / "step-00000001-rank-1").about["loss_not_finite"]
    # The weights are whole, also where each process has a part of them.
    own_shapes = {name: value.shape for name, value in guard_ranks.parts()[0].state_dict().items()}
    written = load_file(records / "step-00000001-weights.safetensors")
    assert {name: value.shape for name, value in written.items()} == own_shapes


def test_all_processes_refuse_what_one_cannot_use(folder: Path) -> None:
    for own in said(folder, "ddp"):
        assert own["error"].startswith("Optimizer step 1 is not finite: the loss of process 1 and the gradient of")
    assert [path.name for path in (folder / "raise" / "nonfinite").iterdir()] == ["step-00000001-rank-1"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_process_stands_in_for_either(strategy: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpl_lightning.folded_convolution.NARROWEST", 128)  # as it was where they were recorded
    found = said(folder, strategy)
    assert found[0]["losses"][2] != found[1]["losses"][2]
    for rank in range(2):
        module, lpl = guard_ranks.parts()
        trainer = ReplayingTrainer(
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[lpl],
        )
        replay = trainer.replay(module, str(folder / strategy / "nonfinite" / f"asked-00000002-rank-{rank}"))
        assert replay.losses == [found[rank]["losses"][2]]
        assert replay.recorded_losses == [found[rank]["losses"][2]]
        assert trainer.world_size == 1
