"""How far a training is."""

from __future__ import annotations

import lightning.pytorch as pl

__all__ = ["optimizer_steps"]


def optimizer_steps(trainer: pl.Trainer) -> int:
    """Batches or groups of batches that weights were updated on; ``global_step`` counts each optimizer's updates."""
    return trainer.global_step // max(1, len(trainer.optimizers))
