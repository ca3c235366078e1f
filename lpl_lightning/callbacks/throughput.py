"""Images per second, on the progress bar."""

from __future__ import annotations

import time
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

__all__ = ["ImagesPerSecond"]


class ImagesPerSecond(Callback):
    """Logs ``images_per_second`` of training over all processes, loading included, from batch end to batch end.

    It does so once after the first batches, and then where the logger takes what was logged: entries cost time.

    Args:
        smoothing: Weight of the past in the running mean of the time a batch takes, in 0 .. 1.
    """

    def __init__(self, smoothing: float = 0.9) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must be 0 or more and below 1, got {smoothing}.")
        self.smoothing = smoothing
        self._last: float | None = None
        self._seconds_per_image: float | None = None
        self._shown = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew."""
        self._last, self._seconds_per_image, self._shown = None, None, False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave validation out of the time."""
        self._last = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rate."""
        now, last = time.perf_counter(), self._last
        self._last = now
        images = batch.get("image", batch.get("latent")) if isinstance(batch, dict) else None
        if last is None or images is None:
            return
        took = (now - last) / len(images)
        old = self._seconds_per_image
        self._seconds_per_image = took if old is None else self.smoothing * old + (1 - self.smoothing) * took
        every: int = cast(Any, trainer).log_every_n_steps
        if self._shown and every and trainer.global_step % every:
            return
        self._shown = True
        rate = trainer.world_size / self._seconds_per_image
        pl_module.log("images_per_second", rate, prog_bar=True, batch_size=len(images))
