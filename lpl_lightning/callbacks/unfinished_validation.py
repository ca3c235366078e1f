"""Validations that a run was stopped before or in, made when it goes on."""

from __future__ import annotations

import math
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

__all__ = ["UnfinishedValidation"]


class UnfinishedValidation(Callback):
    """Lets a run make up for a validation that its checkpoint was written before, or in.

    Of checkpoints that are written after the last batch before a validation, Lightning takes it for done, with what is
    measured in it and the best checkpoints that are chosen by it. From within one, it goes on with a part of its
    batches. With this callback the whole validation comes first when the run goes on, as it would have come. The one
    after the last step of all is not made up for, since ``fit`` then has nothing left to do: ``validate`` makes it.
    Where validations come by time (``val_check_interval: "00:00:30:00"``), the next comes so long after that one.

    A run with ``max_steps`` that goes on from a checkpoint of an epoch's end (``save_on_train_epoch_end``) begins the
    next epoch; Lightning would train on a batch of it in the old one where no validation fell on the last batch.
    """

    def __init__(self) -> None:
        self._validates = False
        self._is_open = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew: the fit before may have ended in a validation."""
        self._validates = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note whether a validation is to be made first."""
        if trainer.state.fn == "fit" and "loops" in checkpoint:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            total, current = progress["total"], progress["current"]
            if current["ready"] == current["completed"] > 0:
                # It was whole; this callback once left the batch there that had told of the one before.
                total["ready"] = total["started"] = total["completed"]
            self._is_open = total["ready"] > total["completed"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let it be time for that: Lightning asks the clock, which begins with the run that goes on."""
        if self._is_open:
            if getattr(trainer, "_val_check_time_interval", None) is not None:
                cast(Any, trainer)._last_val_time = -math.inf
            # Lightning has seen by now that it is to go on with it. What is saved from here on is to say no such thing.
            total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            total.ready = total.started = total.completed
        self._is_open = False
        _end_epoch(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that one has begun."""
        self._validates = not trainer.sanity_checking

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that it is done; what is saved by it comes after."""
        self._validates = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the state of the loops down as it is where a validation has begun, and none of its batches is done."""
        if trainer.state.fn != "fit" or "loops" not in checkpoint:
            return
        loops = checkpoint["loops"]["fit_loop"]
        trained, validated = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
        loop = trainer.fit_loop.epoch_loop
        fetcher: Any = trainer.fit_loop._data_fetcher
        if not self._validates:
            after_batch = trained["total"]["processed"] == trained["total"]["completed"] + 1
            # A run that is to stop validates once more; the one that goes on from here is not to stop.
            stops, trainer.should_stop = trainer.should_stop, False
            due = after_batch and loop._should_check_val_fx(fetcher)
            trainer.should_stop = stops
            if not due:
                return
        for part in ("current", "total"):
            trained[part]["completed"] = trained[part]["processed"]
        total = validated["total"]
        if self._validates:
            total["completed"] -= validated["current"]["completed"]
        total["processed"] = total["completed"]
        # By a batch that has begun and not ended Lightning tells that it is to go on with the validation.
        total["ready"] = total["started"] = total["completed"] + 1
        validated["current"] = dict.fromkeys(validated["current"], 0)


def _end_epoch(trainer: pl.Trainer) -> None:
    """Leave an epoch that was over but for its last entry when the checkpoint was written, at the end of the epoch.

    Lightning goes on in it where ``max_steps`` is given, with a batch of the next one.
    """
    loop: Any = trainer.fit_loop
    if getattr(loop, "restarted_on_epoch_end", False):
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
        loop.epoch_loop.restarting = False
        loop.epoch_loop.reset_restart_stage()
