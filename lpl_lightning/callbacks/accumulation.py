"""Gradients that are being accumulated, in checkpoints that are written in the middle of it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["AccumulatedGradients"]

GRADIENTS = "lpl_lightning_gradients"


class AccumulatedGradients(Callback):
    """Lets a run go on exactly also from a checkpoint between two batches of one optimizer step.

    Lightning writes such ones: by time, after a validation, and after the first batch of a run that goes on. Without
    the gradients of the batches before, that step would be taken on a part of its batches. With them, a run of one
    process goes on bit for bit, and one of several, which are given the mean of their gradients, to rounding. Sharded
    gradients are not kept; a warning says so.
    """

    def __init__(self) -> None:
        self._step = 0
        self._pending = False
        self._found: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the gradients of the checkpoint back."""
        self._step, self._pending = trainer.global_step, bool(self._found)
        for name, parameter in pl_module.named_parameters():
            if name in self._found:
                parameter.grad = self._found[name].to(parameter.device, parameter.dtype)
        self._found = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether the batch was not the last of its step."""
        self._pending, self._step = trainer.global_step == self._step, trainer.global_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the gradients, where there are batches that no step was taken on."""
        if not self._pending:
            return
        own = {name: value for name, value in pl_module.named_parameters() if value.requires_grad}
        if any(isinstance(value, DTensor) for value in own.values()):
            rank_zero_warn(
                "A checkpoint in the middle of accumulated gradients does not hold them where they are sharded: what "
                "goes on from it takes its first step without them. Save every n-th step instead."
            )
            return
        found = {name: value.grad.detach() for name, value in own.items() if value.grad is not None}
        if trainer.world_size > 1:
            found = {name: trainer.strategy.reduce(value.clone(), reduce_op="mean") for name, value in found.items()}
        checkpoint[GRADIENTS] = found

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take them."""
        self._found = checkpoint.get(GRADIENTS, {})
