from __future__ import annotations

import os
import sys
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import run_ranks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from shard_files import bare_tar, photo, png, sample, write_shards
from torch import Tensor

from lpl_lightning.data import WebDatasetDataModule
from lpl_lightning.data.faults import Unreadable, read_faults
from lpl_lightning.data.shards import TarStream
from lpl_lightning.data.webdataset import find_shards


def module(urls: str | list[str], **options: Any) -> WebDatasetDataModule:
    given: dict[str, Any] = {"label": "cls", "caption": "txt", "classes": 3, "batch_size": 4, "num_workers": 0}
    return WebDatasetDataModule(urls, 8, **(given | {"shuffle_buffer": 6, "val_urls": urls} | options))


def captions(batches: Any) -> list[str]:
    return list(chain.from_iterable(batch["caption"] for batch in batches))


@pytest.mark.parametrize("images_per_epoch", [None, 19])
def test_batches_are_those_of_any_data_module(tmp_path: Path, images_per_epoch: int | None) -> None:
    write_shards(tmp_path, [7, 5, 7])
    data = module(str(tmp_path / "s-{00..02}.tar"), images_per_epoch=images_per_epoch)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert len(set(captions(batches))) == 16
    assert captions(batches) != captions(loader)
    batch = batches[0]
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].min() >= -1
    assert batch["image"].max() <= 1
    assert batch["label"].tolist() == [int(text.split()[1]) % 3 for text in batch["caption"]]
    assert batch["original_size"].tolist() == [[10, 12]] * 4
    assert captions(data.val_dataloader()) == [f"photo {number}" for number in range(19)]
    assert data.class_names == ("0", "1", "2")
    assert data.sample_captions(2) == ["photo 0", "photo 1"]
    assert list(data.validation_captions()) == [f"photo {number}" for number in range(19)]
    assert captions(data.test_dataloader()) == captions(data.val_dataloader())


def test_validation_is_the_same_with_workers(tmp_path: Path) -> None:
    write_shards(tmp_path, [7, 5, 7])
    data = module(str(tmp_path), num_workers=2)
    loader = data.val_dataloader()
    for _ in range(2):
        assert captions(loader) == [f"photo {number}" for number in range(19)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.parametrize("training", [False, True])
def test_a_forked_process_reads_for_itself(tmp_path: Path, training: bool) -> None:
    """It inherits the files that this one has opened, by a look at an image, with one place in them for both.

    A compressed shard shows it each time; in a plain one readers seek, and are wrong where two do so at once.
    """
    large = [[(f"{at:03}.png", png(photo(at, (48, 40)))), *sample(at)[1:]] for at in range(30)]
    (tmp_path / "a.tar.gz").write_bytes(bare_tar(chain.from_iterable(large), "w:gz"))
    data = module(str(tmp_path))
    sampler, dataset = data.train_dataloader().sampler, data.dataset("train")
    asked: list[Any] = list(sampler) if training else list(range(30))

    def given(part: list[Any]) -> list[Any]:
        return [dataset.batch(one)["caption"] if training else dataset[one]["caption"] for one in part]

    whole, again = given(asked), given(asked[:1])
    assert again == whole[:1]
    child = get_context("fork").Process(target=lambda: os._exit(0 if given(asked[1:]) == whole[1:] else 3))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert given(asked[1:]) == whole[1:], "nor does it move the place of the one that it comes from"
    assert not data.faults.met


def test_each_loader_process_has_a_lane_of_its_own(tmp_path: Path) -> None:
    """Else each would read all shards, and pass over what the others give."""
    data = module(write_shards(tmp_path, [7, 5, 7]), num_workers=2)
    assert data.train_dataloader().state_dict()["settings"] == {  # type: ignore[attr-defined]
        "batches_in_epoch": 4,
        "images": 19,
        "shards": 3,
        "batch_size": 4,
        "processes": 1,
        "num_workers": 2,
        "shuffle_buffer": 6,
    }


def test_whole_shards_are_held_out_by_their_names(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [2] * 20)
    data = module(shards, val_urls=None, val_fraction=0.2, batch_size=1)
    train, val = set(captions(data.train_dataloader())), captions(data.val_dataloader())
    assert not train & set(val)
    assert len(train) + len(val) == 40
    assert len(val) == 8
    assert captions(data.test_dataloader()) == val
    assert data.describe("test")["split"] == "val", "there are none for test, and a report says so"
    assert module(shards, test_urls=shards[:1]).describe("test")["split"] == "test"
    moved = module([str(path) for path in reversed(write_shards(tmp_path / "moved", [2] * 20))], val_urls=None)
    moved.val_fraction = 0.2
    assert set(captions(moved.val_dataloader())) == set(val)
    assert len(captions(module(shards[:2], val_urls=None, val_fraction=1e-9).val_dataloader())) == 2
    with pytest.raises(ValueError, match=r"`val_fraction` holds out whole shards .* Give `val_urls`, or more shards"):
        module(shards[:1], val_urls=None).val_dataloader()


def test_a_folder_braces_and_lists_name_the_same_shards(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [1, 1, 1])
    (tmp_path / "notes.md").write_text("no shard")
    for urls in (str(tmp_path), str(tmp_path / "s-{00..02}.tar"), "::".join(shards), [*shards]):
        assert find_shards(urls, "urls", False, False) == shards
    assert find_shards(str(tmp_path / "s-{00,02}.tar"), "urls", False, False) == shards[::2]


@pytest.mark.parametrize(
    ("urls", "error", "message"),
    [
        ("none-{0..3}.tar", FileNotFoundError, r"`urls` must name tar files .*none-0.tar is not there"),
        ([], ValueError, r"`urls` must name tar files, but \[\] has none"),
        (["s-00.tar", "s-0{0..1}.tar"], ValueError, r"each shard once, but has .*s-00.tar several times"),
        ("${NO_SUCH}/a.tar", ValueError, r"names a variable that is not set"),
        ("https://example.org/{0..3}.tar", ValueError, r"has the URL 'https://example.org/0.tar'.* `allow_remote`"),
        ("hf://datasets/a/b.tar", ValueError, r"`allow_remote`: true"),
        ("pipe:touch ran", ValueError, r"has 'pipe:touch ran', which runs a program.*`allow_pipe`: true"),
        ("PIPE://touch ran", ValueError, r"runs a program"),
        ("s-00.tar::pipe:touch ran", ValueError, r"runs a program"),
        ("{s-00.tar,pipe:touch ran}", ValueError, r"runs a program"),
    ],
)
def test_bad_urls_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, urls: Any, error: type[Exception], message: str
) -> None:
    write_shards(tmp_path, [1, 1])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        module(urls).setup("fit")
    if "pipe" in str(urls).lower():
        with pytest.raises(ValueError, match="runs a program"):
            module(urls, allow_remote=True).setup("fit")
    assert not (tmp_path / "ran").exists()


def test_pipes_and_urls_where_they_are_allowed(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [5])
    for urls, allow in ((f"pipe:cat {shard}", "allow_pipe"), (f"file://{shard}", "allow_remote")):
        data = module(urls, **{allow: True})
        assert captions(data.val_dataloader()) == [f"photo {number}" for number in range(5)]
        assert len(list(data.train_dataloader())) == 1
    # A program that fails is noticed, at its end or, as it happens, while its output is read.
    url = f"pipe:cat {shard}; exit 3"
    faults = TarStream([url], module(url).contents).scan().faults
    assert "exit 3" in faults[url]
    assert "cut off or damaged" in faults[url]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": None}, r"`label` and `classes` go together"),
        ({"classes": None}, r"`label` and `classes` go together"),
        ({"classes": ["a", "a"]}, r"`classes` must be at least one class, each named once"),
        ({"classes": 0}, r"`classes` must be at least one"),
        ({"shuffle_buffer": 0}, r"`shuffle_buffer` must be 1 or more"),
        ({"images_per_epoch": 0}, r"`images_per_epoch` must be 1 or more"),
        ({"val_fraction": 1.0}, r"`val_fraction` must be in \(0, 1\)"),
        ({"crop": "left"}, r"`crop` must be one of"),
        ({"on_error": "ignore"}, r"`on_error` must be one of"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module("a.tar", **options)


def test_classes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\ncow\n")
    assert module("a.tar", classes=str(tmp_path / "classes.txt")).class_names == ("cat", "dog", "cow")
    with pytest.raises(FileNotFoundError, match="`classes` must be a text file with one class a line"):
        module("a.tar", classes="none.txt")


def damaged(tmp_path: Path) -> list[str]:
    shards = write_shards(tmp_path / "shards", [12, 12])
    torn = [file if file[0] != "105.png" else ("105.png", b"torn") for n in range(100, 112) for file in sample(n)]
    files = [*torn[:3], ("900.cls", b"0"), *torn[3:], *sample(3)]
    third = tmp_path / "shards" / "s-02.tar"
    third.write_bytes(bare_tar(files)[: -1024 - 600])  # cut off in the last member, a caption
    return [*shards, str(third)]


def test_faults_are_counted_named_and_skipped(tmp_path: Path) -> None:
    shards = damaged(tmp_path)
    data = module(shards, report=tmp_path / "report.jsonl", max_bad_share=0.2)
    with pytest.warns(UserWarning, match="Left out 3 of 39 samples that cannot be used"):
        data.setup("fit")
    seen = captions(data.train_dataloader())
    assert len(seen) == 36
    assert {f"photo {number}" for number in (*range(24), 100, 111)} <= set(seen)
    assert "photo 105" not in seen
    found = read_faults(tmp_path / "report.jsonl")
    assert found == {
        f"{shards[2]}/900": "no image (it has cls)",
        f"{shards[2]}/003": "no caption (it has png, cls)",
        shards[2]: found[shards[2]],
        f"{shards[2]}/105": "not an image that Pillow can identify",
    }
    assert "cut off" in found[shards[2]]


def test_faults_that_are_met_are_counted_too(tmp_path: Path) -> None:
    shards = damaged(tmp_path)
    data = module(shards, val_urls=shards[:1], report=tmp_path / "report.jsonl", images_per_epoch=39)
    seen = captions(data.train_dataloader())
    assert "photo 105" not in seen
    assert {f"{shards[2]}/900", f"{shards[2]}/105"} <= read_faults(tmp_path / "report.jsonl").keys()


def test_faults_end_a_run_where_they_are_to(tmp_path: Path) -> None:
    shards = damaged(tmp_path)
    with pytest.raises(Unreadable, match=r"s-02.tar/900 cannot be read \(no image"):
        module(shards, on_error="raise").setup("fit")
    with pytest.raises(ValueError, match=r"3 of 39 items cannot be read, more than `max_bad_share` \(0.01\)"):
        module(shards, max_bad_share=0.01).setup("fit")
    empty = tmp_path / "empty.tar"
    empty.write_bytes(bare_tar([]))
    with pytest.raises(ValueError, match="The train images must be at least one that can be used"):
        module(str(empty)).setup("fit")


def test_shards_that_count_for_themselves(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.tar", "b.tar")]
    for path in paths:
        path.write_bytes(bare_tar([*sample(0), *sample(1)]))
    urls = [str(path) for path in paths]
    assert len(captions(module(urls, unique_keys=False).val_dataloader())) == 4
    data = module(urls, max_bad_share=0.5)
    with pytest.warns(UserWarning, match=r"Left out 2 of 4 .*b.tar/000 \(its key is that of a sample of .*unique_keys"):
        assert len(captions(data.val_dataloader())) == 2


def test_images_by_their_ending(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(bare_tar([("0.mask.png", b""), ("0.jpg", png(photo(0), "JPEG")), ("0.png", png(photo(1)))]))
    plain: dict[str, Any] = {"label": None, "classes": None, "caption": None, "interpolation": "bilinear"}
    (jpg,), (other,) = (module(str(path), image=[one], **plain).val_dataloader() for one in ("JPG", ".png"))
    assert jpg.keys() == {"image", "original_size", "crop_top_left"}
    assert not torch.equal(jpg["image"], other["image"])


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.line(batch["image"].mean((1, 2, 3))[:, None]).mean()
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Seen(Callback):
    def __init__(self) -> None:
        self.batches: list[tuple[list[str], list[list[int]]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch["caption"], batch["crop_top_left"].tolist()))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("images_per_epoch", [None, 19])
def test_a_run_that_goes_on_sees_what_it_had_not_seen(
    tmp_path: Path, workers: int, images_per_epoch: int | None
) -> None:
    """In the middle of the second epoch, from a checkpoint that Lightning wrote; the first run's seed is taken."""
    shards = write_shards(tmp_path / "shards", [7, 5, 7])

    def fitted(ckpt_path: str | None = None) -> list[Any]:
        seen = Seen()
        saving = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=6, save_top_k=-1)
        trainer = pl.Trainer(
            max_steps=10,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            callbacks=[seen, *([] if ckpt_path else [saving])],
            enable_checkpointing=ckpt_path is None,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        torch.manual_seed(1 if ckpt_path else 0)
        data = module(shards, num_workers=workers, images_per_epoch=images_per_epoch, crop="random")
        trainer.fit(Line(), data, ckpt_path=ckpt_path, weights_only=True)
        return seen.batches

    whole = fitted()
    assert len(whole) == 10
    assert fitted(str(tmp_path / "saved" / "step=6.ckpt")) == whole[6:]


def test_two_processes_share_out_an_epoch(tmp_path: Path) -> None:
    """By gloo, each with a loader process; and as one process counts on both."""
    shards = write_shards(tmp_path / "shards", [7, 5, 8])
    for done in run_ranks(Path(__file__).with_name("stream_ranks.py"), tmp_path, *shards):
        assert "before they are needed: []" in done.stdout
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first["train"]) == len(second["train"]) == 2
    seen = [*chain.from_iterable(first["train"]), *chain.from_iterable(second["train"])]
    assert len(set(seen)) == len(seen) == 16
    val = [*chain.from_iterable(first["val"]), *chain.from_iterable(second["val"])]
    assert sorted(val) == sorted(f"photo {number}" for number in range(20))


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lpl-lightning\[data\]"'):
        module("a.tar").setup("fit")
