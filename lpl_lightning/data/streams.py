"""Images that come in streams: shards that are read from their beginning on, not item by item.

``StreamDataset`` gives them as a data set like any other: in order by position, for validation, and in the shuffled
batches of a ``StreamPlan`` to a ``TrainingLoader``, which so goes on in the middle of an epoch. To go on, a loader
process reads from the first image that it had not yet given out; where it is not known how many images a shard has,
from the beginning of its shards, without decoding what it had given out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import count as numbers
from itertools import islice
from typing import Any, Protocol

import numpy as np
from torch.utils.data import default_collate

from lpl_lightning.data.batches import Request, drawing
from lpl_lightning.data.faults import Faults, Unreadable, first_readable
from lpl_lightning.data.lanes import Positions, Segment, StreamPlan
from lpl_lightning.data.samples import Preparation, Sample, SampleDataset, key_number

__all__ = ["Handle", "Stream", "StreamDataset"]

Handle = Callable[[], Sample]
"""Reads a sample, or raises ``Unreadable``; until the next handle of its shard is asked for."""


class Stream(Protocol):
    """Shards of samples."""

    @property
    def shards(self) -> Sequence[str]:
        """Names of the shards."""

    def read(self, shard: int, images: bool = True) -> Iterator[Handle]:
        """Handles of a shard's samples from its beginning on.

        Args:
            shard: Number of the shard.
            images: Whether the samples' images are wanted; without, they may be empty.
        """


class _Cursor:
    """Samples of segments one after the other, by position; the first follows the last.

    Going forward costs what it takes to pass over what lies between, going back what it takes to begin anew.
    """

    def __init__(self, stream: Stream, segments: Sequence[Segment]) -> None:
        self.stream, self.segments = stream, segments
        lengths = [0 if one.stop is None else len(range(one.start, one.stop, one.step)) for one in segments]
        self.ends = None if any(one.stop is None for one in segments) else np.cumsum(lengths)
        self.handles: Iterator[Handle] = iter(())
        self.next, self.segment_end = 0, -1

    def fetch(self, position: int) -> Sample | Unreadable:
        """Read the sample at a position, or say why it cannot be.

        Raises:
            ValueError: There is none.
        """
        if position < self.next or position >= self.segment_end:
            self._begin(position)
        handle = next(islice(self.handles, position - self.next, None), None)
        if handle is None:
            raise ValueError(
                f"Shards hold fewer images than before or none ({self.stream.shards[self.segments[0].shard]} is the "
                "first of them). Data must not change during a run, and each loader process needs an image: give more "
                "shards, or lower `num_workers`."
            )
        self.next = position + 1
        try:
            return handle()
        except Unreadable as fault:
            return fault

    def _begin(self, position: int) -> None:
        if self.ends is None:
            if position < self.next or self.segment_end < 0:
                self.handles, self.next, self.segment_end = self._round(), 0, np.iinfo(np.int64).max
            return
        turn, inside = divmod(position, int(self.ends[-1]))
        number = int(np.searchsorted(self.ends, inside, side="right"))
        start = int(self.ends[number - 1]) if number else 0
        self.handles = self._read(self.segments[number])
        self.next, self.segment_end = (turn * int(self.ends[-1]) + end for end in (start, int(self.ends[number])))

    def _round(self) -> Iterator[Handle]:
        for turn in numbers():
            found = False
            for segment in self.segments:
                for handle in self._read(segment):
                    found = True
                    yield handle
            if not found and turn == 0:
                return

    def _read(self, segment: Segment) -> Iterator[Handle]:
        return islice(self.stream.read(segment.shard), segment.start, segment.stop, segment.step)


class _Lane:
    """The samples of a lane in the order in which it gives them out, from a place on."""

    def __init__(self, stream: Stream, segments: Sequence[Segment], order: Positions, first: int) -> None:
        self.stream, self.segments, self.order = stream, segments, order
        self.cursor = _Cursor(stream, segments)
        self.given = np.zeros(len(order), bool)
        self.given[order[:first]] = True
        self.read_to = int(order[first:].min())
        self.held: dict[int, Sample | Unreadable] = {}

    def at(self, place: int) -> Sample:
        """The sample at a place of the order.

        Raises:
            Unreadable: It cannot be read.
        """
        position = int(self.order[place])
        while self.read_to <= position:
            if not self.given[self.read_to]:
                self.held[self.read_to] = self.cursor.fetch(self.read_to)
            self.read_to += 1
        # One given out before is asked for again only in the place of the lane's last that cannot be read.
        found = self.held[position] if position in self.held else _Cursor(self.stream, self.segments).fetch(position)
        if isinstance(found, Unreadable):
            raise found
        return found

    def drop(self, places: range) -> None:
        """Forget samples that were given out."""
        for position in self.order[places.start : places.stop].tolist():
            self.given[position] = True
            self.held.pop(position, None)


class StreamDataset(SampleDataset):
    """Images of a stream, in order by position, and the shuffled batches of a plan.

    What an image draws in these (a crop, a flip, a caption) comes from the seed, the epoch and its key. One that cannot
    be read is replaced by the next that can, in the order in which they are given out.

    Args:
        stream: Where samples come from.
        shards: Numbers of the shards to read.
        prepare: Makes items of samples.
        faults: What becomes of samples that cannot be used.
        lengths: How many samples each of the shards has; None where that is not known.
        count: How many there are, or are to be in an epoch.
    """

    def __init__(
        self,
        stream: Stream,
        shards: Sequence[int],
        prepare: Preparation,
        faults: Faults,
        lengths: Sequence[int] | None,
        count: int,
    ) -> None:
        super().__init__(prepare)
        self.stream, self.shards, self.faults = stream, tuple(shards), faults
        self.lengths, self.count = lengths, count
        self.plan: StreamPlan | None = None
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._cursor: _Cursor | None = None
        self._last: tuple[int, Sample | Unreadable] | None = None
        self._lane: tuple[tuple[int, ...], _Lane] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in their process.
        return self.__dict__ | {"_cursor": None, "_last": None, "_lane": None}

    def _leave_inherited(self) -> None:
        # A process that was forked shares the place in open files with the one that it comes from, and with its others.
        if self._process != os.getpid():
            self._forget()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return first_readable(self.item, index, self.count, self.faults)

    def described(self) -> str:
        """What the images are and their order depends on, without reading them."""
        return repr([[self.stream.shards[shard] for shard in self.shards], self.lengths])

    def _sample(self, index: int) -> Sample:
        self._leave_inherited()
        if self._cursor is None:
            stops: Sequence[int | None] = [None] * len(self.shards) if self.lengths is None else self.lengths
            segments = [Segment(shard, 0, stop) for shard, stop in zip(self.shards, stops, strict=True)]
            self._cursor = _Cursor(self.stream, segments)
        # Kept: a stream that is asked for what it has just given would begin anew.
        if self._last is None or self._last[0] != index:
            self._last = index, self._cursor.fetch(index)
        found = self._last[1]
        if isinstance(found, Unreadable):
            raise found
        return found

    def batch(self, request: Request) -> Any:
        """The batch that a ``TrainingLoader`` asks for by its number in the plan."""
        assert self.plan is not None
        self._leave_inherited()
        plan, seed, epoch = self.plan, request.seed, request.epoch
        rank, worker, first = plan.place(request.indices[0])
        key, places = (seed, epoch, rank, worker, first), range(first, first + plan.size.batch_size)
        if self._lane is None or self._lane[0] != key:
            segments, order = plan.lane(seed, epoch, rank, worker)
            own = [segment._replace(shard=self.shards[segment.shard]) for segment in segments]
            self._lane = key, _Lane(self.stream, own, order, first)
        lane = self._lane[1]

        def item(place: int) -> dict[str, Any]:
            sample = lane.at(place)
            with drawing(seed, epoch, key_number(sample.key)):
                return self.prepare(sample)

        items = [first_readable(item, place, len(lane.order), self.faults) for place in places]
        lane.drop(places)
        self._lane = (*key[:4], places.stop), lane
        return default_collate(items)

    def captions(self) -> Iterator[str]:
        """The first caption of each sample, in order, without reading images."""
        handles = (handle for shard in self.shards for handle in self.stream.read(shard, images=False))
        for handle in islice(handles, self.count):
            try:
                captions = handle().captions
            except Unreadable:
                continue
            if captions:
                yield captions[0]
