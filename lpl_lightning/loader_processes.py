"""Loader processes that outlive the signals a whole job is sent, so that the run they load for can save and end."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.util import Finalize
from types import FrameType

from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader

__all__ = ["OutliveSignals", "outlive_signals"]

END: signal.Signals | None = getattr(signal, "SIGURG", None)
"""What ends a loader process that outlives ``SIGTERM``: a signal that others ignore. Windows needs none."""

_ends_theirs: set[int] = set()
"""Ids of the processes that end loader processes at their exit."""


class OutliveSignals:
    """A ``worker_init_fn`` of ``DataLoader``: the loader process takes no notice of signals to the job.

    Clusters send theirs to every process of a job. A loader process that dies of one makes PyTorch raise in the
    training process, in the middle of a step. Loader processes end when the loader is through with them, or the
    training process gone. One that is stuck gets ``SIGTERM`` from PyTorch, which cannot be told from the job's: it ends
    when the training process does.

    Args:
        signals: Names of the signals.
        then: Another ``worker_init_fn``, called after.
    """

    def __init__(
        self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1"), then: Callable[[int], None] | None = None
    ) -> None:
        self.signals, self.then = signals, then
        if os.getpid() not in _ends_theirs:  # a fork has none of its parent's finalizers
            _ends_theirs.add(os.getpid())
            # Before Python sends SIGTERM to these processes, and waits for them.
            Finalize(None, _end_loader_processes, exitpriority=0)

    def __call__(self, worker_id: int) -> None:
        """Called in the loader process by PyTorch, with the process's number."""
        for name in self.signals:
            if name in signal.Signals.__members__:
                signal.signal(signal.Signals[name], _nothing)  # unlike SIG_IGN, not inherited by programs it starts
        if END is not None:
            signal.signal(END, _nothing)
            # A thread is told of it even where the main one is stuck outside of Python, and runs no handlers.
            told, tells = os.pipe()
            os.set_blocking(tells, False)
            signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
            threading.Thread(target=_end_when_told, args=(told,), name="lpl-signals", daemon=True).start()
        if self.then is not None:
            self.then(worker_id)


def outlive_signals(loader: object, signals: Sequence[str], rank: int) -> None:
    """Have the processes of a ``DataLoader``, not yet started, outlive signals; nothing happens to other objects.

    Args:
        loader: The loader. Its own ``worker_init_fn`` is kept, or that which Lightning gives to one without, after
            ``seed_everything(..., workers=True)``.
        signals: Names of the signals.
        rank: Number of the training process.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.worker_init_fn, OutliveSignals):
        return
    then = loader.worker_init_fn
    if then is None and int(os.environ.get("PL_SEED_WORKERS", 0)):
        then = functools.partial(pl_worker_init_function, rank=rank)
    loader.worker_init_fn = OutliveSignals(signals, then)


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


def _end_when_told(told: int) -> None:
    while os.read(told, 1)[0] != END:
        pass
    os._exit(0)  # as PyTorch's own handler does


def _end_loader_processes() -> None:
    for process in multiprocessing.active_children():
        if process.daemon and process.pid is not None and END is not None:
            os.kill(process.pid, END)
