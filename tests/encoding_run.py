"""Encodes a folder of images with a tiny model on one or two CPU processes.

``python encoding_run.py DEVICES PHOTOS OUT [LIMIT]``; LIMIT is the largest file that may be written, in bytes, as on a
disk that is full.
"""

from __future__ import annotations

import logging
import resource
import signal
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import lightning.pytorch as pl
import torch
from conftest import tiny_kl, tiny_sd3
from lightning.pytorch.strategies import DDPStrategy

from lpl_lightning import Autoencoder, ClassTokens, FlowMatching, LatentDiffusionModule
from lpl_lightning.data import ImageFolderDataModule
from lpl_lightning.encoding import EncodingTrainer

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    devices, photos, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    if len(sys.argv) > 4:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
    torch.manual_seed(0)
    parts = (FlowMatching(), tiny_sd3(), ClassTokens(2, token_dim=8, pooled_dim=8))
    module = LatentDiffusionModule(Autoencoder(tiny_kl(scaling_factor=0.5, shift_factor=0.1)), *parts)
    strategy = DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"
    trainer: pl.Trainer = EncodingTrainer(
        accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_progress_bar=False
    )
    data = ImageFolderDataModule(photos, 16, batch_size=3, num_workers=0, crop="random", horizontal_flip=True)
    trainer.encode(module, data, out, shard_size=7, crops=2)  # type: ignore[attr-defined]
