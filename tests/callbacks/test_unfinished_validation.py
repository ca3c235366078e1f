from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import image_batch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lpl_lightning import LatentDiffusionModule
from lpl_lightning.callbacks import AccumulatedGradients, UnfinishedValidation

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")

BATCHES = 4


class Rest:
    """A loader that goes on in an epoch where a checkpoint was written."""

    def __init__(self) -> None:
        self.given = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        for number in range(self.given % BATCHES, BATCHES):
            self.given = number + 1
            yield image_batch(2) | {"image": torch.full((2, 3, 16, 16), number / 8)}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


class Record(Callback):
    """Keeps the losses, of training and validation, by batches trained; saves at one of the hooks."""

    def __init__(self, folder: Path | None = None, hook: str = "") -> None:
        self.folder, self.hook = folder, hook
        self.trained: list[tuple[int, float]] = []
        self.validated: list[tuple[int, int, float]] = []
        self.found: list[tuple[int, int, float]] = []
        self.batches = 0
        self.logged: list[int] = []  # steps that loggers are told
        self.rates: list[float] = []

    def save(self, trainer: pl.Trainer, hook: str) -> None:
        if self.folder is not None and hook == self.hook:
            trainer.save_checkpoint(self.folder / f"{len(self.trained)}.ckpt")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append((trainer.fit_loop.total_batch_idx, float(outputs["loss"])))
        self.logged.append(trainer.fit_loop.epoch_loop._batches_that_stepped)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.save(trainer, "batch")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.save(trainer, "epoch")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validated.append((trainer.fit_loop.total_batch_idx, batch_idx, float(outputs["loss"])))
        if batch_idx == 1:
            self.save(trainer, "validation batch")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        loss = float(trainer.callback_metrics["val_loss"])
        self.found.append((trainer.fit_loop.total_batch_idx, trainer.global_step, loss))
        self.batches = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed
        self.save(trainer, "validation")


def recorded(
    record: Record, make_module: Callable[..., LatentDiffusionModule], ckpt_path: Path | None = None, **options: Any
) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # of the autoencoder, which checkpoints do not hold
    module = make_module()
    module.validation_step = steps_with_losses(module)  # type: ignore[method-assign]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[UnfinishedValidation(), AccumulatedGradients(), record],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"max_epochs": 2} | options),
    )
    loader: Any = Rest()
    batches: Any = [image_batch(2) for _ in range(3)]
    validation = DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, validation, ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=True)
    return {name: value.clone() for name, value in module.state_dict().items()}


def steps_with_losses(module: LatentDiffusionModule) -> Any:
    plain = module.validation_step

    def step(batch: Any, batch_idx: int) -> Any:
        plain(batch, batch_idx)
        return {"loss": torch.tensor(float(batch_idx))}

    return step


@pytest.mark.parametrize(
    "options",
    [{"val_check_interval": 2}, {}, {"val_check_interval": 3, "check_val_every_n_epoch": None}],
    ids=["within epochs", "after epochs", "across epochs"],
)
@pytest.mark.parametrize("hook", ["batch", "validation batch", "validation"])
def test_each_validation_is_made_once_and_whole(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule], hook: str, options: dict[str, Any]
) -> None:
    """Whatever a run goes on from: its losses, its weights and what validations find are those of one that went on."""
    whole = Record(tmp_path, hook)
    weights = recorded(whole, make_module, **options)
    saved = {int(path.stem): path for path in tmp_path.glob("*.ckpt")}
    assert len(saved) == (2 * BATCHES if hook == "batch" else len(whole.found))
    ends = {batch + 1 for batch, _, _ in whole.found}
    for batches, path in saved.items():
        if not ends & {batches, batches + 1}:
            continue
        rest = Record()
        found = recorded(rest, make_module, path, **options)
        assert rest.trained == whole.trained[batches:]
        done = batches + (hook == "validation")
        assert rest.found == [one for one in whole.found if one[0] + 1 >= done]
        assert rest.batches in (0, whole.batches)
        assert rest.validated == [one for one in whole.validated if one[0] + 1 >= done]
        assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_a_validation_that_comes_by_time_is_made_once(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]
) -> None:
    """First of all, and the next by the clock, which is an hour on."""
    whole = Record(tmp_path, "validation batch")
    weights = recorded(whole, make_module, val_check_interval=timedelta(microseconds=1))
    assert len(whole.found) == 2 * BATCHES
    for batches in (1, 6):
        rest = Record()
        found = recorded(rest, make_module, tmp_path / f"{batches}.ckpt", val_check_interval=timedelta(hours=1))
        assert rest.trained == whole.trained[batches:]
        assert rest.found == [whole.found[batches - 1]]
        assert [batch for _, batch, _ in rest.validated] == [0, 1, 2]
        assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_gradients_stay_while_the_validation_is_made_up_for(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]
) -> None:
    """Of a step that a validation comes in the middle of, saved in it and then behind it."""
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    folders = [tmp_path / "first", tmp_path / "second"]
    whole = Record(folders[0], "validation batch")
    weights = recorded(whole, make_module, **options)
    recorded(Record(folders[1], "validation"), make_module, folders[0] / "3.ckpt", **options)
    rest = Record()
    found = recorded(rest, make_module, folders[1] / "0.ckpt", **options)
    assert rest.trained == whole.trained[3:]
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_a_checkpoint_after_one_that_was_made_up_for_is_of_a_whole_one(
    make_module: Callable[..., LatentDiffusionModule], tmp_path: Path
) -> None:
    """Else the run that goes on from there would validate again, on a part of the batches."""
    first, second = tmp_path / "first", tmp_path / "second"
    whole, rest = Record(), Record()
    recorded(whole, make_module, val_check_interval=1)
    recorded(Record(first, "batch"), make_module, val_check_interval=1)
    recorded(Record(second, "validation"), make_module, first / "1.ckpt", val_check_interval=1)
    recorded(rest, make_module, second / "1.ckpt", val_check_interval=1)
    assert [found[:2] for found in rest.found] == [found[:2] for found in whole.found[2:]]
    assert rest.validated == whole.validated[2 * 3 :]
    # One that was written so before.
    saved = torch.load(second / "1.ckpt", weights_only=True)
    total = saved["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    assert total["ready"] == total["started"] == total["completed"]
    total["ready"] = total["started"] = total["completed"] + 1
    torch.save(saved, second / "1.ckpt")
    again = Record()
    recorded(again, make_module, second / "1.ckpt", val_check_interval=1)
    assert again.validated == rest.validated


@pytest.mark.parametrize("at", [1, 2])
def test_the_validation_of_a_run_that_stops_early_is_not_due_when_it_goes_on(
    at: int, make_module: Callable[..., LatentDiffusionModule], tmp_path: Path
) -> None:
    """Unless one would have come there: as by a limit on time, whose run goes on with more of it."""

    class Stop(Record):
        def save(self, trainer: pl.Trainer, hook: str) -> None:
            if hook == "batch" and len(self.trained) == at:
                trainer.should_stop = True
            super().save(trainer, hook)

    whole, stopped, rest = Record(), Stop(tmp_path, "batch"), Record()
    recorded(whole, make_module, val_check_interval=2)
    recorded(stopped, make_module, val_check_interval=2)
    recorded(rest, make_module, tmp_path / f"{at}.ckpt", val_check_interval=2)
    assert rest.trained == whole.trained[at:]
    assert rest.logged == whole.logged[at:]
    assert [found[:2] for found in rest.found] == [found[:2] for found in whole.found]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("validation", [1000, 3])
def test_a_checkpoint_of_the_end_of_an_epoch_begins_the_next(
    validation: int, accumulate: int, make_module: Callable[..., LatentDiffusionModule], tmp_path: Path
) -> None:
    """Where steps are counted, and no validation falls on the last batch: Lightning would go on in the old epoch."""

    def scheduled() -> LatentDiffusionModule:
        module = make_module()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        found = {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}
        module.configure_optimizers = lambda: found  # type: ignore[method-assign,assignment,return-value]
        return module

    options: dict[str, Any] = {"max_epochs": -1, "max_steps": 12 // accumulate, "accumulate_grad_batches": accumulate}
    options |= {"val_check_interval": validation, "check_val_every_n_epoch": None}
    whole, rest = Record(), Record()
    weights = recorded(whole, scheduled, **options)
    recorded(Record(tmp_path, "epoch"), scheduled, **options)
    found = recorded(rest, scheduled, tmp_path / "4.ckpt", **options)
    assert rest.trained == whole.trained[4:]
    assert rest.logged == whole.logged[4:]
    assert rest.rates == whole.rates[4:]
    assert rest.found == [one for one in whole.found if one[0] > 4]
    for name, value in weights.items():
        assert torch.equal(found[name], value), name


def test_checkpoints_of_other_moments_are_as_they_were(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]
) -> None:
    """Also the one of an evaluation, which says nothing of what is left of training."""
    module = make_module()
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callback = UnfinishedValidation()
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        callbacks=[callback, saving],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    batches: Any = [image_batch(2) for _ in range(3)]
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, loader)
    first = torch.load(tmp_path / "step=1.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert first["epoch_loop.batch_progress"]["total"] | {"completed": 0} == {
        "ready": 1,
        "started": 1,
        "processed": 1,
        "completed": 0,
    }
    assert first["epoch_loop.val_loop.batch_progress"]["total"]["ready"] == 0
    trainer.validate(module, loader, verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    after = torch.load(tmp_path / "after.ckpt", weights_only=True)["loops"]["fit_loop"]
    total = after["epoch_loop.val_loop.batch_progress"]["total"]
    assert total["ready"] == total["completed"]
