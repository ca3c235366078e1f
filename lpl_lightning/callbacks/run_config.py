"""The config of a run of the command line, in the run's folder."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from lpl_lightning.run_folder import run_folder

__all__ = ["SaveRunConfig"]


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder, whichever logger it has.

    A resumed or repeated run may write into a folder that has one already.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it, once."""
        folder = run_folder(trainer)  # all processes must ask
        if folder is None or self.already_saved:
            return
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            path = str(folder / self.config_filename)
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)
        self.already_saved = True
