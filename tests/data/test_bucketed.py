from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from forked import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from rectangles import BUCKETS, SHAPES, Mean, Said, Seen, number, photos, said, write

from lpl_lightning.data.batches import TrainingLoader
from lpl_lightning.data.bucketed import BucketedPlan
from lpl_lightning.data.buckets import AspectBuckets, Assignment
from lpl_lightning.data.crops import CoveringCrop
from lpl_lightning.data.faults import Unreadable, read_faults
from lpl_lightning.data.folder import ImageFolderDataModule
from lpl_lightning.data.reading import load_rgb


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("photos"))


def assignment(buckets: list[int]) -> Assignment:
    """The given bucket of each item."""
    count = max(buckets) + 1
    return Assignment(tuple((8, 8 * (at + 1)) for at in range(count)), np.array(buckets))


# The plan

full = st.lists(st.integers(6, 30), min_size=1, max_size=5).flatmap(
    lambda counts: st.permutations([bucket for bucket, count in enumerate(counts) for _ in range(count)])
)


@given(full, st.integers(1, 6), st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_each_batch_is_of_one_bucket_and_no_item_comes_twice(
    buckets: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    plan = BucketedPlan(assignment(buckets), batch_size)
    batches = [list(batch) for batch in plan(seed, epoch)]
    assert batches == [list(batch) for batch in plan(seed, epoch)]
    assert len(batches) == len(plan) == sum(buckets.count(own) // batch_size for own in set(buckets))
    assert all(len(batch) == batch_size for batch in batches)
    assert all(len({buckets[index] for index in batch}) == 1 for batch in batches)
    used = list(chain.from_iterable(batches))
    assert len(set(used)) == len(used) == len(buckets) - plan.left_out
    for own in set(buckets):
        assert buckets.count(own) - sum(buckets[index] == own for index in used) < batch_size


def test_order_and_what_is_left_out_are_drawn_anew() -> None:
    buckets = [0] * 11 + [1] * 13 + [2] * 6
    plan = BucketedPlan(assignment(buckets), 4)
    epochs = [[tuple(batch) for batch in plan(3, epoch)] for epoch in range(30)]
    shapes = {tuple(buckets[batch[0]] for batch in batches) for batches in epochs}
    assert len(shapes) > 20, "buckets come in another order each time"
    left = [set(range(30)) - set(chain.from_iterable(batches)) for batches in epochs]
    assert all(len(missed) == plan.left_out == 30 - 4 * 6 for missed in left)
    assert set.intersection(*left) == set(), "no item is left out for ever"
    assert list(plan(4, 0)) != list(plan(3, 0))


def test_fewer_items_than_a_batch_make_one() -> None:
    plan = BucketedPlan(assignment([0] * 5), 8)
    assert [sorted(batch) for batch in plan(0, 0)] == [[0, 1, 2, 3, 4]]


def test_settings_say_which_image_is_in_which_bucket() -> None:
    first = BucketedPlan(assignment([0, 0, 1, 1]), 2).settings
    assert first == BucketedPlan(assignment([0, 0, 1, 1]), 2).settings
    assert first != BucketedPlan(assignment([0, 1, 0, 1]), 2).settings
    assert first != BucketedPlan(Assignment(((8, 8), (16, 8)), np.array([0, 0, 1, 1])), 2).settings


# Images


def expected_sizes(data: ImageFolderDataModule) -> dict[int, tuple[int, int]]:
    """Of each training image by its number: its bucket, of those that fill a batch."""
    files = [Path(path) for path, _ in data.dataset("train").files]
    shapes = {int(path.stem): SHAPES[int(path.stem) % len(SHAPES)] for path in files}
    buckets = BUCKETS.assign(list(shapes.values()), 32, data.batch_size)
    return {index: buckets.size_of(place) for place, index in enumerate(shapes)}


def epoch_of(data: ImageFolderDataModule) -> list[Said]:
    torch.manual_seed(5)
    data._order_seed = None
    return [said(batch) for batch in data.train_dataloader()]


def test_training_batches_have_the_sizes_of_their_images(root: Path) -> None:
    data = photos(root)
    sizes = expected_sizes(data)
    assert len(set(sizes.values())) == 5
    batches = epoch_of(data)
    assert len({size for size, _ in batches}) == 5
    for size, items in batches:
        assert len(items) == 4
        assert {sizes[index] for index, *_ in items} == {size}
    places = [place for _, items in batches for _, *place in items]
    assert any(any(place) for place in places), "crops are drawn"


def test_the_record_of_a_photo_says_where_its_crop_is(tmp_path: Path) -> None:
    """By Pillow, from the file and the record alone."""
    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate(SHAPES * 4):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    data = photos(tmp_path, batch_size=2)
    by_shape = {}
    for batch in data.train_dataloader():
        height, width = batch["image"].shape[2:]
        for image, of, place in zip(batch["image"], batch["original_size"], batch["crop_top_left"], strict=True):
            found = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            matches = 0
            for path in tmp_path.glob("*.png"):
                file = load_rgb(str(path))
                scale = max(height / file.height, width / file.width)
                to = (int(file.width * scale + 1e-9), int(file.height * scale + 1e-9))
                top, left = place.tolist()
                box = (left, top, left + width, top + height)
                if (file.height, file.width) == tuple(of.tolist()):
                    matches += np.array_equal(found, np.asarray(file.resize(to, Image.Resampling.BICUBIC).crop(box)))
            assert matches == 1
            by_shape[tuple(of.tolist())] = (height, width)
    assert len(set(by_shape.values())) > 2


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(root: Path, workers: int) -> None:
    assert epoch_of(photos(root, num_workers=workers)) == epoch_of(photos(root))


def test_processes_share_out_what_one_has(root: Path) -> None:
    data = photos(root)
    dataset, plan = data.training_batches(6)
    (one, *parts) = (
        [said(batch) for batch in TrainingLoader(dataset, plan, 5, rank, ranks)]
        for rank, ranks in ((0, 1), (0, 3), (1, 3), (2, 3))
    )
    for whole, *shares in zip(one, *parts, strict=True):
        assert {size for size, _ in shares} == {whole[0]}
        assert [item for _, items in shares for item in items] == whole[1]


def test_squares_are_what_they_were(root: Path) -> None:
    """``dataset``, which images are generated like and measured against."""
    data, plain = photos(root, crop="center"), photos(root, crop="center", buckets=None)
    for split in ("train", "val", "test"):
        assert {item["image"].shape for item in data.dataset(split)} == {(3, 32, 32)}  # type: ignore[attr-defined]
        assert data.dataset(split).files == plain.dataset(split).files
    assert plain.image_sizes == ((32, 32),)
    assert data.image_sizes == BUCKETS.sizes(32)
    assert {batch["image"].shape[2:] for batch in plain.train_dataloader()} == {(32, 32)}
    assert {batch["image"].shape[2:] for batch in plain.val_dataloader()} == {(32, 32)}


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_sees_every_image_once_near_its_shape(root: Path, workers: int) -> None:
    data = photos(root, batch_size=3, num_workers=workers)
    numbers = [int(Path(path).stem) for path, _ in data.dataset("val").files]
    sizes = BUCKETS.assign([SHAPES[index % len(SHAPES)] for index in numbers], 32)
    loader = data.val_dataloader()
    batches = [said(batch) for batch in loader]
    assert batches == [said(batch) for batch in loader] == [said(batch) for batch in data.test_dataloader()]
    assert sorted(index for _, items in batches for index, *_ in items) == sorted(numbers)
    for size, items in batches:
        assert {sizes.size_of(numbers.index(index)) for index, *_ in items} == {size}
    # A batch comes when it is full, and those left at the end.
    assert [len(items) for _, items in batches] == sorted((len(items) for _, items in batches), reverse=True)
    ends = [max(numbers.index(index) for index, *_ in items) for _, items in batches if len(items) == 3]
    assert ends == sorted(ends)
    assert len(ends) > 1


def test_it_is_said_once_what_an_epoch_is_made_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = photos(root, batch_size=5)
    with caplog.at_level(logging.INFO):
        plan = data.training_batches(5)[1]
        data.training_batches(5)
    assert isinstance(plan, BucketedPlan)
    (line,) = (record.message for record in caplog.records if "in buckets" in record.message)
    assert f"{len(plan)} batches of 5, {plan.left_out} images are left out" in line
    counts = zip(plan.assignment.sizes, plan.assignment.members, strict=True)
    assert ", ".join(f"{height} x {width}: {len(members)}" for (height, width), members in counts) in line
    assert f"{plan.assignment.moved} are nearer to sizes with fewer images than a batch" in line
    assert plan.assignment.moved > 0
    assert plan.left_out > 0


# Bad images


def spoilt(root: Path, cut: tuple[int, ...] = (), text: tuple[int, ...] = ()) -> Path:
    """Images cut off behind their headers, and files that are none."""
    write(root)
    for index in cut:
        path = root / f"{index:03}.png"
        path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"IDAT") + 6])
    for index in text:
        (root / f"{index:03}.png").write_text("no image")
    return root


def test_what_has_no_header_is_left_out_and_written_down(tmp_path: Path) -> None:
    root, report = spoilt(tmp_path / "photos", text=(3, 9)), tmp_path / "bad.jsonl"
    data = photos(root, report=report)
    with pytest.warns(UserWarning, match="Left out 2 of 40 images that cannot be read"):
        data.setup()
    assert {Path(path).name for path in read_faults(report)} == {"003.png", "009.png"}
    assert len(data.dataset("train")) + len(data.dataset("val")) == 38
    with pytest.raises(Unreadable, match=r"00[39].png cannot be read \(not an image that Pillow can identify\)"):
        photos(root, on_error="raise").setup()
    with pytest.raises(ValueError, match="2 of 40 items cannot be read, more than `max_bad_share`"):
        photos(root, max_bad_share=0.01).setup()


def test_one_cut_off_is_replaced_by_the_next_of_its_bucket(tmp_path: Path) -> None:
    root, report = spoilt(tmp_path / "photos", cut=(0, 1, 8)), tmp_path / "bad.jsonl"
    data = photos(root, val_root=write(tmp_path / "val", 7), report=report, max_bad_share=1.0)
    bucketed, _ = data.training_batches(4)
    sizes = BUCKETS.assign([SHAPES[index % 7] for index in range(40)], 32, 4)
    for bad in (0, 1, 8):
        members = [index for index in range(40) if sizes.bucket_of[index] == sizes.bucket_of[bad]]
        members = [index for index in members if index not in (0, 1, 8)]
        following = next((index for index in members if index > bad), members[0])
        item = bucketed[bad]
        assert number(item["image"]) == following
        assert item["image"].shape[1:] == sizes.size_of(bad)
    assert {Path(path).name for path in read_faults(report)} == {"000.png", "001.png", "008.png"}


def test_alone_in_its_bucket_it_is_replaced_at_its_size(tmp_path: Path) -> None:
    """In validation, where a bucket may have a single image."""
    root = spoilt(tmp_path / "val", cut=(3,))
    for index in range(5, 40):
        (root / f"{index:03}.png").unlink()
    data = photos(write(tmp_path / "photos"), val_root=root, batch_size=2, max_bad_share=1.0)
    batches = [said(batch) for batch in data.val_dataloader()]
    assert sorted(len(items) for _, items in batches) == [1, 1, 1, 2]
    assert {index for _, items in batches for index, *_ in items} == {0, 1, 2, 4}
    assert {size for size, _ in batches} == {BUCKETS.assign([shape], 32).sizes[0] for shape in SHAPES[:5]}


# With Lightning


def fitted(
    root: Path,
    folder: Path,
    steps: int,
    checkpoint: ModelCheckpoint | None = None,
    ckpt_path: Path | None = None,
    data: ImageFolderDataModule | None = None,
    **options: Any,
) -> Seen:
    seen = Seen()
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=checkpoint is not None,
        callbacks=[seen, *([] if checkpoint is None else [checkpoint])],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"num_sanity_val_steps": 0, "limit_val_batches": 2, **options},
    )
    torch.manual_seed(0 if ckpt_path is None else 1)
    resumed: dict[str, Any] = {} if ckpt_path is None else {"ckpt_path": str(ckpt_path), "weights_only": True}
    trainer.fit(Mean(), photos(root) if data is None else data, **resumed)
    return seen


SAVED: dict[str, Callable[[Path, int], ModelCheckpoint]] = {
    "after_a_step": lambda folder, k: ModelCheckpoint(folder, "{step}", every_n_train_steps=k, save_top_k=-1),
    "after_an_epoch": lambda folder, k: ModelCheckpoint(
        folder, "{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
    ),
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize(
    ("when", "step", "options"),
    [
        ("after_a_step", 3, {}),
        ("after_a_step", 8, {}),
        ("after_a_step", 2, {"accumulate_grad_batches": 2}),
        ("after_an_epoch", 7, {}),
    ],
)
def test_a_run_that_goes_on_sees_what_it_had_not_seen(
    root: Path, tmp_path: Path, when: str, step: int, options: dict[str, Any]
) -> None:
    """From a checkpoint that Lightning wrote, against one run: shapes, images and crops."""
    assert len(photos(root).training_batches(4)[1]) == 7
    whole = fitted(root, tmp_path, 14, SAVED[when](tmp_path / "saved", step), **options).train
    rest = fitted(root, tmp_path, 14, ckpt_path=tmp_path / "saved" / f"step={step}.ckpt", **options).train
    taken = step * options.get("accumulate_grad_batches", 1)
    assert len(rest) == len(whole) - taken
    assert rest == whole[taken:]
    assert len({size for size, _ in whole}) > 2


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"buckets": AspectBuckets(8, 2.0)}, "buckets 5 there, 3 here"),
        ({"buckets": None}, "buckets 5 there, None here"),
        ({"batch_size": 3}, "batch_size 4 there, 3 here"),
    ],
)
def test_going_on_with_other_buckets_is_refused(
    root: Path, tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    fitted(root, tmp_path, 2, SAVED["after_a_step"](tmp_path / "saved", 2))
    with pytest.raises(ValueError, match=message):
        fitted(root, tmp_path, 4, ckpt_path=tmp_path / "saved" / "step=2.ckpt", data=photos(root, **other))


def test_overfitting_takes_the_same_batches_in_order(root: Path, tmp_path: Path) -> None:
    data = photos(root, crop="center")
    seen = fitted(root, tmp_path, 6, overfit_batches=3, data=data).train
    assert seen[:3] == seen[3:]
    assert len({size for size, _ in seen}) > 1
    assert {index for _, items in seen for index, *_ in items} <= {
        int(Path(p).stem) for p, _ in data.dataset("train").files
    }


def test_two_processes_train_on_one_shape_at_a_time(root: Path, tmp_path: Path) -> None:
    """Two real processes, stopped and gone on: together they see what one process with twice the batch sees."""
    run_ranks(Path(__file__).with_name("bucket_ranks.py"), root, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [part["weight"] for part in first] == [part["weight"] for part in second]
    shares = [[batch for part in rank for batch in part["train"]] for rank in (first, second)]
    assert [len(share) for share in shares] == [9, 9]
    assert [size for size, _ in shares[0]] == [size for size, _ in shares[1]]
    assert len({tuple(size) for size, _ in shares[0]}) > 2
    together = [(tuple(size), [*a, *b]) for (size, a), (_, b) in zip(*shares, strict=True)]
    one = fitted(root, tmp_path, 9).train
    assert together == [(size, [list(item) for item in items]) for size, items in one]
    numbers = {int(Path(path).stem) for path, _ in photos(root).dataset("val").files}
    validated = [{item[0] for part in rank for _, items in part["val"] for item in items} for rank in (first, second)]
    assert validated[0] | validated[1] == numbers
    assert validated[0] != validated[1]


def test_real_photos(shared: Path, tmp_path: Path) -> None:
    """Strips of photos: each is near its bucket's shape, and what is kept of it is what Pillow keeps."""
    with zipfile.ZipFile(shared / "data" / "imagenette128.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".webp")][::500]
        for index, name in enumerate(names):
            with Image.open(io.BytesIO(archive.read(name))) as photo:
                height, width = [(128, 128), (128, 72), (80, 128), (128, 100)][index % 4]
                photo.convert("RGB").crop((0, 0, width, height)).save(tmp_path / f"{index}.jpg", quality=95)
    data = photos(tmp_path, batch_size=2, image_size=64, buckets={"divisor": 16}, crop="center", verify=True)
    kept = []
    for batch in data.train_dataloader():
        height, width = batch["image"].shape[2:]
        assert height * width <= 64**2
        for image, (tall, wide) in zip(batch["image"], batch["original_size"].tolist(), strict=True):
            kept.append(min(height / width, tall / wide) / max(height / width, tall / wide))
            match = [
                float((image - CoveringCrop()(load_rgb(str(path)), (height, width))["image"]).abs().max())
                for path in tmp_path.glob("*.jpg")
            ]
            assert min(match) == 0
    assert min(kept) > 0.75
    assert sum(kept) / len(kept) > 0.9
