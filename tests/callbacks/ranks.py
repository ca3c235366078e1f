"""Trains a tiny model on two CPU processes, with LPL computed the plain way and streamed.

``python ranks.py STRATEGY FOLDER`` writes the weights after each into FOLDER/plain.pt and FOLDER/streamed.pt.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning.pytorch as pl
import torch
from conftest import image_batch, tiny_kl, tiny_sd3
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, Dataset

from lpl_lightning import (
    Autoencoder,
    ClassTokens,
    FlowMatching,
    LatentDiffusionModule,
    LatentPerceptualLoss,
    LPLCallback,
)
from lpl_lightning.losses import Execution

EXECUTIONS = {
    "plain": Execution(streamed=False, channels_last=False, fold_upsampling=False),
    "streamed": Execution(chunk_size=1),
}


class Images(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.batch = image_batch(16)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value[index] for key, value in self.batch.items()}


def train(name: str, strategy: str, folder: Path) -> None:
    torch.manual_seed(0)
    module = LatentDiffusionModule(
        Autoencoder(tiny_kl(scaling_factor=0.5)),
        FlowMatching(),
        tiny_sd3(),
        ClassTokens(3, token_dim=8, pooled_dim=8),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    callback = LPLCallback(
        loss=lambda autoencoder: LatentPerceptualLoss(
            autoencoder, reference_side=0, threshold=0.8, mask_outliers=False, execution=EXECUTIONS[name]
        )
    )
    strategies: dict[str, Any] = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp2": lambda: ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        ),
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategies[strategy](),
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module, DataLoader(Images(), batch_size=2))
    weights = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in module.denoiser.state_dict().items()
    }
    if trainer.is_global_zero:
        torch.save({key: value.detach().clone() for key, value in weights.items()}, folder / f"{name}.pt")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for execution in EXECUTIONS:
        train(execution, sys.argv[1], Path(sys.argv[2]))
