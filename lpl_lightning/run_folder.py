"""Where a run keeps its files, and pictures in its loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image

__all__ = ["loaded_run_folder", "log_picture", "run_folder"]


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The first logger's folder, in which ``ModelCheckpoint`` makes ``checkpoints``, or without one the trainer's.

    None in a ``fast_dev_run``, which leaves no files. All processes of a run must call it, since they agree on it.
    """
    if getattr(trainer, "fast_dev_run", False):
        return None
    logger = trainer.logger
    if logger is None or isinstance(logger, CSVLogger | TensorBoardLogger):
        return Path(trainer.log_dir or trainer.default_root_dir)
    # Lightning's `log_dir` of others, such as Weights & Biases, is one for all runs, which would overwrite each other.
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    own = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
    return Path(trainer.strategy.broadcast(str(own)))


def loaded_run_folder(trainer: pl.Trainer, source: str | Path | None) -> Path | None:
    """The folder of the run that a checkpoint is of, or without one this run's; none in a ``fast_dev_run``."""
    own = run_folder(trainer)
    if own is None or source is None:
        return own
    folder = Path(source).absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder


def log_picture(trainer: pl.Trainer, name: str, path: Path) -> None:
    """Show a picture in all loggers of a trainer that have pictures; for the others it lies where it lies.

    Args:
        trainer: The trainer; the first process alone must call this.
        name: What it is called.
        path: A PNG file.
    """
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            board: Any = logger.experiment
            with Image.open(path) as picture:
                board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step)
