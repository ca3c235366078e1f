"""Numbers do not depend on how many processes computed them: real ones, under torchrun, against a single one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import device_run
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import SD3Transformer2DModel
from forked import run_ranks, run_script
from PIL import Image
from safetensors.torch import load_file
from test_cli import in_folder
from torch import Tensor

from lpl_lightning import FSDP2Strategy
from lpl_lightning.cli import main
from lpl_lightning.pretrained import read_state

LIVES = ("ddp-life", "fsdp2-life", "fsdp2-life_one-life", "ddp-life_fsdp2-life")
WAYS = (
    *LIVES,
    "ddp-accumulated",
    "fsdp2-accumulated",
    "ddp-mixed",
    "ddp-true",
    "ddp-lora",
    "fsdp2-mixed",
    "fsdp2-true",
    "fsdp2-lora",
    "fsdp2-refused",
    "fsdp2-shards",
    "ddp-broken",
    "fsdp2-broken",
    "ddp-broken_fsdp2-broken",
    "ddp-preempted",
    "fsdp2-preempted",
    "ddp-auto",
    "fsdp2-auto",
)
BUFFER = "denoiser.backbone.pos_embed.pos_embed"


def torchrun(folder: Path, *ways: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = ROOT / "tests" / "device_run.py"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [*command, str(script), str(folder), *ways],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one process, and then of two, which go on with what the one has left."""
    found = tmp_path_factory.mktemp("devices")
    one = ["one-life", "one-plain", "one-mixed", "one-true", "one-lora", "one-auto"]
    run_script(device_run.__file__, found, *one)
    run_ranks(device_run.__file__, found, *WAYS)
    return found


def result(folder: Path, way: str, rank: int = 0) -> Any:
    return torch.load(folder / f"{way}-{rank}.pt", weights_only=True)


def checkpoint(folder: Path, way: str, name: str = "end") -> Any:
    return torch.load(folder / way / f"{name}.ckpt", weights_only=True)


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), atol=atol, rtol=0, msg=name)


def assert_same_numbers(found: Mapping[str, float], wanted: Mapping[str, float], rel: float = 1e-5) -> None:
    assert found == pytest.approx(wanted, rel=rel)


def average(steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The moving average by its formula, in float64."""
    found = {name: tensor.double() for name, tensor in steps[0].items() if name != BUFFER}
    for step in steps[1:]:
        for name in found:
            found[name] = decay * found[name] + (1 - decay) * step[name].double()
    return found


@pytest.mark.parametrize("way", LIVES)
def test_losses_weights_averages_and_optimizer_are_those_of_one_process(folder: Path, way: str) -> None:
    """Stopped half-way and gone on, by another strategy too, LPL on a random subset, validation with one to fill up."""
    one, two = result(folder, "one-life"), result(folder, way)
    skipped = len(one["losses"]) - len(two["losses"])
    for found, wanted in zip(two["losses"], one["losses"][skipped:], strict=True):
        assert_same_numbers(found, wanted)
    assert_same_numbers(two["validation"], one["validation"])
    # Metrics of images see the levels that these differ by.
    of_images = {name for name in one["tested"] if "spectrum" in name}
    assert of_images
    assert two["tested"].keys() == one["tested"].keys()
    for name, value in one["tested"].items():
        assert two["tested"][name] == pytest.approx(value, rel=1e-3 if name in of_images else 1e-5), name
    assert_same(two["weights"], one["weights"])
    own, other = checkpoint(folder, way), checkpoint(folder, "one-life")
    assert_same(own["state_dict"], other["state_dict"])
    for decay, averages in other["lpl_lightning_averages"].items():
        assert_same(own["lpl_lightning_averages"][decay], averages)
    (state,), (wanted,) = own["optimizer_states"], other["optimizer_states"]
    assert state["param_groups"] == wanted["param_groups"]
    for number, of_parameter in wanted["state"].items():
        assert_same(state["state"][number], of_parameter)
    assert own.keys() == other.keys()


@pytest.mark.parametrize("way", LIVES)
def test_what_is_seen_of_lpl_is_that_of_one_process(folder: Path, way: str) -> None:
    """Of all processes' samples: shares, masks, levels of noise, and the ratio of gradients."""
    one, two = result(folder, "one-life")["diagnostics"], result(folder, way)["diagnostics"]
    assert any(steps["lpl_gradient_ratio"] > 0 for steps in one)
    for found, wanted in zip(two, one[len(one) - len(two) :], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6, nan_ok=True)


def test_a_run_that_was_stopped_is_the_run_that_was_not_bit_for_bit(folder: Path) -> None:
    assert_same(checkpoint(folder, "one-life")["state_dict"], result(folder, "one-plain")["weights"], atol=0)
    assert result(folder, "one-life")["losses"] == result(folder, "one-plain")["losses"]


def test_processes_have_none_past_the_gate_alone_and_together(folder: Path) -> None:
    for strategy in ("ddp", "fsdp2"):
        first, second = (result(folder, f"{strategy}-life", rank)["passed"] for rank in (0, 1))
        passed = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
        assert {(False, True), (True, False), (False, False)} <= set(passed)


@pytest.mark.parametrize("way", ["one-life", *LIVES[:2]])
def test_averages_are_those_of_the_formula_and_in_place_where_they_should(folder: Path, way: str) -> None:
    """Of the weights after each step: in the checkpoint, also one from within a validation, and in validation."""
    run, within, end = result(folder, way), checkpoint(folder, way, "half"), checkpoint(folder, way)
    steps = run["steps"]
    assert len(steps) == device_run.STEPS
    assert_same(within["state_dict"], steps[1], atol=0)
    assert_same(end["state_dict"], steps[-1], atol=0)
    for decay in (0.5, 0.9):
        assert_same(within["lpl_lightning_averages"][str(decay)], average(steps[:2], decay))
        assert_same(end["lpl_lightning_averages"][str(decay)], average(steps, decay))
    for validated, last in ((run["validated"][0], 2), (run["validated"][-1], 4), (run["weights"], 4)):
        assert_same({name: validated[name] for name in validated if name != BUFFER}, average(steps[:last], 0.5))
    assert_same(load_file(folder / way / "weights.safetensors"), run["weights"], atol=0)
    exported = SD3Transformer2DModel.from_pretrained(folder / way / "diffusers" / "transformer").state_dict()
    prefix = "denoiser.backbone."
    backbone = {name.removeprefix(prefix): run["weights"][name] for name in run["weights"] if name.startswith(prefix)}
    assert_same(exported, backbone, atol=0)


@pytest.mark.parametrize("way", LIVES)
def test_images_are_those_of_one_process(folder: Path, way: str) -> None:
    """Grids in training, and predictions, of which one process has a batch more to make; a level apart at most."""
    for kind, count in (("samples", 2), ("generated", 9)):
        found, wanted = (sorted((folder / run / kind).rglob("*.png")) for run in (way, "one-life"))
        assert len(found) == len(wanted) == count
        for a, b in zip(found, wanted, strict=True):
            first, second = (np.asarray(Image.open(path)).astype(int) for path in (a, b))
            assert np.abs(first - second).max() <= 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_batches_that_are_accumulated_are_those_of_a_larger_one(folder: Path, strategy: str) -> None:
    """And activations that are computed anew; gradients are reduced once a step."""
    one, two = result(folder, "one-plain"), result(folder, f"{strategy}-accumulated")
    pairs = list(zip(two["losses"][::2], two["losses"][1::2], strict=True))
    for (a, b), wanted in zip(pairs, one["losses"], strict=True):
        assert_same_numbers({name: (a[name] + b[name]) / 2 for name in a}, wanted)
    assert_same(two["weights"], one["weights"], atol=5e-6)  # Adam divides by gradients near zero
    assert_same_numbers(two["validation"], one["validation"])
    if strategy == "fsdp2":
        blocks = [f"denoiser.backbone.transformer_blocks.{i}" for i in range(2)]
        assert two["sharded"] == ["denoiser.backbone", *blocks, "conditioner"]
        assert two["reduced"][::2] == [0] * device_run.STEPS
        assert all(two["reduced"][1::2])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("variant", ["mixed", "true", "lora"])
def test_bfloat16(folder: Path, variant: str, strategy: str) -> None:
    """To the precision of its eight bits; also that of frozen weights alone."""
    one, two = result(folder, f"one-{variant}"), result(folder, f"{strategy}-{variant}")
    for found, wanted in zip(two["losses"], one["losses"], strict=True):
        assert found["loss_diffusion"] == pytest.approx(wanted["loss_diffusion"], rel=2e-2)
    assert two["weights"].keys() == one["weights"].keys()
    kind = torch.bfloat16 if variant == "true" else torch.float32
    assert {tensor.dtype for name, tensor in two["weights"].items() if name != BUFFER} == {kind}


def test_what_would_not_be_kept_equal_is_refused(folder: Path, make_module: Any) -> None:
    said = result(folder, "fsdp2-refused")["said"]
    assert "trains temperature, which lies neither in the denoiser's backbone nor in the conditioner" in said
    module = make_module()
    module._device_mesh = {"tensor_parallel": TwoProcesses()}
    with pytest.raises(ValueError, match="`tensor_parallel_size` \\d+: take lpl_lightning.FSDP2Strategy"):
        module.configure_model()


@pytest.mark.slow
def test_compiled_blocks(tmp_path: Path) -> None:
    torchrun(tmp_path, "fsdp2-accumulated", "fsdp2-compiled", "ddp-compiled")
    plain, *others = (result(tmp_path, f"{way}") for way in ("fsdp2-accumulated", "fsdp2-compiled", "ddp-compiled"))
    for other in others:
        assert_same(other["weights"], plain["weights"], atol=1e-5)


class TwoProcesses:
    """What a mesh says of one of its axes."""

    def size(self) -> int:
        return 2


def stack(*names: str) -> list[str]:
    return [word for name in names for word in ("-c", f"{ROOT}/configs/{name}.yaml")]


def by_command(folder: Path, overlay: str, tasks: Callable[[list[str]], None]) -> Path:
    """A checkpoint of two processes that ``lpl fit`` trained, EMA and LPL on."""
    configs = [
        word for name in ("imagenet256", "flow", "lpl", overlay, "tiny") for word in ("-c", f"configs/{name}.yaml")
    ]
    options = ["--trainer.devices=2", "--trainer.enable_progress_bar=false", *in_folder(folder)]
    tasks(["-m", "lpl_lightning", "fit", *configs, *options])
    (found,) = folder.rglob("last.ckpt")
    return found


def by_torchrun(command: list[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, *command], capture_output=True, text=True, check=False, timeout=300, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-6000:]


def by_slurm(command: list[str]) -> None:
    """Two tasks with what ``srun`` tells each of them in a job of one node, by a script as in configs/README.md."""
    job = {"JOB_ID": "1234", "JOB_NAME": "lpl", "NNODES": "1", "NODEID": "0", "NODELIST": "127.0.0.1"}
    job |= {"NTASKS": "2", "NTASKS_PER_NODE": "2"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = []
    for number in ("0", "1"):
        given = {f"SLURM_{name}": value for name, value in (job | {"PROCID": number, "LOCALID": number}).items()}
        environment = os.environ | given | {"PYTHONPATH": str(ROOT), "MASTER_PORT": str(port)}
        tasks.append(
            subprocess.Popen(
                [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=ROOT
            )
        )
    try:
        said = [task.communicate(timeout=300)[1].decode() for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in said[1]


@pytest.mark.slow
def test_the_command_line_trains_by_fsdp2_and_predicts_with_the_average_asked_for(tmp_path: Path) -> None:
    source = by_command(tmp_path, "fsdp2", by_torchrun)
    configs = [
        word for name in ("imagenet256", "flow", "lpl", "tiny") for word in ("-c", f"{ROOT}/configs/{name}.yaml")
    ]
    options = ["--ckpt_path", str(source), "--data.num_generate=2", *in_folder(tmp_path)]

    def predicted(name: str, *ema: str) -> list[bytes]:
        main(["predict", *configs, *options, *ema, f"--writer.dirname={tmp_path / name}"])
        return [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.png"))]

    average, weights = predicted("average", "--ema", "0.99975"), predicted("weights", "--ema", "trained")
    assert len(average) == 2
    settings = [json.loads((tmp_path / name / "settings.json").read_text()) for name in ("average", "weights")]
    assert settings[0]["weights_blake2b"] != settings[1]["weights_blake2b"]
    assert len(weights) == 2
    with pytest.raises(ValueError, match=r"of decay 0.5, but the checkpoint holds those of \[0.99975\]"):
        predicted("other", "--ema", "0.5")
    with pytest.raises(ValueError, match="give `--ckpt_path` too"):
        main(["validate", *configs, *in_folder(tmp_path), "--ema", "0.5"])


@pytest.mark.slow
def test_the_command_line_trains_by_ddp_as_tasks_of_slurm(tmp_path: Path) -> None:
    source = by_command(tmp_path, "ddp", by_slurm)
    found = torch.load(source, weights_only=True)
    assert found["global_step"] == 2
    assert found["lpl_lightning_averages"].keys() == {"0.99975"}


def test_another_number_of_tasks_than_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"JOB_NAME": "lpl", "NNODES": "1", "NODEID": "0", "NTASKS": "2", "NTASKS_PER_NODE": "2"}
    for name, value in (job | {"PROCID": "0", "LOCALID": "0"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for devices, nodes, said in ((4, 1, "Set `devices=2`"), (2, 2, "Set `num_nodes=1`")):
        run = pl.Trainer(accelerator="cpu", strategy=FSDP2Strategy(), logger=False, devices=devices, num_nodes=nodes)
        with pytest.raises(ValueError, match=said):
            run.strategy.setup_environment()


def test_weights_that_are_sharded_are_not_gathered_in_inference_mode(folder: Path) -> None:
    """Which Lightning turns on where processes talk by NCCL; what was gathered so takes part in no training."""
    assert result(folder, "fsdp2-life")["inference_mode"] is False
    assert result(folder, "ddp-life")["inference_mode"] is True


def test_a_folder_of_shards_is_gone_on_with(folder: Path) -> None:
    one, two = result(folder, "one-life"), result(folder, "fsdp2-shards")
    for found, wanted in zip(two["losses"], one["losses"], strict=True):
        assert_same_numbers(found, wanted)
    assert_same(two["weights"], one["weights"])
    half = folder / "fsdp2-shards" / "half"
    assert half.is_dir()
    whole = checkpoint(folder, "one-life", "half")
    assert_same(read_state(str(half)), whole["state_dict"])
    assert_same(read_state(str(half), 0.5), whole["state_dict"] | whole["lpl_lightning_averages"]["0.5"])


@pytest.mark.parametrize("way", ["ddp-broken", "fsdp2-broken", "ddp-broken_fsdp2-broken"])
def test_a_step_of_which_a_part_was_saved_is_the_whole_step(folder: Path, way: str) -> None:
    """Gradients of the batches before, of all processes, also of those that had not been reduced yet; saved twice."""
    one, two = result(folder, "one-plain"), result(folder, way)
    losses = two["losses"][-8:]
    for number, wanted in enumerate(one["losses"][-2:]):
        batches = losses[4 * number : 4 * number + 4]
        assert_same_numbers({name: sum(batch[name] for batch in batches) / 4 for name in wanted}, wanted)
    assert_same(two["weights"], one["weights"], atol=5e-6)
    for number in (0, 1):
        path = f"{number}.ckpt"
        kept = torch.load(folder / way.split("_")[-1] / path, weights_only=True)["lpl_lightning_gradients"]
        assert kept.keys() == one["weights"].keys() - {BUFFER}
        other = torch.load(folder / "ddp-broken" / path, weights_only=True)["lpl_lightning_gradients"]
        assert_same(kept, other)


@pytest.mark.parametrize("way", ["ddp-preempted", "fsdp2-preempted"])
def test_a_signal_to_any_process_ends_all(folder: Path, way: str) -> None:
    """At a step that they agree on, with a checkpoint; the first exits as if it had got the signal itself."""
    assert [result(folder, way, rank)["code"] for rank in (0, 1)] == [128 + signal.SIGUSR1, 0]
    assert [result(folder, way, rank)["step"] for rank in (0, 1)] == [3, 3]
    assert checkpoint(folder, way, "preempted")["global_step"] == 3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_weight_of_lpl_that_is_measured_over_a_stop_is_that_of_one_process(folder: Path, strategy: str) -> None:
    """The checkpoint holds what all processes have measured: the first has no sample past the gate in one of them."""
    one, two = result(folder, "one-auto"), result(folder, f"{strategy}-auto")
    assert one["of_lpl"][0] is two["of_lpl"][0] is None
    assert two["of_lpl"][1] == pytest.approx(one["of_lpl"][1], rel=1e-5)
    for found, wanted in zip(two["losses"], one["losses"], strict=True):
        assert_same_numbers(found, wanted)
    assert_same(two["weights"], one["weights"])
