from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from lpl_lightning.data import ImageDataModule, SampleRequests, ShapesDataModule
from lpl_lightning.data.base import Split, to_unit_range


class Numbers(Dataset[dict[str, Any]]):
    """Images that hold their own index."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((3, 2, 2), float(index))}


class NumbersDataModule(ImageDataModule):
    """The least a subclass must define."""

    def __init__(self, length: int, batch_size: int, num_generate: int = 0, seed: int = 0) -> None:
        super().__init__(2, batch_size, 0, num_generate, seed)
        self.length = length

    @property
    def class_names(self) -> tuple[str, ...]:
        return ()

    def dataset(self, split: Split) -> Numbers:
        return Numbers(self.length)


def indices(batches: list[dict[str, Tensor]]) -> list[int]:
    return [int(value) for batch in batches for value in batch["image"][:, 0, 0, 0]]


@given(
    num_images=st.integers(0, 200),
    num_classes=st.integers(1, 30),
    seed=st.integers(0, 2**31),
)
def test_requests_are_balanced_and_have_a_seed_each(num_images: int, num_classes: int, seed: int) -> None:
    requests = [SampleRequests(num_images, num_classes, seed)[i] for i in range(num_images)]
    counts = Counter(request["label"] for request in requests)
    per_class = [counts[label] for label in range(num_classes)]
    assert sum(per_class) == num_images
    assert max(per_class) - min(per_class) <= 1
    assert [request["index"] for request in requests] == list(range(num_images))
    assert len({request["seed"] for request in requests}) == num_images


def test_requests_of_a_longer_run_begin_as_those_of_a_shorter() -> None:
    short, long = SampleRequests(5, 3, seed=9), SampleRequests(50, 3, seed=9)
    assert [short[i] for i in range(5)] == [long[i] for i in range(5)]
    assert short[0]["seed"] == 9


def test_requests_without_classes_are_all_of_label_zero() -> None:
    requests = SampleRequests(7)
    assert {requests[i]["label"] for i in range(7)} == {0}


def test_requests_go_round_the_captions() -> None:
    requests = SampleRequests(7, 2, captions=["a", "b", "c"])
    assert [requests[i].get("caption") for i in range(7)] == ["a", "b", "c", "a", "b", "c", "a"]
    assert [requests[i]["label"] for i in range(7)] == [0, 1, 0, 1, 0, 1, 0]
    assert "caption" not in SampleRequests(7, 2)[0]


def test_requests_end() -> None:
    assert len(SampleRequests(4)) == 4
    assert len(list(SampleRequests(4))) == 4  # type: ignore[call-overload]  # iterates by __getitem__
    with pytest.raises(IndexError):
        SampleRequests(4)[4]


def test_a_negative_number_of_requests_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`num_images` must be 0 or more, got -1"):
        SampleRequests(-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, r"`image_size` must be 1 or more, got 0"),
        ({"batch_size": 0}, r"`batch_size` must be 1 or more, got 0"),
        ({"num_workers": -1}, r"`num_workers` must be 0 or more, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesDataModule(**arguments)


def test_unit_range_maps_the_ends_to_the_ends_and_comes_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    image = to_unit_range(levels)
    assert image.dtype == torch.float32
    assert image[0] == -1.0
    assert image[255] == 1.0
    assert torch.equal(((image + 1) * 255 / 2).round().to(torch.uint8), levels)
    assert levels[200] == 200  # The argument is left as it was.


def test_training_batches_are_full_and_hold_each_image_at_most_once() -> None:
    batches = list(NumbersDataModule(length=11, batch_size=4).train_dataloader())
    assert [len(batch["image"]) for batch in batches] == [4, 4]
    assert len(set(indices(batches))) == 8


def test_training_batches_are_shuffled_anew_each_epoch() -> None:
    loader = NumbersDataModule(length=50, batch_size=50).train_dataloader()
    first, second = indices(list(loader)), indices(list(loader))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(50))


class Order(pl.LightningModule):
    """Keeps the images of the batches that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen += indices([batch])
        return self.net(torch.ones(1, 1)).sum()  # type: ignore[no-any-return]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def order(data: NumbersDataModule, seed: int, evaluated: Path | None = None, save: Path | None = None) -> list[int]:
    """Images of an epoch of one training after another of a data module, by the seed of each."""
    module = Order()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    pl.seed_everything(seed, verbose=False)
    if evaluated is not None:
        trainer.validate(module, data, ckpt_path=evaluated, verbose=False, weights_only=True)
    trainer.fit(module, data)
    if save is not None:
        trainer.save_checkpoint(save)
    return module.seen


def test_the_order_is_that_of_the_trainings_seed(tmp_path: Path) -> None:
    """And not of another training before it, nor of a checkpoint that was evaluated before."""
    first, second = (order(NumbersDataModule(20, 5), seed, save=tmp_path / f"{seed}.ckpt") for seed in (1, 2))
    assert first != second
    again = NumbersDataModule(20, 5)
    assert [order(again, seed) for seed in (1, 2, 1)] == [first, second, first]
    assert order(NumbersDataModule(20, 5), 2, evaluated=tmp_path / "1.ckpt") == second


def test_fewer_training_images_than_a_batch_still_make_one() -> None:
    batches = list(NumbersDataModule(length=3, batch_size=4).train_dataloader())
    assert [len(batch["image"]) for batch in batches] == [3]


def test_validation_and_test_batches_hold_every_image_in_order() -> None:
    data = NumbersDataModule(length=11, batch_size=4)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert indices(list(loader)) == list(range(11))


def test_predict_batches_are_the_requests() -> None:
    data = ShapesDataModule(batch_size=4, num_generate=10, generate_seed=100)
    batches = list(data.predict_dataloader())
    assert [len(batch["index"]) for batch in batches] == [4, 4, 2]
    label = torch.cat([batch["label"] for batch in batches])
    assert label.dtype == torch.int64
    assert label.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert torch.cat([batch["seed"] for batch in batches]).tolist() == list(range(100, 110))


def test_predict_batches_without_classes() -> None:
    (batch,) = NumbersDataModule(length=1, batch_size=8, num_generate=3).predict_dataloader()
    assert batch["label"].tolist() == [0, 0, 0]
    assert batch.keys() == {"index", "label", "seed"}


def test_there_is_something_to_predict() -> None:
    """A trainer would end without a word of what was made: nothing."""
    data = NumbersDataModule(length=1, batch_size=8, num_generate=0)
    with pytest.raises(ValueError, match=r"`data\.num_generate` is 0"):
        data.predict_dataloader()


def test_data_without_captions_have_none() -> None:
    data = NumbersDataModule(length=1, batch_size=8)
    assert not data.has_captions
    assert data.sample_captions(5) == []


def test_shapes_captions_are_those_of_the_validation_images() -> None:
    data = ShapesDataModule(image_size=1, val_images=6, batch_size=8, num_generate=8, seed=4)
    (batch,) = data.val_dataloader()
    assert data.has_captions
    assert data.sample_captions(4) == batch["caption"][:4]
    assert data.sample_captions(8) == batch["caption"] + batch["caption"][:2]
    (requests,) = data.predict_dataloader()
    assert requests["caption"] == data.sample_captions(8)
    assert requests["label"].tolist() == list(range(8))


def test_requests_of_a_longer_prediction_begin_as_those_of_a_shorter() -> None:
    (short,) = ShapesDataModule(val_images=5, batch_size=9, num_generate=3).predict_dataloader()
    (long,) = ShapesDataModule(val_images=5, batch_size=9, num_generate=9).predict_dataloader()
    assert short["caption"] == long["caption"][:3]


def test_prompts_replace_the_captions(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffa café\r\n\r\n  a red\u2028star \r\n".encode())
    data = ShapesDataModule(val_images=6, batch_size=8, num_generate=3, prompts=str(prompts))
    (requests,) = data.predict_dataloader()
    assert requests["caption"] == ["a café", "a red\u2028star", "a café"]
    assert requests["label"].tolist() == [0, 1, 2]
    assert data.sample_captions(1) == ShapesDataModule(val_images=6).sample_captions(1)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"`prompts` must be a text file with one prompt a line, but .*p\.txt does not exist"),
        (b" \n\n", ValueError, r"`prompts` must be .*p\.txt is empty"),
        (b"a caf\xe9", ValueError, r"p\.txt must be UTF-8 text, but its byte 5 is not\. Save it as UTF-8"),
    ],
)
def test_a_file_without_prompts_is_refused(
    tmp_path: Path, content: bytes | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(error, match=message):
        ShapesDataModule(prompts=tmp_path / "p.txt").predict_dataloader()
    with pytest.raises(ValueError, match=r"`prompts` must be .* is a folder"):
        ShapesDataModule(prompts=tmp_path).predict_dataloader()


def test_a_worker_loads_what_the_training_process_loads() -> None:
    here, there = (ShapesDataModule(16, 8, 6, batch_size=4, num_workers=workers) for workers in (0, 1))
    for a, b in zip(here.val_dataloader(), there.val_dataloader(), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])
        assert a["caption"] == b["caption"]
