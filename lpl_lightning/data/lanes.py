"""How a stream of shards is shared out: which images each loader process of each rank reads, and in which order.

A *lane* is what one loader process of one rank reads in an epoch. Two ways lead to the lanes, both through the shards
in an order that comes from the seed and the epoch:

- *exact*, where it is known how many images each shard has: the images, one after the other from a place that is drawn,
  are cut into runs, one for a lane, which may begin and end within a shard. None is read twice. What does not fill a
  batch of all ranks, fewer images than such a batch has, is left out, others each epoch.
- *dealt*, where that is not known: shards are dealt out, as many to each lane; of those left over each lane takes every
  n-th image, n being the number of lanes. A lane whose shards hold fewer images than an epoch asks of it goes round
  them again; one whose shards hold more leaves the rest out.

Within its lane an image is displaced by a buffer, as in the usual shuffling of streams: what comes next is drawn from
the ``buffer`` images read and not yet given out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["LaneSize", "Segment", "StreamPlan", "displaced"]

Positions = npt.NDArray[np.int64]


class Segment(NamedTuple):
    """Images of a shard: every ``step``-th from ``start`` on, before ``stop`` or to the end."""

    shard: int
    start: int = 0
    stop: int | None = None
    step: int = 1


class LaneSize(NamedTuple):
    """How the loader is laid out: images of a batch of one rank, ranks, and loader processes of each."""

    batch_size: int
    ranks: int
    workers: int


def displaced(count: int, buffer: int, rng: np.random.Generator) -> Positions:
    """Order in which a buffer gives out what comes in.

    Args:
        count: How many come in.
        buffer: How many it holds.
        rng: What is drawn from.

    Returns:
        (count,) positions; the i-th is below ``i + buffer``.
    """
    held = np.arange(min(buffer, count)).tolist()
    taken = rng.integers(max(len(held), 1), size=count - len(held)).tolist()
    given = np.empty(count, np.int64)
    for position, slot in enumerate(taken):
        given[position], held[slot] = held[slot], position + len(held)
    given[count - len(held) :] = rng.permutation(held)
    return given


class StreamPlan:
    """The batches of an epoch of a stream: the ``EpochPlan`` of a ``TrainingLoader``, and the lanes they come from.

    Batch ``j`` of a rank comes from its lane ``j % workers``.

    Args:
        count: Images of an epoch, of all ranks together.
        shards: How many images each shard has; or the number of shards, where that is not known.
        buffer: Images of the buffer of each lane; 1 leaves their order as it is.
        size: How the loader is laid out. Where an epoch has fewer images than a batch of all ranks, it is one batch.
    """

    def __init__(self, count: int, shards: Sequence[int] | int, buffer: int, size: LaneSize) -> None:
        self.count, self.buffer, self.shards = count, buffer, shards
        self.size = size._replace(batch_size=max(1, min(size.batch_size, count // size.ranks)))

    @property
    def settings(self) -> dict[str, int]:
        """What the batches depend on besides seed and epoch."""
        number = self.shards if isinstance(self.shards, int) else len(self.shards)
        size = {"batch_size": self.size.batch_size, "processes": self.size.ranks, "num_workers": self.size.workers}
        return {"images": self.count, "shards": number, **size, "shuffle_buffer": self.buffer}

    def __len__(self) -> int:
        return max(1, self.count // (self.size.batch_size * self.size.ranks))

    def __call__(self, seed: int, epoch: int) -> Iterator[Sequence[int]]:
        """For each batch one number for each rank: ``batch * ranks + rank``."""
        ranks = self.size.ranks
        return (range(batch * ranks, (batch + 1) * ranks) for batch in range(len(self)))

    def place(self, number: int) -> tuple[int, int, int]:
        """Rank, lane, and first place in the lane's order, of a batch by its number."""
        batch, rank = divmod(number, self.size.ranks)
        return rank, batch % self.size.workers, batch // self.size.workers * self.size.batch_size

    def lane(self, seed: int, epoch: int, rank: int, worker: int) -> tuple[list[Segment], Positions]:
        """What a lane reads, and the order in which it gives that out.

        Returns:
            Segments, and positions in the images of these one after the other.
        """
        batches = [len(range(first, len(self), self.size.workers)) for first in range(self.size.workers)]
        quota = batches[worker] * self.size.batch_size
        number = rank * self.size.workers + worker
        order = displaced(quota, self.buffer, np.random.default_rng([seed, epoch, 1, number]))
        rng = np.random.default_rng([seed, epoch, 0])
        if isinstance(self.shards, int):
            return self._dealt(rng.permutation(self.shards).tolist(), number), order
        start = (rank * len(self) + sum(batches[:worker])) * self.size.batch_size
        shards = rng.permutation(len(self.shards)).tolist()
        return self._run(shards, self.shards, int(rng.integers(self.count)) + start, quota), order

    def _dealt(self, shards: Sequence[int], number: int) -> list[Segment]:
        lanes = self.size.ranks * self.size.workers
        whole = len(shards) // lanes * lanes
        parts = [Segment(shard, (number + at) % lanes, None, lanes) for at, shard in enumerate(shards[whole:])]
        return [Segment(shard) for shard in shards[number:whole:lanes]] + parts

    def _run(self, shards: Sequence[int], lengths: Sequence[int], start: int, quota: int) -> list[Segment]:
        ends: Any = np.cumsum([0, *(lengths[shard] for shard in shards)])
        segments = []
        # More than one round: the run may go over the end.
        for turn in range(0, start + quota, self.count):
            for shard, (first, last) in zip(shards, pairwise((ends + turn).tolist()), strict=True):
                low, high = max(first, start), min(last, start + quota)
                if low < high:
                    segments.append(Segment(shard, low - first, high - first))
        return segments
