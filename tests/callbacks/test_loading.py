"""Waiting for data: its share of the time, and what is said while a batch does not come."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_mixin import Foreign
from torch.utils.data import DataLoader, Dataset

from lpl_lightning import ImagesPerSecond
from lpl_lightning.callbacks.loading import DataWait


class Batches(Dataset[Any]):
    """Batches that take the seconds given to come; None raises."""

    def __init__(self, *seconds: float | None) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, index: int) -> Any:
        seconds = self.seconds[index]
        if seconds is None:
            raise OSError("the disk is gone")
        time.sleep(seconds)
        return {"image": torch.zeros(2, 3, 2, 2)}


class Trained(Foreign):
    """A step that takes 50 ms; saving a checkpoint would take as long again."""

    def training_step(self, *args: Any) -> torch.Tensor:
        time.sleep(0.05)
        loss: torch.Tensor = self.net.weight.sum()
        return loss

    def validation_step(self, *args: Any) -> None:
        pass


class Slow(pl.Callback):
    """Stands for the saving of checkpoints: no waiting for data."""

    def on_train_batch_end(self, *args: Any) -> None:
        time.sleep(0.25)


def fit(
    tmp_path: Path, train: Batches, *callbacks: pl.Callback, val: Batches | None = None, **options: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )
    loaders: Any = [DataLoader(batches, batch_size=None) for batches in (train, val or Batches(0))]
    trainer.fit(Trained(), *loaders)
    return trainer


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "lpl_lightning.callbacks.loading"]


def test_share_of_waiting_is_that_of_the_loader_alone(tmp_path: Path) -> None:
    """Of 0.15 s waiting, 0.05 s step and 0.25 s saving a batch; without the loader's delay, none."""
    batches = Batches(0.15, 0.15, 0.15, 0.15)
    trainer = fit(tmp_path, batches, ImagesPerSecond(), Slow(), max_epochs=1, log_every_n_steps=1)
    assert 0.2 < trainer.callback_metrics["data_wait"] < 0.45
    trainer = fit(tmp_path, Batches(0, 0, 0), ImagesPerSecond(), max_epochs=1, log_every_n_steps=1)
    assert trainer.callback_metrics["data_wait"] < 0.1


def test_a_stalled_loader_is_reported_while_it_stalls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said_while_waiting: list[int] = []

    class Stalls(Batches):
        def __getitem__(self, index: int) -> Any:
            batch = super().__getitem__(index)
            if index == 2:
                said_while_waiting.append(len(said(caplog)))
            return batch

    before = threading.active_count()
    trainer = fit(tmp_path, Stalls(0, 0, 0.9, 0), ImagesPerSecond(stall_timeout=0.25), Slow(), max_epochs=1)
    first, *_, last = said(caplog)
    assert said_while_waiting[0] in (1, 2)  # the second time after twice the first
    assert len(said(caplog)) == said_while_waiting[0] + 1
    assert "batch 2 of epoch 0, DataLoader of Stalls" in first
    assert "`num_workers` 0" in first
    assert first.startswith("Waiting for data for")
    assert last == "The batch came after 1 s."
    assert threading.active_count() == before
    profiler: Any = vars(trainer)["profiler"]
    assert type(profiler).__name__ == "PassThroughProfiler"


def test_first_batches_of_validations_are_spoken_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = ImagesPerSecond(stall_timeout=0.3)
    fit(tmp_path, Batches(0, 0, 0), callback, val=Batches(0.7), max_epochs=1, val_check_interval=1)
    waiting, *_, came = said(caplog)
    assert "validation after step 1" in waiting
    assert [message for message in said(caplog) if "came" in message] == [came] == ["The batch came after 1 s."]


def test_the_thread_ends_with_the_run_however_that_ends(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        fit(tmp_path, Batches(0, None), ImagesPerSecond(stall_timeout=5), max_epochs=1)
    assert threading.active_count() == before
    assert fit(tmp_path, Batches(0), ImagesPerSecond(stall_timeout=None), max_epochs=1)
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="`stall_timeout` must be above 0"):
        ImagesPerSecond(stall_timeout=0)
    DataWait(None).stop()
