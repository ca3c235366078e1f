"""The config of a run of the command line, in the run's folder."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lpl_lightning.run_folder import run_folder

__all__ = ["SaveRunConfig"]


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder, whichever logger it has.

    A resumed or repeated run may write into a folder that has one already. A file that the run was configured by stays
    as it is, and so does what lies in the trainer's own folder, which is that of a run without a logger.

    Attributes:
        path: Where the run's config is; None where that is nowhere, or not known yet.
    """

    path: Path | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it, once."""
        folder = run_folder(trainer)  # all processes must ask
        if folder is None or self.already_saved:
            return
        self.already_saved = True
        path = (folder / self.config_filename).absolute()
        given = [Path(one.absolute).resolve() for one in self.config.get("config") or []]
        self.path = path
        if path.resolve() in given or (trainer.logger is None and path.exists()):
            self.path = path if [path.resolve()] == given else None
            rank_zero_info(f"{path} is left as it is, so that this run's config is written nowhere.")
        elif trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=self.multifile)
