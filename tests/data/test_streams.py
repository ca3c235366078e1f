from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from shard_files import photo, png

from lpl_lightning.data.batches import TrainingLoader, drawing
from lpl_lightning.data.crops import SquareCrop
from lpl_lightning.data.faults import Faults, Unreadable
from lpl_lightning.data.lanes import LaneSize, StreamPlan
from lpl_lightning.data.samples import Preparation, Sample, key_number
from lpl_lightning.data.streams import Handle, StreamDataset

LENGTHS = (9, 4, 0, 13, 7)


class Numbered:
    """Shards of images numbered through, of which some cannot be read; counts what is read."""

    def __init__(self, lengths: Sequence[int] = LENGTHS, bad: Sequence[int] = ()) -> None:
        self.lengths, self.bad = lengths, frozenset(bad)
        self.shards = [f"shard {number}" for number in range(len(lengths))]
        self.reads: list[int] = []
        self.opened: list[int] = []

    def read(self, shard: int, images: bool = True) -> Iterator[Handle]:
        self.opened.append(shard)
        first = sum(self.lengths[:shard])
        for number in range(first, first + self.lengths[shard]):

            def handle(number: int = number) -> Sample:
                self.reads.append(number)
                if number in self.bad:
                    raise Unreadable(str(number), "torn")
                return Sample(str(number), f"key {number}", IMAGES[number], number, ("one", "two"))

            yield handle


IMAGES = [png(photo(number, (5, 4))) for number in range(sum(LENGTHS))]


def loader(
    stream: Numbered,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
    known: bool = True,
    batch_size: int = 3,
    seed: int = 5,
    faults: Faults | None = None,
    count: int | None = None,
    limit: int | None = None,
) -> TrainingLoader:
    prepare = Preparation(SquareCrop(3, "random", True), True)
    count = sum(stream.lengths) if count is None else count
    lengths = stream.lengths if known else None
    dataset = StreamDataset(stream, range(len(stream.lengths)), prepare, faults or Faults("skip", 1.0), lengths, count)
    shards = len(stream.lengths) if lengths is None else lengths
    dataset.plan = StreamPlan(count, shards, 6, LaneSize(batch_size, ranks, max(1, workers)))
    return TrainingLoader(dataset, dataset.plan, seed, rank, ranks, workers, limit)


def said(batch: dict[str, Any]) -> list[tuple[int, str, tuple[int, ...]]]:
    crops = [tuple(one) for one in batch["crop_top_left"].tolist()]
    return list(zip(batch["label"].tolist(), batch["caption"], crops, strict=True))


def epochs(loading: TrainingLoader, number: int) -> list[list[Any]]:
    return [[said(batch) for batch in loading] for _ in range(number)]


def labels(batches: list[Any]) -> list[int]:
    return [label for label, _, _ in chain.from_iterable(batches)]


@pytest.mark.parametrize("known", [True, False])
def test_an_epoch_gives_each_image_once_in_an_order_of_its_own(known: bool) -> None:
    first, second = epochs(loader(Numbered(), known=known), 2)
    assert sorted(labels(first)) == sorted(labels(second)) == list(range(33))
    assert first != second
    assert labels(first) != sorted(labels(first))
    assert epochs(loader(Numbered(), known=known), 2) == [first, second]
    assert epochs(loader(Numbered(), known=known, seed=6), 1) != [first]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_and_workers_share_out_without_loss_or_doubles(ranks: int, workers: int) -> None:
    parts = [epochs(loader(Numbered(), workers, rank, ranks, batch_size=2), 1)[0] for rank in range(ranks)]
    assert {len(part) for part in parts} == {33 // (2 * ranks)}
    seen = [label for part in parts for label in labels(part)]
    assert len(set(seen)) == len(seen) == 33 // (2 * ranks) * 2 * ranks


def test_an_image_draws_by_seed_epoch_and_key_whatever_reads_it() -> None:
    one = {item[0]: item for item in chain.from_iterable(epochs(loader(Numbered()), 1)[0])}
    for workers, rank, known in ((2, 0, True), (0, 1, False)):
        part = loader(Numbered(), workers, rank, 2, known, batch_size=2)
        assert all(one[item[0]] == item for item in chain.from_iterable(epochs(part, 1)[0]))
    with drawing(5, 0, key_number("key 7")):
        item = Preparation(SquareCrop(3, "random", True), True)(Sample("", "", IMAGES[7], 7, ("one", "two")))
    assert one[7] == (7, item["caption"], tuple(item["crop_top_left"].tolist()))
    assert len({caption for _, caption, _ in one.values()}) == 2


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (5, 0), (10, 0), (11, 0), (12, 0), (15, 0), (4, 2), (13, 2)])
def test_going_on_gives_what_comes_next(stop: int, workers: int, known: bool) -> None:
    """Images that cannot be read do not change which batches come next."""
    bad = (3, 4, 20)
    whole = list(chain.from_iterable(epochs(loader(Numbered(bad=bad), workers, known=known), 3)))
    stopped = loader(Numbered(bad=bad), workers, known=known)
    seen: list[Any] = []
    state: dict[str, Any] = {}
    while len(seen) < stop:
        for batch in stopped:
            seen.append(said(batch))
            if len(seen) == stop:
                state = stopped.state_dict()
                break
    other = loader(Numbered(bad=bad), workers, known=known, seed=99)
    other.load_state_dict(state)
    rest = [said(batch) for batch in other] + [said(batch) for batch in other]
    assert len(whole) == 33
    assert seen + rest == whole[: len(seen) + len(rest)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_limit_shares_out_the_batches_of_epochs(workers: int) -> None:
    whole = list(chain.from_iterable(epochs(loader(Numbered(), workers), 3)))
    taken = epochs(loader(Numbered(), workers, limit=4), 6)
    assert [len(batches) for batches in taken] == [4] * 6
    assert list(chain.from_iterable(taken)) == whole[:24]


def test_going_on_reads_only_what_was_not_given_out() -> None:
    stopped, stream = loader(Numbered((50, 50, 50)), batch_size=10), Numbered((50, 50, 50))
    IMAGES.extend(IMAGES[:1] * 120)
    try:
        given = [labels([said(batch)]) for _, batch in zip(range(13), stopped, strict=False)]
        other = loader(stream, batch_size=10)
        other.load_state_dict(stopped.state_dict())
        rest = labels([said(batch) for batch in other])
    finally:
        del IMAGES[33:]
    assert len(given) == 13
    assert len(rest) == 20
    assert sorted(rest) == sorted(stream.reads), "nothing that was given out is read again"
    assert len(set(stream.opened)) < 3, "shards that were given out whole are not opened"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 2}, r"num_workers 1 there, 2 here"),
        ({"ranks": 2}, r"processes 1 there, 2 here"),
        ({"batch_size": 4}, r"batch_size 3 there, 4 here"),
    ],
)
def test_going_on_with_other_processes_is_refused(change: dict[str, int], message: str) -> None:
    stopped = loader(Numbered())
    next(iter(stopped))
    with pytest.raises(ValueError, match=message):
        loader(Numbered(), **change).load_state_dict(stopped.state_dict())  # type: ignore[arg-type]
    loader(Numbered(), workers=1).load_state_dict(stopped.state_dict())


@pytest.mark.parametrize("bad", [(0,), (8, 9), (32,), tuple(range(16))])
def test_the_next_image_stands_in_for_one_that_cannot_be_read(bad: tuple[int, ...]) -> None:
    plain, faults = epochs(loader(Numbered()), 1)[0], Faults("skip", 1.0)
    found = epochs(loader(Numbered(bad=bad), faults=faults), 1)[0]
    order = labels(plain)
    expected = [next(one for one in order[place:] + order if one not in bad) for place in range(len(order))]
    assert labels(found) == expected
    assert set(faults.met) == {str(number) for number in bad}


def test_bad_images_end_a_run_that_does_not_skip_them() -> None:
    with pytest.raises(Unreadable, match=r"^3 cannot be read \(torn\)"):
        epochs(loader(Numbered(bad=(3,)), faults=Faults("raise")), 1)
    with pytest.raises(ValueError, match=r"None of 33 items can be read"):
        epochs(loader(Numbered(bad=range(33))), 1)


def test_a_lane_goes_round_where_an_epoch_asks_for_more() -> None:
    (batches,) = epochs(loader(Numbered((4, 3)), known=False, count=12), 1)
    seen = labels(batches)
    assert len(seen) == 12
    assert set(seen) == set(range(7))
    assert max(map(seen.count, seen)) == 2


@pytest.mark.parametrize("known", [True, False])
def test_shards_that_changed_are_an_error(known: bool) -> None:
    stream = Numbered((3, 3))
    loading = loader(stream, known=known)
    stream.lengths = (0, 0)
    with pytest.raises(ValueError, match="hold fewer images than before or none"):
        epochs(loading, 1)


def test_in_order_by_position_forward_and_back() -> None:
    stream = Numbered(bad=(5,))
    for lengths in (LENGTHS, None):
        dataset = StreamDataset(stream, range(5), Preparation(SquareCrop(3)), Faults("skip", 1.0), lengths, 33)
        for index in (0, 1, 20, 21, 32, 2, 13, 12):
            item = dataset[index]
            assert item["label"] == index
            assert item["caption"] == "one"
        assert dataset[5]["label"] == 6
        with pytest.raises(IndexError):
            dataset[33]
    assert list(dataset.captions()) == ["one"] * 32


def test_training_draws_are_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    epochs(loader(Numbered()), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_images_by_url(tmp_path: Any) -> None:
    path = tmp_path / "a.png"
    photo(1).save(path)
    prepare = Preparation(SquareCrop(8))
    expected = prepare(Sample("", "", path.read_bytes()))["image"]
    assert torch.equal(prepare(Sample("", "", f"file://{path}"))["image"], expected)
    assert torch.equal(prepare(Sample("", "", str(path)))["image"], expected)
    with pytest.raises(Unreadable, match=r"row 3 cannot be read \(FileNotFoundError"):
        prepare(Sample("row 3", "", f"file://{path}.no"))
    with pytest.raises(Unreadable, match=r"row 4 cannot be read \(.*empty"):
        prepare(Sample("row 4", "", b""))
