"""Trains a tiny model on two CPU processes, the second of which is given a batch that is not finite.

``python guard_ranks.py FOLDER`` writes what process RANK saw with a STRATEGY into FOLDER/STRATEGY-RANK.json, and its
records beside it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning.pytorch as pl
import torch
from conftest import image_batch, tiny_kl, tiny_sd3
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lpl_lightning import (
    Autoencoder,
    ClassTokens,
    FlowMatching,
    FSDP2Strategy,
    LatentDiffusionModule,
    LatentPerceptualLoss,
    LPLCallback,
    StepGuard,
)

BAD = 1
"""The step of it."""


def local(value: Tensor) -> Tensor:
    return (value.to_local() if hasattr(value, "to_local") else value).detach().clone()


class Watch(pl.Callback):
    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.weights.append([local(value) for value in pl_module.parameters()])
        self.losses.append(float(outputs["loss"]))


def parts() -> tuple[LatentDiffusionModule, LPLCallback]:
    """The module with LPL, by a seed."""
    torch.manual_seed(0)
    module = LatentDiffusionModule(
        Autoencoder(tiny_kl(scaling_factor=0.5)),
        FlowMatching(),
        tiny_sd3(),
        ClassTokens(3, token_dim=8, pooled_dim=8),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )
    return module, LPLCallback(loss=lambda a: LatentPerceptualLoss(a, threshold=float("inf"), mask_outliers=False))


def train(strategy: str, folder: Path, guard: StepGuard, steps: int = 3) -> Watch:
    module, lpl = parts()
    torch.manual_seed(1)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    batches: Any = [[image_batch(2) for _ in range(steps)] for _ in range(2)][rank]
    if rank == 1:
        batches[BAD]["image"][0, 0, 0, 0] = float("inf")
    strategies: dict[str, Any] = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp2": lambda: FSDP2Strategy(process_group_backend="gloo"),
    }
    watch = Watch()
    pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategies[strategy](),
        max_steps=steps,
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lpl, guard, watch],
    ).fit(module, DataLoader(batches, batch_size=None))
    return watch


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    where = Path(sys.argv[1])
    for name in ("ddp", "fsdp2"):
        guard = StepGuard("skip", record_steps=[2])
        watch = train(name, where / name, guard)
        first, second, third = watch.weights
        said = {
            "skipped": guard.skipped,
            "unchanged": all(map(torch.equal, first, second)),
            "went_on": not all(map(torch.equal, second, third)),
            "finite": all(bool(value.isfinite().all()) for value in third),
            "sum": float(sum(value.double().sum() for value in third)),
            "losses": watch.losses,
        }
        if name == "ddp":
            try:
                train(name, where / "raise", StepGuard("raise", record_weights=False))
            except FloatingPointError as error:
                said["error"] = str(error)
        (where / f"{name}-{torch.distributed.get_rank()}.json").write_text(json.dumps(said))
