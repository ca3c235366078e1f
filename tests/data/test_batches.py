from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lpl_lightning.data import ImageDataModule
from lpl_lightning.data.base import Split
from lpl_lightning.data.batches import Request, Shuffled, TrainingLoader, drawing

Item = TypeVar("Item")


class Draws(Dataset[dict[str, Tensor]]):
    """Items that hold their position and what they drew."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": torch.full((3, 1, 1), float(index)), "drawn": torch.rand(())}


def loader(
    count: int = 23,
    batch_size: int = 4,
    seed: int = 5,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    limit: float | None = None,
) -> TrainingLoader:
    return TrainingLoader(Draws(count), Shuffled(count, batch_size * ranks), seed, rank, ranks, workers, limit)


def said(batch: dict[str, Tensor]) -> list[tuple[int, float]]:
    return list(zip(batch["image"][:, 0, 0, 0].int().tolist(), batch["drawn"].tolist(), strict=True))


def joined(lists: Iterable[list[Item]]) -> list[Item]:
    return list(chain.from_iterable(lists))


def epochs(loading: TrainingLoader, count: int) -> list[list[list[tuple[int, float]]]]:
    return [[said(batch) for batch in loading] for _ in range(count)]


def test_batches_come_from_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = epochs(loader(), 3)
    assert torch.equal(torch.get_rng_state(), before), "what training draws is left alone"
    torch.manual_seed(2)
    assert epochs(loader(), 3) == first
    other = epochs(loader(seed=6), 1)[0]
    assert [index for index, _ in joined(other)] != [index for index, _ in joined(first[0])]
    assert first[0] != first[1]
    for batches in first:
        positions = [index for batch in batches for index, _ in batch]
        assert len(batches) == 5
        assert len(set(positions)) == 20
    left_out = [set(range(23)) - {index for batch in batches for index, _ in batch} for batches in first]
    assert left_out[0] != left_out[1], "other items are left out each time"
    drawn, later = (dict(joined(batches)) for batches in first[:2])
    both = drawn.keys() & later.keys()
    assert all(drawn[index] != later[index] for index in both), "an item draws anew each epoch"


def test_an_item_draws_the_same_whatever_batch_it_is_in() -> None:
    """Also the draws themselves: those of torch from the seed that ``drawing`` says."""
    small, large = (dict(joined(epochs(loader(batch_size=size), 1)[0])) for size in (2, 11))
    assert all(small[index] == large[index] for index in small.keys() & large.keys())
    with drawing(5, 0, 7):
        assert float(torch.rand(())) == {**small, **large}[7]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    assert epochs(loader(workers=workers), 2) == epochs(loader(), 2)


def test_processes_share_out_what_one_has() -> None:
    (one,) = epochs(loader(batch_size=6), 1)
    parts = [epochs(loader(batch_size=2, rank=rank, ranks=3), 1)[0] for rank in range(3)]
    assert [joined(batch) for batch in zip(*parts, strict=True)] == one


def test_fewer_items_than_processes_ask_for_are_given_twice() -> None:
    parts = [epochs(loader(count=3, batch_size=4, rank=rank, ranks=2), 1)[0] for rank in range(2)]
    assert [[len(batch) for batch in part] for part in parts] == [[2], [2]]
    first, second, third, again = (index for part in parts for batch in part for index, _ in batch)
    assert {first, second, third} == {0, 1, 2}
    assert again == first


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 5, 6, 10, 12])
def test_going_on_gives_what_comes_next(stop: int, workers: int) -> None:
    whole = joined(epochs(loader(), 4))
    stopped, state = loader(workers=workers), {}
    seen: list[list[tuple[int, float]]] = []
    while len(seen) < stop:
        for batch in stopped:
            seen.append(said(batch))
            if len(seen) == stop:
                state = stopped.state_dict()
                break
    other = loader(seed=99, workers=workers)
    other.load_state_dict(state)
    iter(other)  # an iterator that nobody uses, as trainers make
    assert seen + joined(epochs(other, 2)) == whole[: stop + (-stop % 5 or 5) + 5]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("limit", "given"), [(3, 3), (0.6, 3), (0.5, 2), (1, 1), (1.0, 5), (9, 5)])
def test_a_limit_shares_out_the_batches_of_epochs(limit: float, given: int, workers: int) -> None:
    whole = joined(epochs(loader(), 4))
    taken = epochs(loader(workers=workers, limit=limit), 4)
    assert [len(batches) for batches in taken] == [given] * 4
    assert joined(taken) == whole[: 4 * given]


def test_going_on_within_a_limit_offers_enough_for_the_rest() -> None:
    """The trainer, which counts what it had, stops by itself."""
    whole, stopped, other = joined(epochs(loader(), 4)), loader(limit=3), loader(limit=3)
    for taken in (3, 1):
        assert len([said(batch) for _, batch in zip(range(taken), stopped, strict=False)]) == taken
    other.load_state_dict(stopped.state_dict())
    assert epochs(other, 2) == [whole[4:7], whole[7:10]]


class Thread(Dataset[Any]):
    """Makes batches where it is told it may, until one holds an item that is broken."""

    runs_in_thread = True

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken
        self.made: list[threading.Thread] = []
        self.has_made = threading.Condition()

    def batch(self, request: Request) -> list[int]:
        with self.has_made:
            self.made.append(threading.current_thread())
            self.has_made.notify_all()
        if self.broken in request.indices:
            raise ValueError(f"item {self.broken}")
        return list(request.indices)


def test_batches_are_made_in_a_thread_where_they_may_be() -> None:
    plan = Shuffled(23, 4)
    dataset = Thread()
    loading = TrainingLoader(dataset, plan, seed=5)
    batches = iter(loading)
    given = [next(batches)]
    with dataset.has_made:
        assert dataset.has_made.wait_for(lambda: len(dataset.made) == 3, timeout=60), "before they are asked for"
    assert loading.state_dict()["batches"] == 1, "what was given out counts, not what was made"
    (thread,) = set(dataset.made)
    assert thread is not threading.current_thread()
    given += list(batches)
    assert given == list(plan(5, 0))
    assert len(dataset.made) == 5
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert list(loading) == list(plan(5, 1))
    limited = TrainingLoader(Thread(), plan, seed=5, limit=3)
    assert [list(limited), list(limited)] == [list(plan(5, 0))[:3], [*list(plan(5, 0))[3:], *list(plan(5, 1))[:1]]]

    going_on = TrainingLoader(Thread(), plan, seed=0)
    going_on.load_state_dict({"seed": 5, "epoch": 2, "batches": 3, "settings": loading.state_dict()["settings"]})
    assert list(going_on) == list(plan(5, 2))[3:]


def test_an_error_in_the_thread_comes_where_its_batch_is() -> None:
    order = list(Shuffled(23, 4)(5, 0))
    batches = iter(TrainingLoader(Thread(broken=order[2][0]), Shuffled(23, 4), seed=5))
    assert [next(batches), next(batches)] == order[:2]
    with pytest.raises(ValueError, match=f"item {order[2][0]}"):
        next(batches)


def test_a_thread_ends_with_the_loop() -> None:
    dataset = Thread()
    for _ in TrainingLoader(dataset, Shuffled(4000, 4), seed=5):
        break
    dataset.made[0].join(timeout=60)
    assert not dataset.made[0].is_alive()
    assert len(dataset.made) <= 4


def test_going_on_with_other_batches_is_refused() -> None:
    stopped = loader()
    next(iter(stopped))
    with pytest.raises(ValueError, match=r"middle of an epoch of other batches \(.*batch_size 4 there, 5 here"):
        loader(batch_size=5).load_state_dict(stopped.state_dict())
    with pytest.raises(ValueError, match=r"items 23 there, 24 here\)\. Go on"):
        loader(count=24).load_state_dict(stopped.state_dict())
    with pytest.raises(
        ValueError, match=r"items 23 there, 22 here\)\. Where `verify` .*`--data\.verify false` goes on"
    ):
        loader(count=22).load_state_dict(stopped.state_dict())
    # As many in a batch of all processes are the same batches, and after a whole epoch there is nothing to go on with.
    loader(batch_size=2, ranks=2).load_state_dict(stopped.state_dict())
    list(stopped)
    other = loader(batch_size=5)
    other.load_state_dict(stopped.state_dict())
    assert epochs(other, 1)[0] == epochs(loader(batch_size=5), 2)[1]
    smaller = loader(batch_size=2)  # of more batches
    smaller.load_state_dict(stopped.state_dict())
    assert epochs(smaller, 1)[0] == epochs(loader(batch_size=2), 2)[1]


class DrawsModule(ImageDataModule):
    def __init__(self, num_workers: int = 0) -> None:
        super().__init__(1, 4, num_workers, 0, 0)

    @property
    def class_names(self) -> tuple[str, ...]:
        return ()

    def dataset(self, split: Split) -> Draws:
        return Draws(23)


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.line(batch["drawn"][:, None]).mean()
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Seen(Callback):
    def __init__(self) -> None:
        self.batches: list[list[tuple[int, float]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(said(batch))


def quiet(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=[*callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def fitted(
    folder: Path, steps: int, checkpoint: ModelCheckpoint | None = None, ckpt_path: Path | None = None, **options: Any
) -> list[list[tuple[int, float]]]:
    seen = Seen()
    callbacks = [seen, *([] if checkpoint is None else [checkpoint])]
    trainer = quiet(folder, *callbacks, **{"max_steps": steps, "max_epochs": -1, **options})
    torch.manual_seed(0 if ckpt_path is None else 1)
    trainer.fit(Line(), DrawsModule(), ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=True)
    return seen.batches


SAVED: dict[str, Callable[[Path, int], ModelCheckpoint]] = {
    "after_a_step": lambda folder, k: ModelCheckpoint(folder, "{step}", every_n_train_steps=k, save_top_k=-1),
    "after_validation": lambda folder, k: ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_epochs=1),
    "after_an_epoch": lambda folder, k: ModelCheckpoint(
        folder, "{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
    ),
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize(
    ("when", "step", "options"),
    [
        ("after_a_step", 3, {}),
        ("after_a_step", 5, {}),
        ("after_a_step", 7, {}),
        ("after_a_step", 3, {"limit_train_batches": 2}),
        ("after_a_step", 7, {"limit_train_batches": 3}),
        ("after_a_step", 11, {"limit_train_batches": 0.8}),
        ("after_an_epoch", 6, {"limit_train_batches": 3}),
        ("after_a_step", 2, {"accumulate_grad_batches": 2}),
        ("after_validation", 7, {"val_check_interval": 7, "check_val_every_n_epoch": None}),
        ("after_an_epoch", 5, {}),
        ("after_an_epoch", 10, {}),
    ],
)
def test_a_run_that_goes_on_sees_what_it_had_not_seen(
    tmp_path: Path, when: str, step: int, options: dict[str, Any]
) -> None:
    """From a checkpoint that Lightning wrote, against one run; another seed is set, and the first one's is taken."""
    whole = fitted(tmp_path, 15, SAVED[when](tmp_path / "saved", step), **options)
    rest = fitted(tmp_path, 15, ckpt_path=tmp_path / "saved" / f"step={step}.ckpt", **options)
    taken = step * options.get("accumulate_grad_batches", 1)
    assert len(rest) == len(whole) - taken
    assert rest == whole[taken:]


RELOADING: list[dict[str, Any]] = [
    {},
    {"reload_dataloaders_every_n_epochs": 1},
    {"reload_dataloaders_every_n_epochs": 1, "limit_train_batches": 3},
]


@pytest.mark.parametrize("options", RELOADING)
def test_a_loader_that_is_made_anew_goes_on_counting(tmp_path: Path, options: dict[str, Any]) -> None:
    """As Lightning makes them in a run, and for each fit; a new trainer begins anew."""
    torch.manual_seed(0)
    whole = joined(epochs(loader(seed=torch.initial_seed()), 4))
    length, data = options.get("limit_train_batches", 5), DrawsModule()
    for _ in range(2):
        seen = Seen()
        trainer = quiet(tmp_path, seen, max_epochs=2, **options)
        trainer.fit(Line(), data)
        trainer.fit_loop.max_epochs = 4
        trainer.fit(Line(), data)
        assert seen.batches == whole[: 4 * length]
        assert [said(batch) for batch in data.train_dataloader()] == whole[:5], "by hand, after a run"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("options", RELOADING)
def test_a_run_of_whole_epochs_goes_on_with_the_next(tmp_path: Path, options: dict[str, Any]) -> None:
    """Such runs are given no state of their loader by Lightning."""
    options = options | {"max_epochs": 4}
    whole = fitted(tmp_path, -1, SAVED["after_an_epoch"](tmp_path / "saved", 0), **options)
    taken = 2 * options.get("limit_train_batches", 5)
    rest = fitted(tmp_path, -1, ckpt_path=tmp_path / "saved" / f"step={taken}.ckpt", **options)
    assert len(whole) == 2 * taken
    assert rest == whole[taken:]


@pytest.mark.parametrize("limit", [3, 0.6, 1.0, 99])
def test_epochs_of_a_trainer_are_as_long_as_those_of_a_plain_loader(tmp_path: Path, limit: float) -> None:
    counted = []
    for give_all in (False, True):
        ends: list[tuple[int, int]] = []
        validated: list[int] = []
        counting = LambdaCallback(
            on_train_epoch_end=lambda trainer, _, ends=ends: ends.append(
                (trainer.fit_loop.epoch_loop.batch_progress.current.completed, trainer.global_step)
            ),
            on_validation_end=lambda trainer, _, validated=validated: validated.append(trainer.current_epoch),
        )
        trainer = quiet(
            tmp_path,
            counting,
            max_epochs=5,
            limit_train_batches=limit,
            accumulate_grad_batches=2,
            num_sanity_val_steps=0,
        )
        if give_all:
            trainer.fit(Line(), DataLoader(Draws(23), 4, shuffle=True, drop_last=True), DataLoader(Draws(23), 4))
        else:
            trainer.fit(Line(), DrawsModule())
        counted.append((ends, validated, trainer.global_step, trainer.estimated_stepping_batches))
    ours, plain = counted
    assert ours == plain
    assert ours[2] == ours[3]


def test_overfitting_takes_the_same_batches_in_order(tmp_path: Path) -> None:
    seen = fitted(tmp_path, 4, overfit_batches=2)
    assert [[index for index, _ in batch] for batch in seen] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_loader_taken_by_hand_is_for_the_processes_that_there_are(tmp_path: Path) -> None:
    """Two real ones: taken before they are joined, it would give both the same."""
    running = [get_context("fork").Process(target=share, args=(tmp_path, rank)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=300)
    assert [process.exitcode for process in running] == [0, 0]
    (first, refused), (second, also) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    together = [[tuple(item) for item in a + b] for a, b in zip(first, second, strict=True)]
    assert together == epochs(loader(batch_size=8, seed=3), 1)[0]
    assert refused == also
    assert "where all 2 processes have joined, but was called for 1 of them" in refused
    assert "Give the trainer `datamodule=`" in refused


def share(folder: Path, rank: int) -> None:
    torch.manual_seed(3)
    early = DrawsModule().train_dataloader()
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    batches = [said(batch) for batch in DrawsModule().train_dataloader()]
    try:
        next(iter(early))
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    (folder / f"{rank}.json").write_text(json.dumps([batches, refusal]))
    dist.destroy_process_group()
