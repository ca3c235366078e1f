"""A step that was written down, run again: equal numbers, and the module that gives what is not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, image_batch
from test_cli import in_folder, last_run
from test_mixin import Foreign
from torch import Tensor
from torch.utils.data import DataLoader

from lpl_lightning import EMA, Autoencoder, LatentDiffusionModule, LatentPerceptualLoss, LPLCallback, StepGuard
from lpl_lightning.cli import main
from lpl_lightning.replay import ReplayingTrainer
from lpl_lightning.step_record import StepRecord

MakeModule = Callable[..., LatentDiffusionModule]


def trainer(folder: Path, *callbacks: Any, **options: Any) -> ReplayingTrainer:
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    return ReplayingTrainer(callbacks=list(callbacks), **(settings | options))


def lpl() -> LPLCallback:
    def loss(autoencoder: Autoencoder) -> LatentPerceptualLoss:
        some_maps: Any = {"keep": 0.7}
        return LatentPerceptualLoss(autoencoder, reference_side=0, threshold=1.0, mask_outliers=False, subset=some_maps)

    return LPLCallback(loss=loss, ramp_steps=10)


def fit(run: ReplayingTrainer, module: Any, data: list[Any]) -> None:
    loader: Any = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    run.fit(module, loader, loader)


@pytest.mark.parametrize("precision", [pytest.param("32-true", marks=pytest.mark.slow), "bf16-mixed"])
def test_a_finite_step_has_the_losses_it_had(precision: str, make_module: MakeModule, tmp_path: Path) -> None:
    """The fourth step, of two batches: with its ramp of LPL's weight, subset, times, noise and dropout of classes."""
    torch.manual_seed(0)
    guard = StepGuard(record_steps=[3])
    run = trainer(tmp_path, lpl(), EMA(), guard, max_steps=5, accumulate_grad_batches=2, precision=precision)
    fit(run, make_module(dit=True), [image_batch(4) for _ in range(10)])
    torch.manual_seed(0)
    module = make_module(dit=True)
    for parameter in module.denoiser.parameters():  # what is trained is put back
        torch.nn.init.zeros_(parameter)
    torch.manual_seed(7)  # which a run without a seed of its own would take
    (folder,) = (tmp_path / "nonfinite").glob("asked-*-rank-0")
    again = trainer(tmp_path / "other", lpl(), EMA(), StepGuard(), precision=precision)
    found = again.replay(module, str(folder))
    assert [batch["number"] for batch in found.about["batches"]] == [6, 7]
    assert len(found.losses) == 2
    assert found.losses == found.recorded_losses
    assert found.is_equal
    assert not found.notes
    assert "Every output and every gradient is finite." in found.text()
    assert not (tmp_path / "other").exists()
    # The very numbers depend on each of what was put back.
    record = StepRecord.read(folder)
    for name, value in (("step", 0), ("module", {**record.about["module"], "lpl_lightning_seed": 5}), ("rank", 1)):
        changed = StepRecord({**record.about, name: value}, record.batches, record.random_states)
        other = changed.write(tmp_path / "nonfinite" / "changed")
        assert not trainer(tmp_path, lpl(), precision=precision).replay(module, str(other)).is_equal
    other_precision = trainer(tmp_path, precision="64-true").replay(module, str(folder))
    assert other_precision.notes == [
        f"the precision was {precision}, and is 64-true here.",
        "LPLCallback is in the run alone.",
    ]
    assert not other_precision.is_equal


def test_other_modules_have_their_random_numbers_back(tmp_path: Path) -> None:
    class Random(Foreign):
        def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(z0, batch_idx) * torch.rand(())

    torch.manual_seed(0)
    data = list(torch.randn(4, 4, 4, 4, 4))
    trainer(tmp_path, StepGuard(record_steps=[2]), max_steps=4).fit(Random(), DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    (folder,) = (tmp_path / "nonfinite").glob("asked-*-rank-0")
    assert trainer(tmp_path).replay(Random(), str(folder)).is_equal


def recorded(module: LatentDiffusionModule, tmp_path: Path, *bad: int) -> str:
    """Record of the step at which a module's training ends."""
    data = [image_batch(2) for _ in range(3)]
    for number in bad:
        data[number]["image"][0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        fit(trainer(tmp_path, lpl(), StepGuard(), max_steps=3), module, data)
    (folder,) = (tmp_path / "nonfinite").glob("step-*-rank-0")
    return str(folder)


def overflowing(make_module: MakeModule, name: str, backward: bool) -> LatentDiffusionModule:
    """A module one of whose layers gives infinity, or what has no gradient, for the third batch."""
    torch.manual_seed(0)
    module = make_module()
    layer = module.get_submodule(name)

    def spoil(_: Any, inputs: Any, output: Any) -> Any:
        if not layer.training_batch_is_bad:
            return output
        return output + (output.detach() - output).abs().sqrt().sum() if backward else output * float("inf")

    layer.training_batch_is_bad = False  # type: ignore[assignment]

    def watch(_: Any, inputs: Any) -> None:
        layer.training_batch_is_bad = module.trainer.fit_loop.total_batch_idx == 2  # type: ignore[assignment]

    module.denoiser.backbone.register_forward_pre_hook(watch)
    layer.register_forward_hook(spoil)
    return module


BLOCK = "denoiser.backbone.transformer_blocks.1"


def test_the_first_output_that_is_not_finite_is_named(make_module: MakeModule, tmp_path: Path) -> None:
    name = f"{BLOCK}.ff.net.0.proj"
    folder = recorded(overflowing(make_module, name, backward=False), tmp_path)
    found = trainer(tmp_path, lpl()).replay(overflowing(make_module, name, backward=False), folder)
    assert found.first_output == f"{name} (Linear) of batch 2, whose input is finite"
    assert f"First output that is not finite: {name} (Linear)" in found.text()
    assert found.about["step"] == 2


def test_the_first_gradient_that_is_not_finite_is_named(make_module: MakeModule, tmp_path: Path) -> None:
    """The square root of zero: a finite value without a finite gradient."""
    name = f"{BLOCK}.ff.net.2"
    folder = recorded(overflowing(make_module, name, backward=True), tmp_path)
    about = StepRecord.read(folder).about
    assert not about["loss_not_finite"]
    module = overflowing(make_module, name, backward=True)
    found = trainer(tmp_path, lpl()).replay(module, folder, anomaly=False)
    assert found.is_equal
    assert found.first_output is None
    assert found.first_gradient is not None
    before, after = f"{BLOCK}.ff.net.0 (GELU) of batch 2", f"{name} (Linear) of batch 2"
    assert found.first_gradient == f"{before}; that of {after}, which came before it, is finite"
    assert found.parameters == about["gradients_not_finite"]
    run = trainer(tmp_path, lpl())
    found = run.replay(overflowing(make_module, name, backward=True), folder)
    assert found.operation is not None
    assert "Backward0" in found.operation
    assert "sqrt" in found.operation, "the line of the forward pass"
    assert not torch.is_anomaly_enabled()
    assert not run._detect_anomaly, "nor in what the trainer does later"


def test_a_batch_that_came_so_is_named(make_module: MakeModule, tmp_path: Path) -> None:
    folder = recorded(make_module(), tmp_path, 1)
    found = trainer(tmp_path, lpl()).replay(make_module(), folder)
    assert found.inputs == ["0.image"]
    assert "Not finite as they came: 0.image." in found.text()


@pytest.mark.slow
def test_the_command_replays_what_a_run_has_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["-c", str(ROOT / "configs" / "quickstart.yaml"), "-c", str(ROOT / "configs" / "guards.yaml")]
    config += ["-c", str(ROOT / "configs" / "tiny.yaml"), "--trainer.enable_progress_bar=false", *in_folder(tmp_path)]
    main(["fit", *config, "--trainer.callbacks.record_steps=[1]", "--ckpt_path=last"])
    run = last_run(tmp_path)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    guards = [entry for entry in saved["trainer"]["callbacks"] if entry["class_path"].endswith("StepGuard")]
    assert guards[0]["init_args"]["policy"] == "skip"
    capsys.readouterr()
    main(["replay", "-c", str(run / "config.yaml"), f"--record={run / 'nonfinite' / 'asked-00000001-rank-0'}"])
    said = capsys.readouterr().out
    assert "Optimizer step 1 of process 0 of 1, 1 batches from number 1, weights of the record." in said
    assert ", equal." in said
    # The last that the config names is what its run would go on with, and not of the step.
    next((run / "nonfinite").glob("*-weights.safetensors")).unlink()
    command = ["replay", "-c", str(run / "config.yaml"), f"--record={run / 'nonfinite' / 'asked-00000001-rank-0'}"]
    with pytest.raises(ValueError, match="without the step's weights. Give `ckpt_path`"):
        main(command)
    main([*command, "--ckpt_path=last"])
    assert f"weights of {run / 'checkpoints'}" in capsys.readouterr().out


def test_what_cannot_be_replayed_is_refused(make_module: MakeModule, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`record` must be a folder that StepGuard has written"):
        trainer(tmp_path).replay(make_module(), str(tmp_path))
    (tmp_path / "record.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="its `format` is 'another'"):
        trainer(tmp_path).replay(make_module(), str(tmp_path))
    with pytest.raises(ValueError, match=r"one process, and the trainer has 2: add `--trainer.devices 1"):
        trainer(tmp_path, devices=2).replay(make_module(), str(tmp_path))
    folder = recorded(make_module(), tmp_path / "run", 1)
    with pytest.raises(ValueError, match="differ|other|match"):
        trainer(tmp_path).replay(make_module(dit=True), folder)
    next((tmp_path / "run" / "nonfinite").glob("*-weights.safetensors")).unlink()
    with pytest.raises(ValueError, match="without the step's weights. Give `ckpt_path`"):
        trainer(tmp_path).replay(make_module(), folder)


def test_what_is_no_tensor_is_kept_or_named(tmp_path: Path) -> None:
    batch = {"a": [torch.arange(3), "text", None], "b": (True, 2.5, {1: torch.tensor(1.0, dtype=torch.bfloat16)})}
    folder = StepRecord({}, [batch]).write(tmp_path / "step")
    (found,) = StepRecord.read(folder).batches
    assert torch.equal(found["a"].pop(0), batch["a"][0])  # type: ignore[arg-type]
    assert found["a"] == ["text", None]
    assert found["b"][:2] == (True, 2.5)
    assert found["b"][2][1].dtype == torch.bfloat16
    folder = StepRecord({}, [{"a": object()}]).write(tmp_path / "step")
    with pytest.raises(ValueError, match=r"its batch holds a builtins.object"):
        StepRecord.read(folder)
