"""Trains a tiny model on one process or, under ``torchrun``, on two, in the ways asked for.

``python device_run.py FOLDER WAY ...`` writes to FOLDER/WAY.pt the losses of all steps, what validation found, and the
weights. A WAY is STRATEGY-VARIANT: one, ddp or fsdp2, and what differs from the plain run.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from conftest import tiny_kl, tiny_sd3
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.fsdp import FSDPModule

from lpl_lightning import (
    EMA,
    Autoencoder,
    ClassTokens,
    FlowMatching,
    FSDP2Strategy,
    ImageWriter,
    LatentDiffusionModule,
    LatentPerceptualLoss,
    LoRA,
    LPLCallback,
    Preemption,
    SampleGrid,
    Sampler,
    SaveDiffusers,
    SaveWeights,
    SD3Denoiser,
    ShapesDataModule,
)
from lpl_lightning.callbacks import AccumulatedGradients, Evaluation
from lpl_lightning.evaluation import SpectrumMetrics, Suite
from lpl_lightning.losses import Subset
from lpl_lightning.sharding import reshard, whole

GLOBAL_BATCH = 8
STEPS = 4


class Watch(pl.Callback):
    """Keeps what is logged of each batch, and how many gradients were reduced for it."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.diagnostics: list[dict[str, float]] = []
        self.reduced: list[int] = []
        self.count = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Of these FSDP2 calls the one that the version has.
        self.kept = {
            name: getattr(torch.distributed, name)
            for name in ("reduce_scatter_tensor", "reduce_scatter_single")
            if hasattr(torch.distributed, name)
        }
        for name, reduce in self.kept.items():
            setattr(torch.distributed, name, partial(self.counted, reduce))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for name, reduce in self.kept.items():
            setattr(torch.distributed, name, reduce)

    def counted(self, reduce: Any, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return reduce(*args, **kwargs)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        names = ("loss", "loss_diffusion", "loss_lpl", "gate_share")
        self.losses.append({name: float(trainer.callback_metrics[name]) for name in names})
        seen = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("lpl_")}
        self.diagnostics.append(seen)
        self.reduced.append(self.count)
        self.count = 0


class Quiet(DummyLogger):
    """Asks for log entries, and has a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> str:
        return str(self.folder)


class Gate(LatentPerceptualLoss):
    """Counts the samples that pass. In validation more do: of the last that the second process has, one of two."""

    counts: list[int]

    def tau(self, z: torch.Tensor) -> float:
        return super().tau(z) * (1 if self.training else 4)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            self.counts.append(int(self.passes(args[2], args[1]).sum()))
        return super().evaluate(*args, **kwargs)


def module(counts: list[int], **options: Any) -> tuple[LatentDiffusionModule, LPLCallback]:
    torch.manual_seed(0)
    denoiser = tiny_sd3()
    built = LatentDiffusionModule(
        Autoencoder(tiny_kl(scaling_factor=0.5)),
        FlowMatching(),
        SD3Denoiser(denoiser.backbone, dtype="bfloat16") if "fine_tuning" in options else denoiser,
        ClassTokens(8, token_dim=8, pooled_dim=8, dropout=0.3),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        sampler=Sampler(num_steps=2),
        **options,
    )

    def loss(autoencoder: Autoencoder) -> LatentPerceptualLoss:
        options: dict[str, Any] = {"mask_outliers": False, "subset": Subset(keep=0.7)}
        made = Gate(autoencoder, reference_side=0, threshold=0.5, **options)
        made.counts = counts
        return made

    return built, LPLCallback(loss=loss)


def trainer(strategy: str, folder: Path, **options: Any) -> pl.Trainer:
    strategies: dict[str, Any] = {
        "one": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo", broadcast_buffers=False),
        "fsdp2": FSDP2Strategy,
    }
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1 if strategy == "one" else 2,
        strategy=strategies[strategy](),
        logger=Quiet(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=0.5,
        **(
            {"max_steps": STEPS, "val_check_interval": STEPS, "check_val_every_n_epoch": None}
            | {"enable_checkpointing": False}
            | options
        ),
    )


def data(strategy: str, parts: int = 1) -> ShapesDataModule:
    processes = 1 if strategy == "one" else 2
    # 13 validation images: the second process has one less, and begins again.
    return ShapesDataModule(
        image_size=16, train_images=40, val_images=13, batch_size=GLOBAL_BATCH // processes // parts, num_workers=0
    )


def weights(built: LatentDiffusionModule) -> dict[str, torch.Tensor]:
    return {name: whole(tensor).detach().clone() for name, tensor in built.state_dict().items()}


def trained(strategy: str, folder: Path, variant: str) -> dict[str, Any]:
    """Training in one of the ways that are to change nothing, or nothing but the precision."""
    options: dict[str, Any] = {}
    counts: list[int] = []
    parts = 2 if variant == "accumulated" else 1
    if variant in ("mixed", "true"):
        options["precision"] = f"bf16-{variant}"
    if parts > 1:
        options |= {"accumulate_grad_batches": parts, "val_check_interval": STEPS * parts}
    built, lpl = module(counts, **({"fine_tuning": LoRA(rank=2)} if variant == "lora" else {}))
    if variant in ("accumulated", "compiled"):
        built.denoiser.backbone.enable_gradient_checkpointing()
    if variant == "compiled":
        for block in built.denoiser.backbone.transformer_blocks:
            block.compile()
    watch = Watch()
    run = trainer(strategy, folder, callbacks=[lpl, watch], **options)
    run.fit(built, data(strategy, parts))
    found = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val_")}
    return {
        "losses": watch.losses,
        "validation": found,
        "passed": counts,
        "reduced": watch.reduced,
        "sharded": [name for name, part in built.named_modules() if isinstance(part, FSDPModule)],
        "weights": weights(built),
    }


class SaveWithin(pl.Callback):
    """Writes a checkpoint while the average is in place, in the middle of a validation of training."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.state.fn == "fit" and args[2] == 0:
            trainer.save_checkpoint(self.path)


class KeepWeights(pl.Callback):
    """Keeps the weights after each step, and those that validation looks at."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps.append(weights(pl_module))

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        reshard(pl_module)
        self.validated.append(weights(pl_module))


def lived(strategy: str, folder: Path, variant: str) -> dict[str, Any]:
    """A run with all that looks at weights: stopped after half of it, gone on by a strategy named in the variant."""
    own = folder / f"{strategy}-{variant}"
    keep = KeepWeights()
    counts: list[int] = []
    losses: list[dict[str, float]] = []
    diagnostics: list[dict[str, float]] = []
    # "life": half of the run, and the rest from the checkpoint; "life_WAY" goes on with the half of another way.
    first = own / "half.ckpt" if variant == "life" else folder / variant.removeprefix("life_") / "half.ckpt"
    for half in (1, 2):
        if half == 1 and variant != "life":
            continue
        built, lpl = module(counts)
        watch = Watch()
        callbacks: list[Any] = [EMA(decay=0.5, also=[0.9]), lpl, watch, keep]
        if half == 1:
            callbacks.append(SaveWithin(first))
        else:
            torch.manual_seed(5)  # the checkpoint's seed is gone on with
            callbacks += [SampleGrid(num_images=3, columns=3, batch_size=2), SaveWeights(), SaveDiffusers()]
        options: dict[str, Any] = {"max_steps": STEPS * half // 2, "val_check_interval": STEPS // 2}
        run = trainer(strategy, own, callbacks=callbacks, **options)
        run.fit(built, data(strategy), ckpt_path=None if half == 1 else first, weights_only=True)
        losses += watch.losses
        diagnostics += watch.diagnostics
    validation = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val_")}
    run.save_checkpoint(own / "end.ckpt")
    after = weights(built)
    # What evaluates a checkpoint by another trainer, the average of another decay in place.
    built, lpl = module(counts)
    suite = Suite([SpectrumMetrics()])
    evaluation = Evaluation(num_images=5, batch_size=2, suite=suite, stage="validate", reconstruct=False, cache=False)
    run = trainer(strategy, own, callbacks=[EMA(decay=0.9), lpl, evaluation, ImageWriter(str(own / "generated"))])
    found = data(strategy)
    found.num_generate = 9  # in batches of 4, of which one process has one more
    tested = run.validate(built, found, ckpt_path=own / "end.ckpt", verbose=False)[0]
    run.predict(built, found, ckpt_path=own / "end.ckpt")
    return {
        "inference_mode": run.validate_loop.inference_mode,
        "losses": losses,
        "diagnostics": diagnostics,
        "passed": counts,
        "validation": validation,
        "tested": tested,
        "steps": keep.steps,
        "validated": keep.validated,
        "weights": after,
    }


def resumed(strategy: str, folder: Path, variant: str) -> dict[str, Any]:
    """Stopped half-way and gone on: by a folder of all processes' shards, or while the weight of LPL is measured."""
    losses, of_lpl = [], []
    path = folder / f"{strategy}-{variant}" / ("half" if variant == "shards" else "half.ckpt")
    for half in (1, 2):
        built, lpl = module([])
        if variant == "auto":
            lpl = LPLCallback(weight="auto", calibration_steps=3, loss=lpl.make_loss)
        watch = Watch()
        torch.manual_seed(5 * (half - 1))
        options: dict[str, Any] = {"max_steps": STEPS * half // 2, "limit_val_batches": 0, "val_check_interval": None}
        run = trainer(strategy, folder, callbacks=[EMA(decay=0.5), lpl, watch], **options)
        cast(Any, run.strategy)._save_distributed_checkpoint = variant == "shards"
        run.fit(built, data(strategy), ckpt_path=None if half == 1 else path, weights_only=True)
        if half == 1:
            run.save_checkpoint(path)
        losses += watch.losses
        of_lpl.append(lpl.weight)
    return {"losses": losses, "weights": weights(built), "of_lpl": of_lpl}


class SaveAfter(pl.Callback):
    """Writes a checkpoint after one of the batches, and ends the run there."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path)
            raise Ended


class Ended(Exception):
    """The run of a test."""


def broken(strategy: str, folder: Path, variant: str) -> dict[str, Any]:
    """Stopped twice between the batches that are accumulated for a step; or gone on with by another strategy."""
    own = folder / (f"{strategy}-{variant}" if variant == "broken" else variant.removeprefix("broken_"))
    parts, stops = 4, (5, 6)
    losses: list[dict[str, float]] = []
    for number in range(0 if variant == "broken" else 2, 3):
        built, lpl = module([])
        watch = Watch()
        callbacks: list[Any] = [lpl, watch, AccumulatedGradients()]
        if number < 2:
            callbacks.append(SaveAfter(own / f"{number}.ckpt", stops[number]))
        options: dict[str, Any] = {"accumulate_grad_batches": parts, "limit_val_batches": 0, "val_check_interval": None}
        run = trainer(strategy, folder, callbacks=callbacks, **options)
        torch.manual_seed(5 * number)
        path = own / f"{number - 1}.ckpt" if number else None
        with suppress(Ended):
            run.fit(built, data(strategy, parts), ckpt_path=path, weights_only=True)
        losses += watch.losses
    return {"losses": losses, "weights": weights(built)}


class SendSignal(pl.Callback):
    """Sends a signal to the second of two processes alone."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def preempted(strategy: str, folder: Path, variant: str) -> dict[str, Any]:
    """What becomes of processes of which one is sent a signal: what they exit with, and after which step."""
    built, lpl = module([])
    saving = ModelCheckpoint(folder / f"{strategy}-{variant}")
    callbacks: list[Any] = [lpl, SendSignal(), Preemption(every_n_steps=3), saving]
    run = trainer(strategy, folder, callbacks=callbacks, enable_checkpointing=True)
    try:
        run.fit(built, data(strategy))
    except SystemExit as ended:
        return {"code": ended.code, "step": run.global_step}
    return {"code": None, "step": run.global_step}


def refused(strategy: str, folder: Path, variant: str) -> dict[str, Any]:
    """What is said to a module that trains something that nobody shards."""
    built, _ = module([])
    built.temperature = torch.nn.Parameter(torch.ones(()))
    try:
        trainer(strategy, folder).fit(built, data(strategy))
    except ValueError as error:
        return {"said": str(error)}
    return {"said": ""}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = Path(sys.argv[1])
    pl.seed_everything(0, verbose=False)
    for way in sys.argv[2:]:
        strategy, variant = way.split("-", 1)
        ways = {"life": lived, "refused": refused, "shards": resumed, "auto": resumed}
        ways |= {"broken": broken, "preempted": preempted}
        find = ways.get(variant.split("_")[0], trained)
        found = find(strategy, folder, variant)
        torch.save(found, folder / f"{way}-{os.environ.get('RANK', '0')}.pt")
