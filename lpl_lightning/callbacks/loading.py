"""How long training waits for its batches, and a word where one does not come."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl

__all__ = ["DataWait"]

_log = logging.getLogger(__name__)

NEXT = "_next"
"""How the names end under which Lightning tells its profiler that it asks a loader for a batch."""
TRAINING = "train_dataloader_next"
"""That of the training loader."""


class DataWait:
    """Takes the time between a trainer's asking for a batch and its having it, alone: no step, logging or saving.

    While it waits longer than a limit, each process says so in its log, from a thread of its own: once the limit is
    reached, and again each time the wait has doubled. The first batch of a validation, before which loader processes
    may have to be started, is spoken of once in a run at most.

    Args:
        timeout: The limit in seconds; None says nothing.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self.seconds = 0.0
        """Waited for training batches since the start of the fit."""
        self._asked: tuple[float, str] | None = None
        self._spoke_at: float | None = None
        self._before = ""
        self._silent = False
        self._said_first = False
        self._trainer: Any = None
        self._profiler: Any = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, trainer: pl.Trainer) -> None:
        """Listen to a trainer."""
        self.stop()
        self._trainer, self.seconds, self._said_first = trainer, 0.0, False
        self._profiler = self._trainer.profiler
        self._trainer.profiler = _Listening(self._profiler, self._ask, self._have)
        if self.timeout is not None:
            self._stopped = threading.Event()
            self._thread = threading.Thread(target=self._watch, name="lpl-data-wait", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Listen no more; nothing happens where it does not."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._trainer is not None:
            self._trainer.profiler = self._profiler
        self._trainer = self._asked = self._spoke_at = None

    def _ask(self, action: str) -> None:
        self._silent = action != self._before and TRAINING not in action and self._said_first
        self._asked = (time.monotonic(), action)

    def _have(self, action: str) -> None:
        with self._lock:
            asked, self._asked = self._asked, None
            spoke, self._spoke_at = self._spoke_at is not None, None
        if asked is None:
            return
        waited = time.monotonic() - asked[0]
        if TRAINING in action:
            self.seconds += waited
        elif action != self._before and spoke:
            self._said_first = True
        self._before = action
        if spoke:
            _log.warning("%sThe batch came after %.0f s.", self._process(), waited)

    def _watch(self) -> None:
        """What the thread does."""
        timeout = cast(float, self.timeout)
        while not self._stopped.wait(timeout / 10):
            with self._lock:
                asked = None if self._silent else self._asked
                waited = 0.0 if asked is None else time.monotonic() - asked[0]
                due = waited >= (timeout if self._spoke_at is None else 2 * self._spoke_at)
                if due:
                    self._spoke_at = waited
            if asked is not None and due:
                _log.warning(self._said(waited, asked[1]))

    def _process(self) -> str:
        return f"[rank {self._trainer.global_rank}] " if self._trainer.world_size > 1 else ""

    def _said(self, waited: float, action: str) -> str:
        trainer, training = self._trainer, TRAINING in action
        loop = trainer.fit_loop
        loader = trainer.train_dataloader if training else trainer.val_dataloaders
        workers = getattr(loader, "num_workers", None)
        data = getattr(loader, "dataset", None)
        # Loaders that make whole batches wrap the set of their items.
        name = type(getattr(data, "items", data)).__name__
        about = f"{type(loader).__name__} of {name}" if data is not None else type(loader).__name__
        pids = ", ".join(str(child.pid) for child in multiprocessing.active_children())
        where = (
            f"batch {loop.epoch_loop.batch_progress.current.ready} of epoch {trainer.current_epoch}"
            if training
            else f"validation after step {trainer.global_step}"
        )
        look = (
            f"its processes ({workers}; `py-spy dump --pid PID` shows what one does, of {pids or 'those of `ps`'})"
            if workers
            else "this process, which loads by itself (`num_workers` 0)"
        )
        return (
            f"{self._process()}Waiting for data for {waited:.0f} s: {where}, {about}. Look at the storage or network "
            f"that the data come from, and at {look}. Training goes on when the batch comes."
        )


class _Listening:
    """A profiler that tells of Lightning's asking for batches, and is the given one otherwise."""

    def __init__(self, inner: Any, ask: Callable[[str], None], have: Callable[[str], None]) -> None:
        self._inner, self._ask, self._have = inner, ask, have

    def start(self, action_name: str) -> None:
        if action_name.endswith(NEXT):
            self._ask(action_name)
        self._inner.start(action_name)

    def stop(self, action_name: str) -> None:
        self._inner.stop(action_name)
        if action_name.endswith(NEXT):
            self._have(action_name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
