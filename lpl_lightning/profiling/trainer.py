"""A trainer that measures what the Latent Perceptual Loss costs in its own training loop."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lpl_lightning.arguments import at_least
from lpl_lightning.callbacks import LPLCallback
from lpl_lightning.losses import LatentPerceptualLoss, Subset
from lpl_lightning.profiling.decoder import DecoderCost, profile_decoder
from lpl_lightning.profiling.report import Block, Report
from lpl_lightning.profiling.steps import PeakMemory, StepRecorder, release_memory
from lpl_lightning.profiling.variants import LPLVariants, keep_layout, loss_of

__all__ = ["ProfilingTrainer"]

ROUNDS = 2
REPEATS = 5
"""How often a part of the loss is measured, at most."""


class ProfilingTrainer(pl.Trainer):
    """Lightning's trainer, with ``profile`` beside ``fit``, ``validate``, ``test`` and ``predict``."""

    def profile(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        steps: int = 10,
        warmup: int = 2,
        output: str | None = "profile.json",
    ) -> Report:
        """Measure what LPL costs: the time and memory of a training step, the decoder by stage, and the floor.

        A few steps are trained without LPL, with it as the trainer's ``LPLCallback`` has it, and in the way of other
        implementations: the same loss of the whole batch at once, with the decoder's stages run again in the backward
        pass, four passes in all. Everything is the trainer's but loggers, validation and the other callbacks. Each
        block of steps starts from the same seed, and so sees the same batches; all are run twice, so that a drift of
        the machine shows less. Then the parts of the loss are measured on a batch's latents. A table is printed and a
        JSON file written, and nothing else.

        Args:
            model: A module with ``LPLMixin``.
            datamodule: Its data.
            steps: Optimizer steps that are measured in each block; each part of the loss is measured as often, but at
                most 5 times.
            warmup: Steps before those in each block.
            output: The JSON file to write, in a folder that exists. One that is there is replaced. None writes none and
                prints nothing, for who takes the report.

        Returns:
            What was found.

        Raises:
            ValueError: An argument out of its range, or a module that LPL cannot be added to.
        """
        at_least(1, steps=steps)
        at_least(0, warmup=warmup)
        path = None if output is None else Path(output)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"`output` must be a file in a folder that exists, got {output!r}.")
        if isinstance(self.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                f"`strategy`: what {type(self.strategy).__name__} trains in other processes cannot be measured from "
                "this one. Take ddp, or a single device."
            )
        variants = LPLVariants.of(cast(Any, self).callbacks)
        loss = loss_of(variants.configured(), self, model)
        passes = "four" if loss.autoencoder.in_stages else "three"
        ways: dict[str, Callable[[], LPLCallback] | None] = {
            "without LPL": None,
            "with LPL": variants.configured,
            f"{passes} passes, whole batch": variants.whole_batch,
        }
        report = Report(
            machine=_machine(self),
            config=_config(self, loss) | {"weight": variants.weight, "steps": steps, "warmup": warmup},
            blocks=[Block(name) for name in ways],
            every_n_steps=variants.every_n_steps,
            notes=[*variants.notes],
        )
        if passes == "three":
            report.notes.append("The decoder does not run in stages, so that its activations are not computed again.")
        if loss.subset != Subset():
            report.notes.append("The whole batch is compared without the config's `subset`.")
        # Out of reach, since the recorder ends a run, and no less than the config's, which a rate may be scheduled by.
        limit = max(self.max_steps, 1000 * (warmup + steps))
        restore_layout = keep_layout(loss.autoencoder)
        samples: list[tuple[float, float]] = []
        latents: tuple[Tensor, Tensor, Tensor | None] | None = None
        with self._bare():
            for number in range(ROUNDS):
                for block, way in zip(report.blocks, ways.values(), strict=True):
                    if block.failure is not None:
                        continue
                    rank_zero_info(f"Profile: round {number + 1} of {ROUNDS}, {block.name}.")
                    restore_layout()
                    # What a round leaves behind would count as the memory of the next.
                    memory = None if number else PeakMemory(self.strategy.root_device)
                    recorder = StepRecorder(warmup, steps, memory)
                    try:
                        self._train(model, datamodule, [*([] if way is None else [way()]), recorder], limit, number)
                        samples.append(recorder.samples(loss))
                        latents = recorder.latents
                    except Exception as error:
                        if not samples:
                            raise
                        block.failure = _one_line(error)
                    if block.failure is not None:
                        release_memory()  # of the error's frames, now that it is gone
                    block.add(recorder)
                    self._write(report, path)
            assert latents is not None
            report.samples_decoded, report.batch_size = (mean(counts) for counts in zip(*samples, strict=True))
            tau = loss.tau(latents[1])
            report.config["latent_shape"] = list(latents[1].shape[1:])
            report.config["threshold_noise_to_signal"] = tau if math.isfinite(tau) else None
            restore_layout()
            rank_zero_info("Profile: the parts of the loss.")
            try:
                loss = loss_of(variants.configured(), self, model)
                count = max(1, round(report.samples_decoded))
                report.decoder = self._measure_parts(loss, *latents, count, min(steps, REPEATS))
            except Exception as error:
                report.decoder_failure = _one_line(error)
            restore_layout()
        report.complete = report.decoder_failure is None and all(block.failure is None for block in report.blocks)
        self._write(report, path)
        if path is not None and self.is_global_zero:
            print(report.table(), f"Written: {path}", sep="\n")
        return report

    def _train(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None,
        callbacks: list[pl.Callback],
        limit: int,
        seed: int,
    ) -> None:
        """Train until a callback ends it, from the start."""
        model.zero_grad()
        pl.seed_everything(seed, workers=True, verbose=False)
        cast(Any, self).callbacks = callbacks
        # Those that have run would go on where they were.
        self.fit_loop = _FitLoop(self, min_epochs=0, max_epochs=-1)
        self.fit_loop.epoch_loop = _TrainingEpochLoop(self, max_steps=limit)
        self.fit(model, datamodule=datamodule)
        recorder = cast(StepRecorder, callbacks[-1])
        if not recorder.seconds:
            raise ValueError("The data gave no batch to train on. See `limit_train_batches`, and what the data hold.")
        if recorder.latents is None:
            raise ValueError(
                f"{type(model).__name__}.training_step never asked for loss terms. Add "
                "self.auxiliary_loss(z0_hat, z0, noise_to_signal) to its loss."
            )

    def _measure_parts(
        self,
        loss: LatentPerceptualLoss,
        z0_hat: Tensor,
        z0: Tensor,
        noise_to_signal: Tensor | None,
        count: int,
        repeats: int,
    ) -> DecoderCost | None:
        """Measure the loss on the samples of a batch that pass first."""
        release_memory()
        chosen = slice(count) if noise_to_signal is None else noise_to_signal.argsort()[:count].to(z0.device)
        autoencoder, device = loss.autoencoder, loss.autoencoder.scale.device
        autoencoder.to(z0.device)
        try:
            with self.precision_plugin.forward_context():
                return profile_decoder(loss, z0_hat[chosen], z0[chosen], repeats)
        finally:
            autoencoder.to(device)

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Without what writes or only looks on."""
        trainer = cast(Any, self)
        names = ("callbacks", "loggers", "profiler", "limit_val_batches", "num_sanity_val_steps", "fit_loop")
        kept = {name: getattr(trainer, name) for name in names}
        trainer.loggers, trainer.profiler = [], PassThroughProfiler()
        trainer.limit_val_batches = trainer.num_sanity_val_steps = 0
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(trainer, name, value)

    def _write(self, report: Report, path: Path | None) -> None:
        """Write what there is so far: where memory runs out, the process may be gone without a word."""
        if path is not None and self.is_global_zero:
            report.write(path)


def _machine(trainer: pl.Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": str(device),
        "device_name": name,
        "memory": PeakMemory(device).kind,
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "lightning", "diffusers")},
    }


def _config(trainer: pl.Trainer, loss: LatentPerceptualLoss) -> dict[str, Any]:
    return {
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "autoencoder": type(loss.autoencoder.model).__name__,
        "preset": loss.preset,
        "compared": list(loss.compared),
        "execution": asdict(loss.execution),
        "subset": asdict(loss.subset),
    }


def _one_line(error: Exception) -> str:
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first[:200]}"
