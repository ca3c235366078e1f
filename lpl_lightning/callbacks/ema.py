"""A moving average of the weights, with which models are evaluated, sampled and published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from lpl_lightning.callbacks.step_guard import last_step_skipped
from lpl_lightning.pretrained import FURTHER_AVERAGES

__all__ = ["EMA", "averaged"]


class EMA(EMAWeightAveraging):
    r"""Exponential moving average :math:`\bar\theta \leftarrow d \bar\theta + (1 - d) \theta` of the weights.

    Lightning's, of which checkpoints also say the decay, so that ``weights_ema`` and ``lpl export --ema`` find it, and
    hold the weights as they were trained even where they are written when training has ended. The average is in place
    for validation and test, and after training.

    Args:
        decay: d. The paper finds 0.99975 best with LPL and 0.9999 without (Berrada et al., figure 10).
        every_n_steps: Optimizer steps between updates.
        device: Where the average is kept, such as ``cpu``; by default with the model.
        also: Further decays, whose averages of the trained weights checkpoints hold too, for ``weights_ema``,
            ``lpl export --ema`` and ``lpl sweep --ema``. Each costs a copy of the trained weights.
    """

    def __init__(
        self,
        decay: float = 0.9999,
        every_n_steps: int = 1,
        device: str | None = None,
        also: Sequence[float] = (),
    ) -> None:
        for name, value in (("decay", decay), *(("also", value) for value in also)):
            if not 0 <= value < 1:
                raise ValueError(f"`{name}` must lie from 0 to below 1, got {value}.")
        if len({decay, *also}) <= len(also):
            raise ValueError(f"`also` must hold further decays, each once, beside {decay}, got {list(also)}.")
        super().__init__(decay=decay, update_every_n_steps=every_n_steps, device=device)
        self.decay, self.also = decay, tuple(also)
        self._further: dict[float, dict[str, Tensor]] = {}
        self._in_place = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin an average where training begins."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._in_place = False
            self._further = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the averages after a step, unless a ``StepGuard`` left it out."""
        if last_step_skipped(trainer):
            return
        before = self._latest_update_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._latest_update_step == before:
            return
        weights = {name: value.detach() for name, value in pl_module.named_parameters() if value.requires_grad}
        for decay in self.also:
            if decay not in self._further:  # Lightning's begins with the weights after the first step too
                place = self._device or pl_module.device
                self._further[decay] = {name: weight.to(place, copy=True) for name, weight in weights.items()}
                continue
            for name, average in self._further[decay].items():
                average.lerp_(weights[name].to(average.device), 1 - decay)

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
        if self._further:
            checkpoint[FURTHER_AVERAGES] = {str(decay): averages for decay, averages in self._further.items()}
        if not self._in_place:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            return
        average = checkpoint["state_dict"]
        super().on_save_checkpoint(trainer, pl_module, checkpoint)  # takes what it keeps for the average
        checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], average

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the averages of a checkpoint; outside of training its ``state_dict`` is the average already."""
        if self._average_model is None:
            return
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        place = self._device or pl_module.device
        self._further = {
            float(decay): {name: average.to(place, copy=True) for name, average in averages.items()}
            for decay, averages in checkpoint.get(FURTHER_AVERAGES, {}).items()
            if float(decay) in self.also
        }

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state, and the decay."""
        return {**super().state_dict(), "decay": self.decay}

    @contextmanager
    def put_in_place(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Put the average in place for a while, between two steps of training."""
        if self._in_place or self._average_model is None:
            yield
            return
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)


@contextmanager
def averaged(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[float | None]:
    """Put the average that an ``EMA`` callback keeps in place for a while, between two steps of training.

    Yields:
        Its decay; None where there is no such callback, and the weights stay as they are.
    """
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, EMA):
            with callback.put_in_place(pl_module):
                yield callback.decay
            return
    yield None
