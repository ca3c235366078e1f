from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpl_lightning.data.lanes import LaneSize, Segment, StreamPlan, displaced

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any)
SIZES = st.builds(LaneSize, st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))


def covered(segments: list[Segment], lengths: list[int]) -> list[tuple[int, int]]:
    """Shard and place of the images of segments, by slicing."""
    return [
        (one.shard, place) for one in segments for place in range(lengths[one.shard])[one.start : one.stop : one.step]
    ]


def by_hand(count: int, buffer: int, seed: int) -> list[int]:
    """The usual loop over a buffer, drawing as ``displaced`` does."""
    rng = np.random.default_rng(seed)
    held = list(range(min(buffer, count)))
    draws = list(rng.integers(max(len(held), 1), size=count - len(held)))
    given = []
    for item, slot in zip(range(len(held), count), draws, strict=True):
        given.append(held[slot])
        held[slot] = item
    return given + list(rng.permutation(held))


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 5))
def test_a_buffer_gives_out_all_it_takes_in(count: int, buffer: int, seed: int) -> None:
    order = displaced(count, buffer, np.random.default_rng(seed)).tolist()
    assert sorted(order) == list(range(count))
    assert all(position < place + buffer for place, position in enumerate(order))
    assert order == by_hand(count, buffer, seed)
    if buffer == 1:
        assert order == list(range(count))


def test_a_buffer_shuffles() -> None:
    order = displaced(1000, 100, np.random.default_rng(0))
    assert np.abs(order - np.arange(1000)).mean() > 30
    assert len(set(order[:100].tolist()) & set(range(100))) < 90, "not one block after the other"


@settings(max_examples=200)
@given(LENGTHS, SIZES, st.integers(0, 3), st.integers(0, 3))
def test_with_known_lengths_no_image_is_read_twice_and_few_are_left_out(
    lengths: list[int], size: LaneSize, seed: int, epoch: int
) -> None:
    count = sum(lengths)
    if count < size.ranks:
        return
    plan = StreamPlan(count, lengths, 4, size)
    images, quotas = [], []
    for rank in range(size.ranks):
        for worker in range(size.workers):
            segments, order = plan.lane(seed, epoch, rank, worker)
            own = covered(segments, lengths)
            assert len(own) == len(order)
            images += own
            quotas.append((rank, len(order)))
    assert len(set(images)) == len(images)
    assert count - len(images) < plan.size.batch_size * size.ranks
    per_rank = [sum(quota for rank, quota in quotas if rank == one) for one in range(size.ranks)]
    assert set(per_rank) == {len(plan) * plan.size.batch_size}


@given(st.integers(1, 12), SIZES, st.integers(0, 3))
def test_with_unknown_lengths_each_image_is_in_one_lane(shards: int, size: LaneSize, seed: int) -> None:
    lengths = [5 + shard % 3 for shard in range(shards)]
    plan = StreamPlan(sum(lengths), shards, 4, size)
    lanes = [plan.lane(seed, 0, rank, worker)[0] for rank in range(size.ranks) for worker in range(size.workers)]
    images = [covered(lane, lengths) for lane in lanes]
    assert sorted(chain.from_iterable(images)) == [(s, i) for s in range(shards) for i in range(lengths[s])]
    whole = [sum(one.step == 1 for one in lane) for lane in lanes]
    if len(lanes) > 1:
        assert set(whole) == {shards // len(lanes)}


def test_what_is_left_out_and_the_order_change_with_the_epoch() -> None:
    plan = StreamPlan(23, [23], 5, LaneSize(4, 1, 1))
    lanes = [plan.lane(0, epoch, 0, 0) for epoch in range(8)]
    left = [set(range(23)) - {place for _, place in covered(segments, [23])} for segments, _ in lanes]
    assert all(len(out) == 3 for out in left)
    assert len(set(map(frozenset, left))) > 2
    assert len({tuple(order.tolist()) for _, order in lanes}) == 8


def test_batches_go_round_the_lanes() -> None:
    plan = StreamPlan(40, [40], 5, LaneSize(2, 2, 3))
    assert len(plan) == 10
    numbers = [list(batch) for batch in plan(0, 0)]
    assert [plan.place(number) for number in numbers[4]] == [(0, 1, 2), (1, 1, 2)]
    assert plan.place(numbers[0][1]) == (1, 0, 0)


@pytest.mark.parametrize(
    ("count", "size", "batch", "batches"), [(3, LaneSize(4, 2, 2), 1, 1), (1, LaneSize(4, 2, 1), 1, 1)]
)
def test_fewer_images_than_a_batch_make_one(count: int, size: LaneSize, batch: int, batches: int) -> None:
    plan = StreamPlan(count, [count], 5, size)
    assert (plan.size.batch_size, len(plan)) == (batch, batches)
    for rank in range(2):
        segments, order = plan.lane(0, 0, rank, 0)
        assert len(covered(segments, [count])) == len(order) == 1
