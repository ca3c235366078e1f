"""Training batches that are a function of a seed, the epoch and the batch's number alone.

Neither loader processes nor how many there are, nor where a run was stopped and went on, changes them: the order of an
epoch's items comes from the seed and the epoch, and what an item draws (a crop, a flip, one of its captions) from these
and its position in the data. W processes with B items a batch share out what one process with W B items has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from itertools import count, islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.distributed import DistributedSampler

from lpl_lightning.processes import own_place

__all__ = ["EpochPlan", "Request", "Shuffled", "TrainingLoader", "drawing"]


class EpochPlan(Protocol):
    """The batches of an epoch, of all processes together."""

    @property
    def settings(self) -> dict[str, int]:
        """What the batches depend on besides seed and epoch."""

    def __len__(self) -> int:
        """Number of batches, the same in each epoch."""

    def __call__(self, seed: int, epoch: int) -> Iterator[Sequence[int]]:
        """Positions of the items of each batch."""


class Shuffled:
    """All items in random order, in batches of one size.

    What does not fill a batch is left out of the epoch, other items each time. Fewer items than a batch make one batch.

    Args:
        count: Number of items.
        batch_size: Items in a batch of all processes together.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, min(batch_size, count)

    @property
    def settings(self) -> dict[str, int]:
        """Items, and those of a batch."""
        return {"items": self.count, "batch_size": self.batch_size}

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __call__(self, seed: int, epoch: int) -> Iterator[Sequence[int]]:
        """Positions of the items of each batch."""
        order = np.random.default_rng([seed, epoch]).permutation(self.count)
        for batch in range(len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


class Request(NamedTuple):
    """A batch to load.

    Attributes:
        seed: What order and draws come from.
        epoch: Number of the epoch, from 0.
        indices: Positions of the items.
    """

    seed: int
    epoch: int
    indices: Sequence[int]


@contextmanager
def drawing(*numbers: int) -> Iterator[None]:
    """Let torch draw on the CPU from a seed made of numbers for a while, and go on as before after it."""
    digest = blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int.from_bytes(digest, "big") >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(before)


class _Batches(Dataset[Any]):
    """Whole batches of a data set of items."""

    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __getitem__(self, request: Request) -> Any:
        whole: Callable[[Request], Any] | None = getattr(self.items, "batch", None)
        if whole is not None:
            return whole(request)
        items = []
        for index in request.indices:
            with drawing(request.seed, request.epoch, index):
                items.append(self.items[index])
        return default_collate(items)


class _Sampler(DistributedSampler[Any]):
    """Requests of one process; a ``DistributedSampler``, which Lightning leaves in place."""

    def __init__(self, plan: EpochPlan, seed: int, rank: int, world_size: int) -> None:
        self.plan, self.seed, self.rank, self.num_replicas = plan, seed, rank, world_size
        self.epoch, self.first, self.number = 0, 0, len(plan)

    def set_epoch(self, epoch: int) -> None:
        """The loader counts epochs, which it goes on with after a stop; trainers count them otherwise."""

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Any]:
        return islice(self._requests(self.epoch, self.first), self.number)

    def _requests(self, epoch: int, first: int) -> Iterator[Request]:
        for later in count(epoch):
            for indices in islice(self.plan(self.seed, later), first if later == epoch else 0, None):
                share = -(-len(indices) // self.num_replicas)
                # Round from the start where they do not come out even: each process must have a batch.
                own = [indices[at % len(indices)] for at in range(self.rank * share, (self.rank + 1) * share)]
                yield Request(self.seed, later, own)


class TrainingLoader(DataLoader[Any]):
    """Training batches, which go on after a stop with the batch that comes next.

    Lightning keeps ``state_dict`` in checkpoints and gives it back.

    Args:
        dataset: A map-style data set. It may have a method ``batch`` that makes a whole batch of a ``Request``, and,
            where that draws nothing from torch, ``runs_in_thread = True``: without loader processes, the next batches
            are then made in a thread while the training step runs.
        plan: Which items make a batch.
        seed: Of order and draws, equal on all processes.
        rank: Number of this process.
        world_size: Number of processes.
        num_workers: Loader processes; 0 loads in this one.
        limit: Batches of an iteration, as a trainer's ``limit_train_batches`` says: their number, at most that of an
            epoch, or their share of it. What is left of an epoch is no iteration of its own: the next epoch goes on
            where it ends. None gives what is left of the epoch.
        iteration: Number of the first iteration, from 0: those before it, as long, were had from another loader.
    """

    dataset: _Batches
    sampler: _Sampler

    def __init__(
        self,
        dataset: Dataset[Any],
        plan: EpochPlan,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        limit: float | None = None,
        iteration: int = 0,
    ) -> None:
        super().__init__(
            _Batches(dataset),
            batch_size=None,
            sampler=_Sampler(plan, seed, rank, world_size),
            collate_fn=_same,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Seeds of workers are drawn from it; what training draws stays as it is without workers.
            generator=torch.Generator(),
        )
        share = limit if limit is None or isinstance(limit, int) else int(limit * len(self))
        self._limit = None if share is None else min(share, len(self))
        given = iteration * (len(self) if self._limit is None else self._limit)
        self._epoch, self._done = divmod(given, max(1, len(self)))

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of the next epoch, or those left of the one that was stopped; with a limit as many as it says.

        Nothing happens before the first is asked for: trainers make iterators that they do not use.

        Raises:
            ValueError: The loader was made for no trainer, and for fewer processes than there are by now.
        """
        if self._limit is None and (found := own_place()[1]) > self.sampler.num_replicas:
            raise ValueError(
                f"`train_dataloader()` must be called where all {found} processes have joined, but was called for "
                f"{self.sampler.num_replicas} of them, so that some would train on the same batches. Give the trainer "
                "`datamodule=` in place of the loader, or call it in a `train_dataloader` of your own module."
            )
        self._begin()
        self.sampler.epoch, self.sampler.first = self._epoch, self._done
        self.sampler.number = len(self) - self._done if self._limit is None else self._limit
        batches = super().__iter__()
        runs_in_thread = self.num_workers == 0 and getattr(self.dataset.items, "runs_in_thread", False)
        for batch in _made_ahead(batches) if runs_in_thread else batches:
            self._begin()
            self._done += 1
            yield batch

    def _begin(self) -> None:
        """Count the next epoch where one is at its end."""
        if self._done >= len(self):
            self._epoch, self._done = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on: the seed, the epoch, and how many of its batches were given out."""
        settings = {"batches_in_epoch": len(self), **self.sampler.plan.settings}
        return {"seed": self.sampler.seed, "epoch": self._epoch, "batches": self._done, "settings": settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, with its seed.

        Raises:
            ValueError: That was in the middle of an epoch of other data or batches, whose number says nothing here.
        """
        own, found = self.state_dict()["settings"], state["settings"]
        if own != found and state["batches"] < found["batches_in_epoch"]:
            keys = [key for key in own | found if own.get(key) != found.get(key)]
            said = ", ".join(f"{key} {found.get(key)} there, {own.get(key)} here" for key in keys)
            turned_bad = ""
            if own.get("items", 0) < found.get("items", 0):
                turned_bad = "Where `verify` had left out none, and now those that turned bad, `--data.verify false` "
                turned_bad += "goes on. "
            raise ValueError(
                f"The checkpoint was written in the middle of an epoch of other batches ({said}). "
                f"{turned_bad}Go on with the data and the batch size (times processes) of its run, or start "
                "from its weights by `--model.weights`."
            )
        self.sampler.seed, self._epoch = int(state["seed"]), int(state["epoch"])
        # Of an epoch of other batches that was at its end, the next one follows.
        self._done = int(state["batches"]) if own == found else len(self)


def _made_ahead(batches: Iterator[Any], most: int = 2) -> Iterator[Any]:
    """The same batches, of which some are made in a thread before they are asked for."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = deque(thread.submit(next, batches, end) for _ in range(most))
        while (batch := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, batches, end))
            yield batch


def _same(batch: Any) -> Any:
    return batch
