"""Trains a step on two CPU processes from one seed, and writes what each drew: ``python distinct_ranks.py FOLDER``."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from conftest import image_batch, tiny_kl, tiny_sd3
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lpl_lightning import Autoencoder, ClassTokens, FlowMatching, LatentDiffusionModule
from lpl_lightning.noise import NoisyLatents


class Written(FlowMatching):
    """Writes each draw."""

    folder: Path

    def sample(self, *args: Any, **kwargs: Any) -> NoisyLatents:
        noisy = super().sample(*args, **kwargs)
        torch.save({"t": noisy.t, "noise": noisy.noise}, self.folder / f"{torch.distributed.get_rank()}.pt")
        return noisy


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    noise = Written()
    noise.folder = Path(sys.argv[1])
    module = LatentDiffusionModule(Autoencoder(tiny_kl()), noise, tiny_sd3(), ClassTokens(3, token_dim=8, pooled_dim=8))
    batches: Any = [image_batch(4)]
    pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(batches, batch_size=None))
