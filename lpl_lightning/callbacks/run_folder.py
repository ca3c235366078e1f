"""Where a run keeps its files."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

__all__ = ["loaded_run_folder", "run_folder"]


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The logger's folder or, without one, the trainer's; none in a ``fast_dev_run``, which leaves no files.

    All processes of a run must call it, since they agree on it.
    """
    if getattr(trainer, "fast_dev_run", False):
        return None
    return Path(trainer.log_dir or trainer.default_root_dir)


def loaded_run_folder(trainer: pl.Trainer, source: str | Path | None) -> Path | None:
    """The folder of the run that a checkpoint is of, or without one this run's; none in a ``fast_dev_run``."""
    own = run_folder(trainer)
    if own is None or source is None:
        return own
    folder = Path(source).absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder
