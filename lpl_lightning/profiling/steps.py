"""Time and memory of training steps, and what of their batches passed the gate."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lpl_lightning.losses import LatentPerceptualLoss
from lpl_lightning.losses.measurement import synchronize
from lpl_lightning.mixin import LPLMixin

__all__ = ["PeakMemory", "StepRecorder", "release_memory"]

_STATM = Path("/proc/self/statm")


def release_memory() -> None:
    """Give memory that nothing uses back, as far as it goes, so that what comes next is seen to take its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        # glibc keeps what was freed; another C library has no such function.
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """The most memory that a stretch of work takes.

    On CUDA it is what tensors take on the device. Elsewhere it is the process's resident size, read every few
    milliseconds, without the loader's processes; where the system does not tell it, the largest it ever was.

    Args:
        device: The device that the work is done on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "allocated" if device.type == "cuda" else "resident"
        if self.kind == "resident" and not _STATM.exists():
            self.kind = "resident (largest ever)"
        self.peak = 0
        """Bytes, after ``stop``."""
        self.above_start = 0
        """Bytes above what there was at ``start``, after ``stop``."""
        self._start = 0
        self._stopped = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Begin."""
        release_memory()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return
        self._start = self.peak = _resident()
        self._stopped.clear()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; nothing happens where it had not begun or has ended."""
        if self._start == 0:
            return
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        elif self._thread is not None:
            self._stopped.set()
            self._thread.join()
        self.above_start = self.peak - self._start
        self._start = 0

    def _watch(self) -> None:
        while not self._stopped.wait(0.003):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    """Resident size of this process in bytes, or 0 where nothing tells it."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


class StepRecorder(Callback):
    """Takes the time and memory of optimizer steps after the first few, and then ends the run.

    A step that accumulates gradients counts all its batches. The samples are seen through a loss term that is zero.

    Args:
        warmup: Steps before the first that counts.
        steps: Steps that count.
        memory: Takes their memory; without it only their time is taken.
    """

    def __init__(self, warmup: int, steps: int, memory: PeakMemory | None = None) -> None:
        self.warmup = warmup
        self.steps = steps
        self.memory = memory
        self.seconds: list[float] = []
        """From the start to the end of each step, in seconds."""
        self.waits: list[float] = []
        """For each step the seconds from the end of a batch to the start of the next: loading and moving it."""
        self.latents: tuple[Tensor, Tensor, Tensor | None] | None = None
        """z0_hat and z0 (B, C, *positions) and noise-to-signal ratios (B,) of the last batch."""
        self._seen: list[tuple[Tensor, Tensor | None]] = []
        self._batches = 0
        self._done = 0
        self._global_step = 0
        self._started = self._took = self._waited = 0.0
        self._ended: float | None = None

    def samples(self, loss: LatentPerceptualLoss) -> tuple[float, float]:
        """Samples of a batch that passed the gate, and all of them: means over batches."""
        passed = [len(z) if ratio is None else int(loss.passes(ratio, z).sum()) for z, ratio in self._seen]
        total = sum(len(z) for z, _ in self._seen)
        batches = max(1, self._batches)
        return sum(passed) / batches, total / batches

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Add the term."""
        cast(LPLMixin, pl_module).add_loss_term("profile", self._see)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the term."""
        if self.memory is not None:
            self.memory.stop()
        cast(LPLMixin, pl_module).remove_loss_term("profile")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keep what was measured so far."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to take memory, where no step goes before."""
        self._begin()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Note the time."""
        self._started = synchronize(pl_module.device)
        if self._ended is not None:
            self._waited += self._started - self._ended

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Take the time."""
        self._ended = synchronize(pl_module.device)
        self._took += self._ended - self._started
        self._batches += self._counts
        if trainer.global_step == self._global_step:
            return
        if self._counts:
            self.seconds.append(self._took)
            self.waits.append(self._waited)
        self._global_step = trainer.global_step
        self._took = self._waited = 0.0
        self._done += 1
        self._begin()
        if len(self.seconds) == self.steps:
            if self.memory is not None:
                self.memory.stop()
            trainer.should_stop = True

    @property
    def _counts(self) -> bool:
        return self._done >= self.warmup

    def _begin(self) -> None:
        if self._done == self.warmup and self.memory is not None:
            self.memory.start()
            self._ended = None  # what that took was no waiting for data

    def _see(self, z0_hat: Tensor, z0: Tensor, noise_to_signal: Tensor | None) -> Tensor:
        self.latents = (z0_hat.detach(), z0.detach(), noise_to_signal)
        if self._counts:
            # The gate asks for the shape alone.
            self._seen.append((torch.empty_like(z0, device="meta"), noise_to_signal))
        return z0.new_zeros(())
