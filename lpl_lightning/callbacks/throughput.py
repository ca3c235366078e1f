"""Images per second, on the progress bar, and what of the time goes to waiting for data."""

from __future__ import annotations

import time
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lpl_lightning.arguments import above
from lpl_lightning.callbacks.loading import DataWait

__all__ = ["ImagesPerSecond"]


class ImagesPerSecond(Callback):
    """Logs ``images_per_second`` of training over all processes, loading included, from batch end to batch end.

    Beside it ``data_wait`` is the share of that time that the first process waited for its loader. Both are logged once
    after the first batches, and then where the logger takes what was logged: entries cost time.

    Args:
        smoothing: Weight of the past in the running means of the times a batch takes, in 0 .. 1.
        stall_timeout: Seconds of waiting for a batch after which a process says so in the log, while it goes on
            waiting; null never does.
    """

    def __init__(self, smoothing: float = 0.9, stall_timeout: float | None = 120.0) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must be 0 or more and below 1, got {smoothing}.")
        if stall_timeout is not None:
            above(0, stall_timeout=stall_timeout)
        self.smoothing = smoothing
        self._wait = DataWait(stall_timeout)
        self._last: tuple[float, float] | None = None
        self._per_image: tuple[float, float] | None = None  # seconds, and those of them that were waited
        self._shown = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew."""
        self._last, self._per_image, self._shown = None, None, False
        self._wait.start(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for no more data."""
        self._wait.stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The same, however training ended."""
        self._wait.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same."""
        self._wait.stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave validation out of the time."""
        self._last = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rate."""
        now, last = (time.perf_counter(), self._wait.seconds), self._last
        self._last = now
        images = batch.get("image", batch.get("latent")) if isinstance(batch, dict) else None
        if last is None or images is None:
            return
        took, waited = ((after - before) / len(images) for after, before in zip(now, last, strict=True))
        if self._per_image is not None:
            took = self.smoothing * self._per_image[0] + (1 - self.smoothing) * took
            waited = self.smoothing * self._per_image[1] + (1 - self.smoothing) * waited
        self._per_image = took, waited
        every: int = cast(Any, trainer).log_every_n_steps
        if self._shown and every and trainer.global_step % every:
            return
        self._shown = True
        pl_module.log("images_per_second", trainer.world_size / took, prog_bar=True, batch_size=len(images))
        pl_module.log("data_wait", min(1.0, waited / took), batch_size=len(images))
