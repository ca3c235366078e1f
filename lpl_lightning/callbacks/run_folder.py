"""Where a run keeps its files."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

__all__ = ["run_folder"]


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The logger's folder or, without one, the trainer's; none in a ``fast_dev_run``, which leaves no files."""
    if getattr(trainer, "fast_dev_run", False):
        return None
    return Path(trainer.log_dir or trainer.default_root_dir)
