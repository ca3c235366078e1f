"""A moving average of the weights, with which models are evaluated, sampled and published."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging

__all__ = ["EMA"]


class EMA(EMAWeightAveraging):
    r"""Exponential moving average :math:`\bar\theta \leftarrow d \bar\theta + (1 - d) \theta` of the weights.

    Lightning's, of which checkpoints also say the decay, so that ``weights_ema`` and ``lpl export --ema`` find it, and
    hold the weights as they were trained even where they are written when training has ended. The average is in place
    for validation and test, and after training.

    Args:
        decay: d. The paper finds 0.99975 best with LPL and 0.9999 without (Berrada et al., figure 10).
        every_n_steps: Optimizer steps between updates.
        device: Where the average is kept, such as ``cpu``; by default with the model.
    """

    def __init__(self, decay: float = 0.9999, every_n_steps: int = 1, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie from 0 to below 1, got {decay}.")
        super().__init__(decay=decay, update_every_n_steps=every_n_steps, device=device)
        self.decay = decay
        self._in_place = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin an average where training begins."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._in_place = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in place of the weights, which are kept for checkpoints that are yet to come."""
        self._swap_models(pl_module)
        self._in_place = True

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in place, where it is not yet."""
        if not self._in_place:
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights back, unless training has ended."""
        if not self._in_place:
            super().on_validation_epoch_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average in ``state_dict``, and the weights as they were trained beside it."""
        if not self._in_place:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            return
        average = checkpoint["state_dict"]
        super().on_save_checkpoint(trainer, pl_module, checkpoint)  # takes what it keeps for the average
        checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], average

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state, and the decay."""
        return {**super().state_dict(), "decay": self.decay}
