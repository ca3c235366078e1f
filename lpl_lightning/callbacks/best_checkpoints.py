"""The choice of the best checkpoints, in a run that goes on in another folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

__all__ = ["BestCheckpoints"]


class BestCheckpoints(Callback):
    """Lets a run that goes on choose its best checkpoints among those from before, too.

    A run of the command line goes on in a folder of its own (``version_1``), and Lightning's ``ModelCheckpoint`` then
    forgets which checkpoints were the best and how good they were: the first of the new folder would be the best. With
    this callback those that are still there count among its ``save_top_k``; none outside its own folder is removed.
    """

    def __init__(self) -> None:
        self._states: dict[str, dict[str, Any]] = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note what the checkpoint's run knew of the best ones, if it is to go on."""
        if trainer.state.fn == "fit":
            self._states = checkpoint.get("callbacks", {})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let each callback that chooses know it again."""
        for callback in trainer.checkpoint_callbacks:
            state = self._states.get(callback.state_key, {})
            if isinstance(callback, ModelCheckpoint) and callback.monitor and not callback.best_k_models:
                _know_again(callback, state.get("best_k_models", {}))
        self._states = {}


def _know_again(callback: ModelCheckpoint, models: dict[str, Any]) -> None:
    there = [path for path in models if Path(path).exists()]
    ordered = sorted(there, key=models.__getitem__, reverse=callback.mode == "max")
    kept = ordered if callback.save_top_k == -1 else ordered[: callback.save_top_k]
    if not kept:
        return
    callback.best_k_models = {path: models[path] for path in kept}
    callback.best_model_path, callback.best_model_score = kept[0], models[kept[0]]
    callback.kth_best_model_path, callback.kth_value = kept[-1], models[kept[-1]]
