"""Trains a tiny model on two CPU processes, evaluates it in between, and sends a signal to the second meanwhile.

``python stopped_evaluation.py FOLDER [CKPT]``; with CKPT it goes on from there, and no signal is sent.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning.pytorch as pl
import pytest
import torch
from conftest import tiny_kl, tiny_sd3
from evaluations import data, evaluation
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lpl_lightning import EMA, Autoencoder, ClassTokens, FlowMatching, LatentDiffusionModule, Preemption, Sampler


class Losses(Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.found[trainer.global_step] = float(outputs["loss"])


def made() -> LatentDiffusionModule:
    """A model that is always the same."""
    torch.manual_seed(0)
    return LatentDiffusionModule(
        Autoencoder(tiny_kl()),
        FlowMatching(),
        tiny_sd3(),
        ClassTokens(8, token_dim=8, pooled_dim=8),
        sampler=Sampler(num_steps=2),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )


def fit(folder: Path, at: int | None = None, devices: int = 1, **options: Any) -> dict[int, float]:
    """Train four steps of which the second and the fourth are evaluated; the losses.

    Args:
        folder: Of the run.
        at: Which call of ``generate`` a signal comes in, of the last process; by default none.
        devices: How many.
        options: Of ``fit``.
    """
    module = made()
    calls, generate = 0, module.generate

    def signalled(*asked: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at and run.global_rank == devices - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return generate(*asked)

    module.generate = signalled  # type: ignore[method-assign, assignment]
    losses = Losses()
    run = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        default_root_dir=folder,
        logger=CSVLogger(folder, name=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,  # a validation would ask for signals, too
        log_every_n_steps=1,
        callbacks=[
            EMA(decay=0.5),
            losses,
            evaluation(every_n_steps=2),
            Preemption(every_n_steps=100),
            ModelCheckpoint(every_n_train_steps=100),
        ],
    )
    try:
        run.fit(module, data(), weights_only=True, **options)
    finally:
        (folder / f"losses-{run.global_rank}.json").write_text(json.dumps(losses.found))
    return losses.found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if len(sys.argv) > 2:
        fit(Path(sys.argv[1]), devices=2, ckpt_path=sys.argv[2])
    else:
        with pytest.raises(SystemExit):
            fit(Path(sys.argv[1]), at=2, devices=2)
