"""Signals to real loader processes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import Script
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from lpl_lightning import Preemption
from lpl_lightning.loader_processes import OutliveSignals, outlive_signals

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signals")


class Slow(Dataset[torch.Tensor]):
    """Its items take 10 ms, or, from some number on, forever."""

    def __init__(self, count: int, stuck_from: int | None = None) -> None:
        self.count, self.stuck_from = count, stuck_from

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.01 if self.stuck_from is None or index < self.stuck_from else 3600)
        return torch.tensor([float(index)])


def note(worker_id: int) -> None:
    """A ``worker_init_fn`` that shows that it was called."""
    torch.manual_seed(100 + worker_id)


class Drawn(Dataset[int]):
    """Its items say what seed their process has."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return torch.initial_seed() % 2**31


@pytest.mark.parametrize("context", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_processes_outlive_signals(context: str) -> None:
    """By each way of starting them; in the last, threads of libraries are there before."""
    options: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": context}
    loader = DataLoader(Slow(200), batch_size=4, worker_init_fn=OutliveSignals(), **options)
    batches = iter(loader)
    found = [next(batches), next(batches)]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, number)
    found += batches
    assert torch.equal(torch.cat(found), torch.arange(200.0).unsqueeze(1))


def test_without_it_they_die() -> None:
    batches = iter(DataLoader(Slow(200), batch_size=4, num_workers=2))
    next(batches)
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*killed by signal|exited unexpectedly"):
        list(batches)


def leave(*numbers: int) -> None:
    """Exit while loader processes of three kinds are there: idle, stuck, and stuck outside of Python."""
    then = [None, None, stuck_outside]
    stuck = [None, 8, None]
    loaders = [
        DataLoader(
            Slow(64, stuck[kind]),
            batch_size=4,
            num_workers=1,
            persistent_workers=True,
            worker_init_fn=OutliveSignals(then=then[kind]),
        )
        for kind in range(3)
    ]
    kept.extend(iter(loader) for loader in loaders)
    next(kept[1])
    time.sleep(0.5)
    processes = multiprocessing.active_children()
    assert len(processes) == 3
    for number in numbers:
        for process in processes:
            assert process.pid is not None
            os.kill(process.pid, number)
    time.sleep(0.5)
    print(sum(process.is_alive() for process in processes), flush=True)


kept: list[Any] = []


def stuck_outside(worker_id: int) -> None:
    """Wait in C, where no handler of Python's runs."""
    libc = ctypes.CDLL(None)
    while True:
        libc.usleep(100_000)


@pytest.mark.parametrize(
    "numbers", [pytest.param([], marks=pytest.mark.slow), [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1]]
)
def test_they_end_with_the_training_process(numbers: list[int]) -> None:
    """Python waits at its exit for such processes."""
    code = f"from test_loader_processes import leave; leave(*{[int(number) for number in numbers]})"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "3\n"), ended.stderr


def test_what_the_loader_had_is_called_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    loader = DataLoader(Drawn(), num_workers=2, worker_init_fn=note)
    outlive_signals(loader, ["SIGTERM"], 0)
    assert [int(seed) for seed in loader] == [100, 101, 100, 101]
    made = loader.worker_init_fn
    outlive_signals(loader, ["SIGTERM"], 0)
    assert loader.worker_init_fn is made
    outlive_signals("no loader", ["SIGTERM"], 0)


def test_lightning_seeds_them_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """``seed_everything(workers=True)`` gives loaders without a ``worker_init_fn`` one, after ours was set."""
    from lightning.fabric.utilities.data import _auto_add_worker_init_fn

    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    seeds = []
    for outlives in (False, True):
        loader = DataLoader(Drawn(), num_workers=2, generator=torch.Generator().manual_seed(3))
        if outlives:
            outlive_signals(loader, ["SIGTERM"], 5)
        _auto_add_worker_init_fn(loader, 5)
        seeds.append([int(seed) for seed in loader])
    assert seeds[0] == seeds[1]


class Line(pl.LightningModule):
    """Fits nothing much."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.weight * batch).square().mean() * 1e-6

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class SignalsToAll(pl.Callback):
    """Sends a signal to the process's group, as clusters do, in a batch of training or of validation."""

    def __init__(self, number: int, where: str) -> None:
        self.number, self.where = number, where

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.where == "training" and trainer.global_step == 3:
            os.killpg(0, self.number)
            time.sleep(1)  # for what PyTorch does about loader processes that die

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if self.where == "validation" and trainer.global_step == 4:
            os.killpg(0, self.number)
            time.sleep(1)


def fit(folder: str, number: int, where: str) -> None:
    """Train with loader processes until the signal comes, which it does to all of this process's group."""
    saving = ModelCheckpoint(folder, every_n_train_steps=1000)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [SignalsToAll(number, where), Preemption(), saving]
    trainer = pl.Trainer(max_steps=8, accelerator="cpu", val_check_interval=4, callbacks=callbacks, **options)
    loaders = [DataLoader(Slow(40), num_workers=2, persistent_workers=persistent) for persistent in (True, False)]
    trainer.fit(Line(), loaders[0], loaders[1])


@pytest.mark.parametrize(("number", "where"), [(signal.SIGTERM, "training"), (signal.SIGUSR1, "validation")])
def test_a_signal_to_the_whole_job_saves(tmp_path: Path, number: int, where: str) -> None:
    assert Script(__file__, tmp_path, int(number), where).end(90).returncode == 128 + number
    assert torch.load(tmp_path / "preempted.ckpt", weights_only=True)["global_step"] == 4


if __name__ == "__main__":
    fit(sys.argv[1], int(sys.argv[2]), sys.argv[3])
