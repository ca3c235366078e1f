"""Modules whose training draws by the run's seed and the batch alone, so that a run that goes on draws on."""

from __future__ import annotations

from abc import ABC
from hashlib import blake2b
from typing import Any

import torch

from lpl_lightning.draws import Draws
from lpl_lightning.rebuilding import RebuiltModule

__all__ = ["DrawingModule"]

DRAW_SEED = "lpl_lightning_seed"
LARGEST = "lpl_lightning_largest_batch"


class DrawingModule(RebuiltModule, ABC):
    """A LightningModule with random numbers of samples, in whose checkpoints is the seed that they come from.

    What PyTorch's own generator draws in a step depends on seed, batch and process alone, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._draw_seed: int | None = None
        self._largest = 0  # batch of all processes together in the run so far

    def setup(self, stage: str) -> None:
        """Begin a training anew, but for what a checkpoint then says."""
        if stage == "fit":
            self._draw_seed, self._largest = None, 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Have the seed to go on with."""
        self._draw_seed, self._largest = checkpoint.get(DRAW_SEED), checkpoint.get(LARGEST, 0)
        super().on_load_checkpoint(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the seed to go on with."""
        checkpoint[DRAW_SEED], checkpoint[LARGEST] = self._draw_seed, self._largest
        super().on_save_checkpoint(checkpoint)

    def on_train_start(self) -> None:
        """Take the seed that samples' random numbers come from: a checkpoint's, or PyTorch's of the first process."""
        if self._draw_seed is None:
            self._draw_seed = int(self.trainer.strategy.broadcast(torch.initial_seed() % 2**63))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let what is drawn by PyTorch's own generator, such as dropout, depend on seed, batch and process alone."""
        number = f"{self._draw_seed} {self.trainer.fit_loop.epoch_loop.total_batch_idx} {self.global_rank}"
        torch.manual_seed(int.from_bytes(blake2b(number.encode(), digest_size=4).digest(), "big"))

    def training_draws(self, size: int) -> Draws:
        """Random numbers of the samples of this process's part of a training batch.

        Args:
            size: How many there are.
        """
        trainer = self._trainer
        if trainer is None or self._draw_seed is None:
            return Draws.fresh(size, self.device)
        rank, ranks = trainer.global_rank, trainer.world_size
        # Processes have a batch's samples one after the other. A batch that is smaller than one before it, such as an
        # epoch's last, leaves numbers out: counted by its own size, it would draw what earlier samples did.
        batch, self._largest = trainer.fit_loop.epoch_loop.total_batch_idx, max(self._largest, size * ranks)
        seed, first = self._draw_seed, batch * self._largest + rank * (self._largest // ranks)
        return Draws.of(seed, first, size, device=self.device, batch=batch)
