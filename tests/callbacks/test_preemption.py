from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import ROOT, image_batch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lpl_lightning import EMA, LatentDiffusionModule, Preemption
from lpl_lightning.callbacks import AccumulatedGradients, UnfinishedValidation
from lpl_lightning.callbacks.preemption import _has_part, _is_a

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Signals(Callback):
    """Sends a signal to the process itself, at a batch."""

    def __init__(self, number: int, at: int) -> None:
        self.number, self.at = number, at
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(trainer.global_step)
        if batch_idx == self.at:
            os.kill(os.getpid(), self.number)


def fit(
    folder: Path,
    module: LatentDiffusionModule,
    *callbacks: Callback,
    validation: Any = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"max_steps": 6} | options),
    )
    batches: Any = [image_batch(2) for _ in range(12)]
    path = None if ckpt_path is None else str(ckpt_path)
    trainer.fit(module, DataLoader(batches, batch_size=None), validation, ckpt_path=path, weights_only=True)
    return trainer


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 3), (2, 2)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_next_step_and_ends(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule], number: int, accumulate: int, steps: int
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    sends = Signals(number, at=2)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=100)
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, make_module(), sends, EMA(), Preemption(), saving, accumulate_grad_batches=accumulate)
    assert ended.value.code == 128 + number
    assert len(sends.steps) == steps * accumulate
    found = torch.load(tmp_path / "saved" / "preempted.ckpt", weights_only=True)
    assert found["global_step"] == steps
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_without_signals_nothing_is_saved(tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    fit(tmp_path, make_module(), Preemption(), ModelCheckpoint(tmp_path / "saved", every_n_train_steps=100))
    assert not (tmp_path / "saved" / "preempted.ckpt").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_its_config_saves_at_the_last_batch_of_an_epoch_too(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]
) -> None:
    """Also where a validation comes much later, until which Lightning would put it off, or never."""
    config = yaml.safe_load((ROOT / "configs/preemptible.yaml").read_text())
    (saving,) = config["trainer"]["callbacks+"]
    options = saving["init_args"] | {"every_n_train_steps": 6, "dirpath": tmp_path / "saved"}
    batches: Any = [image_batch(2)]
    validation = DataLoader(batches, batch_size=None)
    seldom: dict[str, Any] = {
        "max_steps": 24,
        "max_epochs": -1,
        "val_check_interval": 100,
        "check_val_every_n_epoch": None,
    }
    fit(tmp_path, make_module(), ModelCheckpoint(**options), validation=validation, **seldom)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"recent-step=18.ckpt", "recent-step=24.ckpt"}


class TwoSteps(pl.LightningModule):
    """From the sixth batch on two optimizers step in each, so that steps are odd and pass over each multiple of ten."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nets = torch.nn.ModuleList([torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for net, optimizer in list(zip(self.nets, optimizers, strict=True))[: 2 if batch_idx > 4 else 1]:
            optimizer.zero_grad()
            self.manual_backward(net(batch["image"].mean((2, 3))).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in self.nets]


def test_processes_ask_one_another_though_steps_pass_over_the_multiple(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    sends = Signals(signal.SIGTERM, at=6)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=100)
    callbacks = (sends, Preemption(every_n_steps=10), saving)
    with pytest.raises(SystemExit):
        fit(tmp_path, TwoSteps(), *callbacks, max_steps=-1, max_epochs=1, use_distributed_sampler=False)  # type: ignore[arg-type]
    assert torch.load(tmp_path / "saved" / "preempted.ckpt", weights_only=True)["global_step"] == 11


def test_a_folder_elsewhere_is_saved_to(tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]) -> None:
    """As on s3://, and not in a folder of that name."""
    saving = ModelCheckpoint("memory://bucket/run", every_n_train_steps=100)
    with pytest.raises(SystemExit):
        fit(tmp_path, make_module(), Signals(signal.SIGTERM, 2), Preemption(), saving)
    assert get_filesystem("memory://").exists("/bucket/run/preempted.ckpt")


def test_without_a_checkpoint_callback_it_says_so(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]
) -> None:
    with pytest.warns(UserWarning, match="ends at step 3 without a checkpoint"), pytest.raises(SystemExit):
        fit(tmp_path, make_module(), Signals(signal.SIGTERM, 2), Preemption(), enable_checkpointing=False)


def test_a_job_of_slurm_is_put_back(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a real program in the place of scontrol; after the checkpoint is there, and only on the signal for it."""
    said = tmp_path / "said"
    program = tmp_path / "scontrol"
    saved = tmp_path / "saved" / "preempted.ckpt"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"print(*sys.argv[1:], os.path.exists({str(saved)!r}), file=open({str(said)!r}, 'a'))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, value in {
        "NTASKS": "1",
        "JOB_ID": "41",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
        "JOB_NAME": "train",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with pytest.raises(SystemExit):
            fit(
                tmp_path,
                make_module(),
                Signals(number, 2),
                Preemption(),
                ModelCheckpoint(tmp_path / "saved"),
                plugins=[SLURMEnvironment()],
            )
    assert said.read_text() == "requeue 41 True\n"


def test_arguments() -> None:
    with pytest.raises(ValueError, match="names of signals, such as SIGTERM, got USR1"):
        Preemption(["SIGTERM", "USR1"])
    with pytest.raises(ValueError, match="every_n_steps"):
        Preemption(every_n_steps=0)


@pytest.mark.parametrize("late", [EMA, AccumulatedGradients, UnfinishedValidation])
def test_it_saves_after_others_took_the_step_in(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule], late: type[Callback]
) -> None:
    with pytest.raises(ValueError, match=f"Preemption would save before {late.__name__} took the step in: put it"):
        fit(tmp_path, make_module(), Preemption(), late())


def test_a_timer_may_come_after_it(tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]) -> None:
    """Where Lightning puts it, for a trainer's ``max_time``."""
    timed = fit(tmp_path, make_module(), Preemption(), max_time="00:01:00:00")
    assert timed.global_step == 6


def test_callbacks_of_lightnings_other_package_may_too() -> None:
    lightnings = pytest.importorskip("pytorch_lightning").callbacks
    saving = lightnings.ModelCheckpoint()
    assert _is_a(saving, "Checkpoint")
    assert _is_a(saving, "ModelCheckpoint")
    assert not _has_part(lightnings.RichProgressBar())
    assert _has_part(EMA())


class SignalsInValidation(Callback):
    """Sends a signal in a batch of the second validation, and counts the batches of all."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.batches: list[int] = []
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self.batches.append(trainer.global_step)
        if len(self.batches) == 5 and self.number:
            os.kill(os.getpid(), self.number)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_signal_breaks_a_validation_off_which_is_made_anew(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]
) -> None:
    """With the weights as they were trained in the checkpoint, although the average was in place."""
    batches: Any = [image_batch(2) for _ in range(3)]
    module = make_module()
    sends = SignalsInValidation(signal.SIGUSR1)

    def callbacks(*more: Callback) -> list[Callback]:
        return [*more, EMA(decay=0.5), UnfinishedValidation(), Preemption(), ModelCheckpoint(tmp_path / "saved")]

    options: dict[str, Any] = {"val_check_interval": 2, "validation": DataLoader(batches, batch_size=None)}
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, module, *callbacks(sends), **options)
    assert ended.value.code == 128 + signal.SIGUSR1
    assert sends.batches == [2, 2, 2, 4, 4]
    found = torch.load(tmp_path / "saved" / "preempted.ckpt", weights_only=True)
    assert found["global_step"] == 4
    assert all(torch.equal(found["state_dict"][name], value) for name, value in sends.weights.items())
    assert all(torch.equal(module.state_dict()[name], value) for name, value in sends.weights.items())
    sees = SignalsInValidation(0)
    fit(tmp_path, module, *callbacks(sees), ckpt_path=tmp_path / "saved" / "preempted.ckpt", **options)
    assert sees.batches == [4, 4, 4, 6, 6, 6]


def test_of_several_signals_the_last_named_counts(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]
) -> None:
    """Whichever comes first; so SLURM's, on which a job is put back, is not forgotten over the one that ends it."""
    for first, second in ((signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1)):
        with pytest.raises(SystemExit) as ended:
            fit(
                tmp_path,
                make_module(),
                Signals(first, 2),
                Signals(second, 2),
                Preemption(),
                ModelCheckpoint(tmp_path / "saved"),
            )
        assert ended.value.code == 128 + signal.SIGUSR1


def test_it_comes_after_callbacks_of_the_module_s_own(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which Lightning puts behind all that were listed, and which have taken the step in when it saves."""

    class Counts(Callback):
        seen = 0

        def on_train_batch_end(self, *args: Any, **options: Any) -> None:
            self.seen += 1

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

    module = make_module()
    monkeypatch.setattr(module, "configure_callbacks", lambda: [Counts()])
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=100)
    with pytest.raises(SystemExit):
        fit(tmp_path, module, Signals(signal.SIGTERM, at=2), Preemption(), saving)
    found = torch.load(tmp_path / "saved" / "preempted.ckpt", weights_only=True)
    assert found["global_step"] == 3
    assert next(state for name, state in found["callbacks"].items() if "Counts" in name) == {"seen": 3}
