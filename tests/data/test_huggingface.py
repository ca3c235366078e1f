from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import photo, png

from lpl_lightning.data import HuggingFaceDataModule, ImageFolderDataModule
from lpl_lightning.data.faults import Unreadable, read_faults

datasets = pytest.importorskip("datasets")
parquet_files = pytest.importorskip("pyarrow.parquet")
CLASSES = ("cat", "cow", "dog")


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def table(numbers: Iterable[int], bad: dict[int, Any] | None = None) -> Any:
    """Images with a class, a caption and two captions."""
    rows = [
        {
            "image": (bad or {}).get(number, {"bytes": png(photo(number)), "path": None}),
            "label": number % 3,
            "text": f"photo {number}",
            "texts": [f"first {number}", f"second {number}"],
        }
        for number in numbers
    ]
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=list(CLASSES)),
        text=datasets.Value("string"),
        texts=datasets.Sequence(datasets.Value("string")),
    )
    return datasets.Dataset.from_list(rows, features=features)


def parquet(folder: Path, lengths: tuple[int, ...] = (7, 5, 7)) -> str:
    folder.mkdir()
    first = 0
    for shard, length in enumerate(lengths):
        table(range(first, first + length)).to_parquet(folder / f"{shard}.parquet")
        first += length
    return str(folder / "*.parquet")


def module(path: str, **options: Any) -> HuggingFaceDataModule:
    given: dict[str, Any] = {"label": "label", "caption": "text", "batch_size": 4, "num_workers": 0}
    return HuggingFaceDataModule(path, 8, **(given | {"shuffle_buffer": 6} | options))


def captions(batches: Any) -> list[str]:
    return list(chain.from_iterable(batch["caption"] for batch in batches))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["disk", "disks", "parquet", "arrow", "folder"])
def test_ways_to_keep_a_data_set(tmp_path: Path, kind: str, streaming: bool) -> None:
    options: dict[str, Any] = {"val_split": "train", "streaming": streaming}
    if kind == "disk":
        table(range(19)).save_to_disk(tmp_path / "saved", num_shards=3)
        path = str(tmp_path / "saved")
    elif kind == "disks":
        datasets.DatasetDict({"train": table(range(19)), "other": table(range(3))}).save_to_disk(tmp_path / "saved")
        path = str(tmp_path / "saved")
    elif kind == "arrow":
        table(range(19)).save_to_disk(tmp_path / "saved", num_shards=3)
        path, options["data_files"] = "arrow", str(tmp_path / "saved/*.arrow")
    elif kind == "parquet":
        path, options["data_files"] = "parquet", parquet(tmp_path / "files")
    else:
        parquet(tmp_path / "files")
        path = str(tmp_path / "files")
    data = module(path, **options)
    data.prepare_data()
    data.setup("fit")
    assert data.class_names == CLASSES
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert len(set(captions(batches))) == 16
    assert captions(batches) != captions(loader)
    for batch in batches:
        assert batch["label"].tolist() == [int(text.split()[1]) % 3 for text in batch["caption"]]
        assert batch["original_size"].tolist() == [[10, 12]] * 4
    val = list(data.val_dataloader())
    assert captions(val) == [f"photo {number}" for number in range(19)]
    assert list(data.validation_captions()) == captions(val)
    assert captions(data.test_dataloader()) == captions(val)


@pytest.mark.parametrize("streaming", [False, True])
def test_loader_processes_read_all_of_it(tmp_path: Path, streaming: bool) -> None:
    """``datasets`` would share a stream's files out among the processes by itself."""
    data = module(
        "parquet", data_files=parquet(tmp_path / "files"), val_split="train", streaming=streaming, num_workers=2
    )
    data.setup("fit")
    for _ in range(2):
        assert len(set(captions(data.train_dataloader()))) == 16
        assert captions(data.val_dataloader()) == [f"photo {number}" for number in range(19)]


def test_a_stream_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    files = parquet(tmp_path / "files")
    for options in ({"images_per_epoch": 19}, {}):
        data = module("parquet", data_files=files, val_split="train", streaming=True, crop="random", **options)
        loader = data.train_dataloader()
        whole = [batch["caption"] for batch in chain(loader, loader)]
        stopped = data.train_dataloader()
        seen = [batch["caption"] for _, batch in zip(range(2), stopped, strict=False)]
        other = data.train_dataloader()
        other.load_state_dict(stopped.state_dict())  # type: ignore[attr-defined]
        assert seen + [batch["caption"] for batch in chain(other, other)] == whole


def test_an_image_folder_is_split_and_ordered_as_by_its_own_module(tmp_path: Path) -> None:
    for number in range(30):
        path = tmp_path / "photos" / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(path)
    files = {"data_files": {"train": str(tmp_path / "photos/**")}}
    ours = module("imagefolder", caption=None, val_fraction=0.3, **files)
    theirs = ImageFolderDataModule(tmp_path / "photos", 8, val_fraction=0.3, batch_size=4, num_workers=0)
    assert ours.class_names == theirs.class_names
    for mine, folder in zip(ours.val_dataloader(), theirs.val_dataloader(), strict=True):
        assert mine.keys() == folder.keys()
        assert all(torch.equal(mine[key], folder[key]) for key in mine)
    assert len(ours.dataset("train")) == len(theirs.dataset("train"))


def test_rows_are_held_out_by_their_numbers(tmp_path: Path) -> None:
    table(range(40)).save_to_disk(tmp_path / "saved")
    data = module(str(tmp_path / "saved"), val_fraction=0.25, batch_size=1)
    train, val = captions(data.train_dataloader()), captions(data.val_dataloader())
    assert sorted(train + val) == sorted(f"photo {number}" for number in range(40))
    assert 3 <= len(val) <= 18
    assert val == captions(module(str(tmp_path / "saved"), val_fraction=0.25, batch_size=3).val_dataloader())
    assert len(captions(module(str(tmp_path / "saved"), val_fraction=1e-9).val_dataloader())) == 1
    table(range(1)).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="There must be train images, but of the 1 rows"):
        module(str(tmp_path / "one")).train_dataloader()
    files = parquet(tmp_path / "files", (4, 4, 4))
    data = module("parquet", data_files=files, val_fraction=0.01, batch_size=1, streaming=True)
    train, val = captions(data.train_dataloader()), captions(data.val_dataloader())
    assert sorted(train + val) == sorted(f"photo {number}" for number in range(12))
    assert len(val) == 4, "one file of the stream"


def test_rows_stored_class_by_class_are_spread_for_validation(tmp_path: Path) -> None:
    table(sorted(range(30), key=lambda number: number % 3)).save_to_disk(tmp_path / "saved")
    data = module(str(tmp_path / "saved"), val_split="train", batch_size=30)
    (batch,) = data.val_dataloader()
    assert sorted(batch["label"].tolist()) == sorted([0, 1, 2] * 10)
    assert len(set(batch["label"][:10].tolist())) == 3


def test_one_of_several_captions_is_drawn_in_training(tmp_path: Path) -> None:
    table(range(20)).save_to_disk(tmp_path / "saved")
    data = module(str(tmp_path / "saved"), caption=["text", "texts"], val_split="train")
    assert captions(data.val_dataloader()) == [f"photo {number}" for number in range(20)]
    loader = data.train_dataloader()
    seen = {text.split()[0] for _ in range(3) for text in captions(loader)}
    assert seen == {"photo", "first", "second"}


BAD = {
    2: {"bytes": b"torn", "path": None},
    5: {"bytes": b"", "path": None},
    9: None,
    11: {"bytes": None, "path": "/no/such/file.png"},
}


@pytest.mark.parametrize("streaming", [False, True])
def test_faults_follow_the_policy(tmp_path: Path, streaming: bool) -> None:
    # By pyarrow: `datasets` itself would look for the image that is not there.
    parquet_files.write_table(table(range(20), BAD).data.table, tmp_path / "a.parquet")
    options: dict[str, Any] = {"val_split": "train", "streaming": streaming, "data_files": str(tmp_path / "a.parquet")}
    data = module("parquet", report=tmp_path / "report.jsonl", **options)
    val = captions(data.val_dataloader())
    stand_in = {2: 3, 5: 6, 9: 10, 11: 12}
    assert val == [f"photo {stand_in.get(number, number)}" for number in range(20)]
    found = read_faults(tmp_path / "report.jsonl")
    assert len(found) == 4
    said = " ".join(found.values())
    for reason in (
        "not an image that Pillow can identify",
        "it is empty",
        "no image in the column",
        "FileNotFoundError",
    ):
        assert reason in said
    assert all(name.startswith("parquet, train") and "row" in name for name in found)
    with pytest.raises(Unreadable, match=r"cannot be read \(not an image"):
        list(module("parquet", on_error="raise", **options).val_dataloader())


def test_labels_by_name_and_classes_that_are_given(tmp_path: Path) -> None:
    rows = [{"image": png(photo(number)), "label": CLASSES[number % 3]} for number in range(6)]
    features = datasets.Features(image=datasets.Value("binary"), label=datasets.Value("string"))
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    options: dict[str, Any] = {"data_files": str(tmp_path / "a.parquet"), "val_split": "train", "caption": None}
    data = module("parquet", **options)
    assert data.class_names == CLASSES
    assert next(iter(data.val_dataloader()))["label"].tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match=r"`classes` must be given, how many or their names"):
        module("parquet", streaming=True, **options).setup("fit")
    data = module("parquet", streaming=True, classes=["dog", "cow", "cat"], **options)
    assert next(iter(data.val_dataloader()))["label"].tolist() == [2, 1, 0, 2]


def test_images_by_path_in_json(tmp_path: Path) -> None:
    for number in range(4):
        photo(number).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"file": str(tmp_path / f"{number}.png"), "text": f"photo {number}"}) for number in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for streaming in (False, True):
        data = module(
            "json",
            data_files=str(tmp_path / "a.jsonl"),
            val_split="train",
            image="file",
            label=None,
            streaming=streaming,
        )
        assert captions(data.val_dataloader()) == [f"photo {number}" for number in range(4)]
        assert data.num_classes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "class"}, r"must be columns of the data, but class is not among image, label, text, texts"),
        ({"image": "photo"}, r"but photo is not among"),
        ({"caption": ["text", "caption"]}, r"but caption is not among"),
        ({"split": "dev"}, r"no split 'dev' in .*saved, which has train, val"),
        ({"val_split": "val"}, r"The split val must have the classes cat, cow, dog, not a, b"),
        ({"classes": 2, "val_split": "train"}, r"`classes` must be the 3 of the column label, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    val = table(range(2)).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    datasets.DatasetDict({"train": table(range(4)), "val": val}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        module(str(tmp_path / "saved"), **options).setup("fit")


def test_a_folder_of_one_split_has_no_other(tmp_path: Path) -> None:
    table(range(4)).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"holds one split, but 'val' is asked for too"):
        module(str(tmp_path / "saved"), val_split="val").setup("fit")


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lpl-lightning\[data\]"'):
        module(str(tmp_path)).setup("fit")
