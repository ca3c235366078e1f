"""Trains an epoch on tar shards on two CPU processes, of which this is one, and writes what it saw.

``python stream_ranks.py FOLDER SHARDS``
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lpl_lightning.data import WebDatasetDataModule


class Writing(pl.LightningModule):
    """Writes the captions of its batches."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.line = torch.nn.Linear(1, 1)
        self.seen: dict[str, list[list[str]]] = {"train": [], "val": []}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen["train"].append(batch["caption"])
        loss: Tensor = self.line(batch["image"].mean((1, 2, 3))[:, None]).mean()
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen["val"].append(batch["caption"])

    def on_fit_end(self) -> None:
        torch.save(self.seen, self.folder / f"{self.global_rank}.pt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("imported before they are needed:", sorted({"datasets", "webdataset"} & set(sys.modules)))
    folder, *shards = sys.argv[1:]
    pl.seed_everything(0, verbose=False)
    data = WebDatasetDataModule(
        shards, 8, shards, caption="txt", batch_size=4, num_workers=1, report=Path(folder) / "report.jsonl"
    )
    pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Writing(Path(folder)), data)
