"""What becomes of a run that its cluster takes the machine from: a checkpoint, and an end, at the next step."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lpl_lightning.arguments import at_least

__all__ = ["Preemption"]


class Preemption(Callback):
    """Saves and ends ``fit`` when a signal says that the process is about to be killed.

    The signal is noted, and acted on after the next optimizer step, never in the middle of one or of accumulated
    gradients: the checkpoint ``preempted.ckpt`` is written beside those of the run's first ``ModelCheckpoint``, and all
    processes exit, the first with 128 and the signal's number, as the shell says it. One that comes during a validation
    takes effect after the step that follows it. ``--ckpt_path last`` goes on from there. In a list of callbacks it
    comes after those that have a state, such as ``EMA``, which must have taken the step in before it is saved.

    Under SLURM, with ``SLURMEnvironment(auto_requeue=True)``, Lightning's default, the job is put back into the queue
    if the signal was the one to requeue on (``SIGUSR1``; ``#SBATCH --signal=USR1@120`` sends it 120 s before the end).
    This takes the place of Lightning's own saving in the middle of whatever was going on.

    Args:
        signals: Names of the signals.
        every_n_steps: With several processes, optimizer steps between two times that they ask one another, which makes
            them wait: a signal may reach one of them alone, or not all in the same step.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1"), every_n_steps: int = 10) -> None:
        at_least(1, every_n_steps=every_n_steps)
        known = [name for name in signals if name in signal.Signals.__members__]
        if unknown := sorted(set(signals) - set(known)):
            raise ValueError(f"`signals` must be names of signals, such as SIGTERM, got {', '.join(unknown)}.")
        self.signals = [signal.Signals[name] for name in known]
        self.every_n_steps = every_n_steps
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen, in the place of Lightning's own handlers, which come back at the end.

        Raises:
            ValueError: A callback with a state comes after this one.
        """
        after = trainer.callbacks[trainer.callbacks.index(self) + 1 :]  # type: ignore[attr-defined]
        late = [
            type(one).__name__
            for one in after
            if is_overridden("state_dict", one, Callback) and not isinstance(one, Checkpoint)
        ]
        if late:
            raise ValueError(f"Preemption would save before {', '.join(late)} took the step in: put it after them.")
        self.received, self._step = None, trainer.global_step
        self._before = {}
        try:
            for one in self.signals:
                self._before[one] = signal.signal(one, self._note)
        except ValueError:  # not in the main thread, which alone may
            rank_zero_warn("Training does not run in the main thread: signals do not save it.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and end, if it is time."""
        step = trainer.global_step
        if step == self._step:
            return  # gradients are being accumulated, and would be lost
        self._step = step
        if trainer.world_size > 1:
            if step % self.every_n_steps:
                return
            if not trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
                return
        elif self.received is None:
            return
        self._end(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen no longer."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Listen no longer."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def _restore(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _end(self, trainer: pl.Trainer) -> None:
        found: int = trainer.strategy.broadcast(int(self.received or 0)) or int(signal.SIGTERM)
        what = f"{signal.Signals(found).name} received"
        checkpoint = next((one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)), None)
        if checkpoint is None or checkpoint.dirpath is None:
            rank_zero_warn(
                f"{what}: training ends at step {trainer.global_step} without a checkpoint: there is no "
                "ModelCheckpoint, whose folder it would go to."
            )
        else:
            path = Path(checkpoint.dirpath) / "preempted.ckpt"
            trainer.save_checkpoint(path)
            rank_zero_info(
                f"{what}: step {trainer.global_step} saved in {path}. The same command with `--ckpt_path last` goes on."
            )
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            _requeue(trainer, found)
        # Other processes end well: launchers kill the first when one of them does not.
        raise SystemExit(128 + found if trainer.is_global_zero else 0)


def _requeue(trainer: pl.Trainer, number: int) -> None:
    environment = trainer._accelerator_connector.cluster_environment  # strategies of one device have none themselves
    if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
        return
    if number != (environment.requeue_signal or signal.SIGUSR1):
        return
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"Job {job} could not be put back into the queue: {getattr(error, 'stderr', None) or error}")
