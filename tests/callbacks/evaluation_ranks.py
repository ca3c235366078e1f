"""Evaluates a tiny model on one or two CPU processes.

``python evaluation_ranks.py DEVICES FOLDER`` does as ``lpl test``; with ``validate`` after it, the loss by noise level.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning.pytorch as pl
import torch
from conftest import tiny_kl, tiny_sd3
from evaluations import data, evaluation
from lightning.pytorch.strategies import DDPStrategy

from lpl_lightning import Autoencoder, ClassTokens, FlowMatching, LatentDiffusionModule, LossByNoise, Sampler

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    module = LatentDiffusionModule(
        Autoencoder(tiny_kl()),
        FlowMatching(),
        tiny_sd3(),
        ClassTokens(8, token_dim=8, pooled_dim=8),
        sampler=Sampler(num_steps=2),
    )
    devices, folder, validate = int(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3
    run = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[LossByNoise() if validate else evaluation(num_images=23, batch_size=1)],
    )
    images = data()
    if validate:
        images.val_images = 19
        run.validate(module, images, verbose=False)
    else:
        run.test(module, images, verbose=False)
