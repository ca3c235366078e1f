"""Gradients that are being accumulated, in checkpoints that are written in the middle of it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lpl_lightning.sharding import is_sharded, local, reshard, shard_like, trained_parameters, unsharded, whole

__all__ = ["AccumulatedGradients"]

GRADIENTS = "lpl_lightning_gradients"


class AccumulatedGradients(Callback):
    """Lets a run go on exactly also from a checkpoint between two batches of one optimizer step.

    Lightning writes such ones: by time, after a validation, and after the first batch of a run that goes on. Without
    the gradients of the batches before, that step would be taken on a part of its batches. With them, a run of one
    process goes on bit for bit, and one of several, which are given the mean of their gradients, to rounding, also
    under another strategy.
    """

    def __init__(self) -> None:
        self._step = 0
        self._pending = False
        self._found: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the gradients of the checkpoint back."""
        self._step, self._pending = trainer.global_step, bool(self._found)
        if self._found:
            reshard(pl_module)
        for name, parameter in pl_module.named_parameters():
            if name in self._found:
                parameter.grad = shard_like(self._found[name], parameter)
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
        found = _gradients(pl_module)
        if trainer.world_size > 1:
            found = _means(found, trainer, pl_module)
        if trainer.is_global_zero:
            checkpoint[GRADIENTS] = {name: value.cpu() for name, value in found.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take them, if they are to be trained on."""
        if trainer.state.fn == "fit":
            self._found = checkpoint.get(GRADIENTS, {})


def _gradients(module: pl.LightningModule) -> dict[str, Tensor]:
    """Whole gradients by name: those that processes have reduced, and what this one adds to them."""
    reshard(module)
    found = {
        name: whole(value.grad.detach()) for name, value in trained_parameters(module).items() if value.grad is not None
    }
    if is_sharded(module):
        with unsharded(module):
            for name, value in trained_parameters(module).items():
                if value.grad is not None:  # of batches that wait for the step's last one to be reduced with
                    found[name] = found[name] + value.grad if name in found else value.grad.clone()
    return found


def _means(found: dict[str, Tensor], trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
    """The means over processes, of which some may have no gradient where others have."""
    parameters = trained_parameters(module)
    some: Any = torch.tensor([name in found for name in parameters], device=trainer.strategy.root_device).int()
    some = trainer.strategy.reduce(some, reduce_op="max").tolist()
    means = {}
    for (name, parameter), has in zip(parameters.items(), some, strict=True):
        if has:
            own = (
                found[name].clone()
                if name in found
                else torch.zeros(parameter.shape, device=local(parameter).device, dtype=parameter.dtype)
            )
            means[name] = trainer.strategy.reduce(own, reduce_op="mean")
    return means
