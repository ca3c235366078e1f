"""What becomes of a run that its cluster takes the machine from: a checkpoint, and an end, at the next step."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lpl_lightning.arguments import at_least
from lpl_lightning.loader_processes import outlive_signals

__all__ = ["Preemption"]


class Preemption(Callback):
    """Saves and ends ``fit`` when a signal says that the process is about to be killed.

    The signal is noted, and acted on after the next optimizer step, never in the middle of one or of accumulated
    gradients: the checkpoint ``preempted.ckpt`` is written beside those of the run's first ``ModelCheckpoint``, and all
    processes exit, the first with 128 and the signal's number, as the shell says it. A validation, in which nothing is
    trained, is broken off at once, and is made anew when the run goes on, by ``UnfinishedValidation``; several
    processes look before it begins and finish it. An ``Evaluation`` within training, if it comes before this callback,
    stops making images, and goes on with the run. ``--ckpt_path last`` goes on from there. In a list of callbacks it
    comes after those that have a part of checkpoints, such as ``EMA``, which must have taken the step in before; behind
    those of the module's ``configure_callbacks`` it puts itself.

    A signal may reach every process of the job: those of the trainer's DataLoaders outlive it (``OutliveSignals``).

    Under SLURM, with ``SLURMEnvironment(auto_requeue=True)``, Lightning's default, the job is put back into the queue
    if the signal was the one to requeue on (``SIGUSR1``; ``#SBATCH --signal=USR1@120`` sends it 120 s before the end).
    This takes the place of Lightning's own saving in the middle of whatever was going on.

    Args:
        signals: Names of the signals. Of several, or where processes were sent different ones, the last named counts.
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
        self._breaks_off = False  # whether a signal does not wait for the next step
        self._ends = False  # whether all processes know that this step is the last

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have loader processes outlive the signals, whenever they are started."""
        if stage != "fit":
            return
        self._follow(trainer, pl_module)
        # No callback is called between the making of loaders and the start of their processes.
        strategy, names = trainer.strategy, [one.name for one in self.signals]
        process = strategy.process_dataloader

        def processed(dataloader: object) -> object:
            outlive_signals(dataloader, names, trainer.global_rank)
            return process(dataloader)

        strategy.process_dataloader = processed  # type: ignore[method-assign]

    def _follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Come after callbacks of the module's own, which no one could list before this one."""
        own = {type(one) for one in _listed(pl_module.configure_callbacks())}
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        behind = [place for place, one in enumerate(callbacks) if type(one) in own and not _is_a(one, "Checkpoint")]
        place = callbacks.index(self)
        if behind and behind[-1] > place:
            # A new list: this one is being gone through.
            trainer.callbacks = [  # type: ignore[attr-defined]
                *callbacks[:place],
                *callbacks[place + 1 : behind[-1] + 1],
                self,
                *callbacks[behind[-1] + 1 :],
            ]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave later loaders as they are."""
        vars(trainer.strategy).pop("process_dataloader", None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen, in the place of Lightning's own handlers, which come back at the end.

        Raises:
            ValueError: A callback with a part of checkpoints comes after this one.
        """
        after = trainer.callbacks[trainer.callbacks.index(self) + 1 :]  # type: ignore[attr-defined]
        # A Checkpoint's part is of checkpoints, and a Timer's is the time at which it is asked.
        late = [type(one).__name__ for one in after if _has_part(one) and not _is_a(one, "Checkpoint", "Timer")]
        if late:
            raise ValueError(f"Preemption would save before {', '.join(late)} took the step in: put it after them.")
        self.listen(trainer)
        number = self._found(trainer)
        if number is not None:  # while an evaluation was being finished
            rank_zero_info(f"{number.name} received before the first step: there is nothing new to save.")
            self._end(trainer, number)

    def listen(self, trainer: pl.Trainer) -> None:
        """Note signals from now on, which ``on_train_start`` does if nothing has before."""
        if self._before:
            return
        self.received, self._step, self._breaks_off, self._ends = None, trainer.global_step, False, False
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
        # Several optimizers take several steps in a batch, and may pass over a multiple.
        asks = step // self.every_n_steps > self._step // self.every_n_steps
        self._step = step
        if trainer.world_size == 1 or asks or self._ends:
            self._end_if_received(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save and end, if it is time, or be ready to."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._breaks_off = trainer.world_size == 1
            self._end_if_received(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the next step again."""
        self._breaks_off = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen no longer."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save, if it is a validation that a signal breaks off; listen no longer."""
        if isinstance(exception, _BrokenOff) and self.received is not None:
            self._save(trainer, self.received)
            self._requeue(trainer, self.received)
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        found = signal.Signals(number)
        if self.received is None or self.signals.index(found) > self.signals.index(self.received):
            self.received = found
        if self._breaks_off:
            self._breaks_off = False
            raise _BrokenOff(128 + found)

    def _restore(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def is_received(self, trainer: pl.Trainer) -> bool:
        """Whether a signal has come to any process, so that this step is the last; all must call it."""
        self._ends = self._found(trainer) is not None
        return self._ends

    def _found(self, trainer: pl.Trainer) -> signal.Signals | None:
        own = 0 if self.received is None else 1 + self.signals.index(self.received)
        count = torch.tensor(own, device=trainer.strategy.root_device)
        found = int(trainer.strategy.reduce(count, reduce_op="max")) if trainer.world_size > 1 else own
        return self.signals[found - 1] if found else None

    def _end_if_received(self, trainer: pl.Trainer) -> None:
        """Save and end, if a signal has come to any process; all must call it."""
        number = self._found(trainer)
        if number is None:
            return
        self._breaks_off = False
        self._save(trainer, number)
        self._end(trainer, number)

    def _end(self, trainer: pl.Trainer, number: signal.Signals) -> NoReturn:
        self._requeue(trainer, number)
        # Other processes end well: launchers kill the first when one of them does not.
        raise SystemExit(128 + number if trainer.is_global_zero else 0)

    def _save(self, trainer: pl.Trainer, number: signal.Signals) -> None:
        checkpoints: list[Any] = trainer.checkpoint_callbacks
        checkpoint = next((one for one in checkpoints if _is_a(one, "ModelCheckpoint")), None)
        if checkpoint is None or checkpoint.dirpath is None:
            rank_zero_warn(
                f"{number.name} received: training ends at step {trainer.global_step} without a checkpoint: there is "
                "no ModelCheckpoint, whose folder it would go to."
            )
        else:
            path = os.path.join(checkpoint.dirpath, "preempted.ckpt")  # which may be of s3:// and so on
            trainer.save_checkpoint(path)
            rank_zero_info(
                f"{number.name} received: step {trainer.global_step} saved in {path}. The same command with "
                "`--ckpt_path last` goes on."
            )

    def _requeue(self, trainer: pl.Trainer, number: signal.Signals) -> None:
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            _requeue(trainer, number)


def _listed(callbacks: Any) -> Sequence[Any]:
    return callbacks if isinstance(callbacks, Sequence) else [callbacks]


def _has_part(callback: object) -> bool:
    """Whether a callback may have a part of checkpoints: a hook that is not the base class's."""
    owners = (
        next(cls for cls in type(callback).__mro__ if hook in vars(cls))
        for hook in ("state_dict", "on_save_checkpoint")
    )
    return any(not (owner.__name__ == "Callback" and _is_lightnings(owner)) for owner in owners)


def _is_a(callback: object, *names: str) -> bool:
    """Whether a callback is one of Lightning's, of either of its packages, whose classes are not the same."""
    return any(cls.__name__ in names and _is_lightnings(cls) for cls in type(callback).__mro__)


def _is_lightnings(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")


class _BrokenOff(SystemExit):
    """Raised by a signal in the middle of a validation."""


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
