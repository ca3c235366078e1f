from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shard_files import photo, png
from strangers import refused

from lpl_lightning.data import HuggingFaceDataModule, ImageFolderDataModule
from lpl_lightning.data.faults import Unreadable, read_faults
from lpl_lightning.data.listing import path_hash
from lpl_lightning.data.rows import RowsDataset

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
@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_a_format_that_was_saved_with_the_data_does_not_count(tmp_path: Path, kind: str, streaming: bool) -> None:
    given, rows = {"val_split": "train", "streaming": streaming, "caption": "texts"}, table(range(7))
    for columns in (None, ["label"]):
        path = tmp_path / f"of {columns}"
        rows.with_format(kind, columns=columns).save_to_disk(path)
        assert datasets.load_from_disk(path).format["type"] == kind, "it is restored"
        (batch,) = module(str(path), **(given | {"batch_size": 7})).val_dataloader()
        assert batch["label"].tolist() == [number % 3 for number in range(7)]
        assert batch["caption"] == [f"first {number}" for number in range(7)]
        assert batch["image"].shape == (7, 3, 8, 8)


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
    assert captions(data.test_dataloader()) == val
    assert data.describe("test")["split"] == "val", "there are none for test, and a report says so"
    assert val == captions(module(str(tmp_path / "saved"), val_fraction=0.25, batch_size=3).val_dataloader())
    first = min(range(len(train) + len(val)), key=lambda row: path_hash(str(row), Path()))
    assert captions(module(str(tmp_path / "saved"), val_fraction=1e-9).val_dataloader()) == [f"photo {first}"]
    table(range(1)).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="There must be train images, but of the 1 rows"):
        module(str(tmp_path / "one")).train_dataloader()
    files = parquet(tmp_path / "files", (4, 4, 4))
    data = module("parquet", data_files=files, val_fraction=0.01, batch_size=1, streaming=True)
    train, val = captions(data.train_dataloader()), captions(data.val_dataloader())
    assert sorted(train + val) == sorted(f"photo {number}" for number in range(12))
    assert len(val) == 4, "one file of the stream"
    (tmp_path / "files").rename(tmp_path / "moved")
    moved = str(tmp_path / "moved/*.parquet")
    data = module("parquet", data_files=[moved], val_fraction=0.01, batch_size=1, streaming=True)
    assert captions(data.val_dataloader()) == val


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
    assert all(name.startswith(f"parquet, {tmp_path / 'a.parquet'}, train") and "row" in name for name in found)
    with pytest.raises(Unreadable, match=r"cannot be read \(not an image"):
        list(module("parquet", on_error="raise", **options).val_dataloader())


def spoiled(root: Path) -> Path:
    """Forty photos in two classes, three of which cannot be read."""
    for number in range(40):
        place = root / CLASSES[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"" if number in (3, 4) else png(photo(number)))
    photo(0, (1, 500_000)).save(root / "cat/38.png")  # too long to be made a square
    return root


def test_rows_are_verified_beforehand_as_files_are(tmp_path: Path) -> None:
    """The same images are left out and named, and so the same batches follow."""
    root = spoiled(tmp_path / "photos")
    given: dict[str, Any] = {"image_size": 32, "batch_size": 6, "num_workers": 0, "val_fraction": 0.3}
    given["max_bad_share"] = 0.2
    folder = ImageFolderDataModule(root, report=tmp_path / "folder.jsonl", **given)
    rows = HuggingFaceDataModule(
        "imagefolder", data_dir=str(root), label="label", verify=True, report=tmp_path / "rows.jsonl", **given
    )
    first: dict[str, list[Any]] = {}
    for name, data in (("folder", folder), ("rows", rows)):
        with pytest.warns(UserWarning, match=r"Left out \d of \d+ (images that cannot|rows that cannot be used)"):
            data.setup("fit")
        torch.manual_seed(0)
        first[name] = [*data.train_dataloader(), *data.val_dataloader()]
        assert len(read_faults(tmp_path / f"{name}.jsonl")) == 3
    assert sum(len(batch["image"]) for batch in first["rows"]) >= 31
    for one, two in zip(first["folder"], first["rows"], strict=True):
        for key in ("image", "label", "original_size"):
            assert torch.equal(one[key], two[key])
    reasons = [sorted(read_faults(tmp_path / f"{name}.jsonl").values()) for name in first]
    assert [[reason[:30] for reason in found] for found in reasons] == [[reason[:30] for reason in reasons[0]]] * 2
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 3
    given["verify"] = True
    for options, message in (
        ({"on_error": "raise"}, r"row \d+ cannot be read"),
        ({"max_bad_share": 0.01}, "more than"),
    ):
        with pytest.raises(ValueError, match=message):
            HuggingFaceDataModule("imagefolder", data_dir=str(root), **(given | options)).setup("fit")
    with pytest.raises(ValueError, match=r"`verify` decodes images beforehand, and `streaming` does not"):
        module(str(root), verify=True, streaming=True)


def test_a_row_s_key_tells_tables_apart_wherever_they_lie(tmp_path: Path) -> None:
    table(range(20)).save_to_disk(tmp_path / "one")

    def keys(data: Any, **options: Any) -> list[str]:
        rows = module(str(data), val_split="train", **options).dataset("val")
        return [rows.key(index) for index in range(len(rows))]

    own = keys(tmp_path / "one")
    assert len(set(own)) == 20
    table(range(20)).save_to_disk(tmp_path / "again", num_shards=3)
    table(range(20)).select(range(20)).to_parquet(tmp_path / "again.parquet")
    assert keys(tmp_path / "again") == own
    assert keys("parquet", data_files=str(tmp_path / "again.parquet")) == own
    assert keys("parquet", data_files=str(tmp_path / "again.parquet"), caption="texts") != own

    def other(place: int, column: str, value: Any) -> Any:
        rows = table(range(20)).to_list()
        rows[place][column] = value
        return datasets.Dataset.from_list(rows, features=table(range(1)).features)

    changed = {
        "image": other(9, "image", {"bytes": png(photo(9)) + b"\0", "path": None}),  # not among those looked at
        "name": other(7, "image", {"bytes": png(photo(7)), "path": "7.png"}),
        "content": other(0, "image", {"bytes": png(photo(0))[:-1] + b"\1", "path": None}),
        "label": other(7, "label", 2),
        "caption": other(7, "text", "photo 8"),
        "shorter": table(range(19)),
        "moved": table([*range(10, 20), *range(10)]),
    }
    for name, data in changed.items():
        data.save_to_disk(tmp_path / name)
        assert not set(keys(tmp_path / name)) & set(own), name


def test_a_folder_s_rows_keep_their_keys_where_it_is_moved(tmp_path: Path) -> None:
    root = spoiled(tmp_path / "photos")

    def key(root: Path) -> str:
        return HuggingFaceDataModule(str(root), 8, label="label", num_workers=0).dataset("train").key(0)

    own = key(root)
    assert key(root.rename(tmp_path / "elsewhere")) == own
    (tmp_path / "elsewhere/cat/0.png").rename(tmp_path / "elsewhere/cat/00.png")
    assert key(tmp_path / "elsewhere") != own


def test_rows_that_say_the_same_are_named_and_count_once(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(20):
        photo(number).save(root / f"{number}.png")
    said = [(number, f"photo {number}") for number in range(20)] + [(3, "photo 3"), (4, "another"), (3, "photo 3")]
    lines = [json.dumps({"file_name": f"{number}.png", "text": text}) for number, text in said]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {"label": None, "val_split": "train", "report": tmp_path / "out/report.jsonl"}
    data = module("imagefolder", data_dir=str(root), **options)
    with pytest.warns(UserWarning, match=r"Left out 2 of 23 rows that say what another does"):
        found = captions(data.val_dataloader())
    assert sorted(found) == sorted([*(f"photo {number}" for number in range(20)), "another"])
    named = read_faults(tmp_path / "out/report.jsonl")
    assert {name.rpartition(", ")[2]: why for name, why in named.items()} == dict.fromkeys(
        ("row 20", "row 22"), "it says what row 3 does"
    )
    with pytest.warns(UserWarning, match=r"Left out 2 of 23 rows"):
        again = captions(module("imagefolder", data_dir=str(root), max_bad_share=0, **options).val_dataloader())
    assert again == found, "nothing is lost with them"
    with pytest.raises(ValueError, match=r"row 20 cannot be read \(it says what row 3 does\)"):
        module("imagefolder", data_dir=str(root), on_error="raise", **options).setup("fit")


@pytest.mark.parametrize("is_relative", [False, True])
def test_rows_of_one_path_are_in_one_split_and_count_once(tmp_path: Path, is_relative: bool) -> None:
    """Two captions of each image, one of them twice; the images as strings."""
    for number in range(30):
        photo(number).save(tmp_path / f"{number}.png")
    place = "./" if is_relative else f"{tmp_path}/"
    rows = [(f"{place}{number}.png", f"{kind} {number}") for number in range(30) for kind in ("first", "second")]
    rows += [(f"{number}.png" if is_relative else f"{place}{number}.png", f"first {number}") for number in range(3)]
    files, texts = zip(*rows, strict=True)
    datasets.Dataset.from_dict({"image": files, "text": texts}).to_parquet(tmp_path / "a.parquet")
    options: dict[str, Any] = {"data_files": str(tmp_path / "a.parquet"), "label": None, "val_fraction": 0.3}
    data = module("parquet", image_folder=tmp_path if is_relative else None, batch_size=1, **options)
    with pytest.warns(UserWarning, match=r"Left out 3 of 63 rows that say what another does"):
        train, val = captions(data.train_dataloader()), captions(data.val_dataloader())
    assert sorted(train + val) == sorted(texts[:60])
    of_train, of_val = ({text.split()[1] for text in found} for found in (train, val))
    assert len(of_val) > 1
    assert not of_train & of_val
    assert val == [text for text in texts[:60] if text in val], "in the order of the table"


@pytest.mark.parametrize("place", [0, 60])
@pytest.mark.parametrize("bad", [None, "", "https://example.org/1.png", "../1.png"])
@pytest.mark.parametrize("stored", ["texts", "images"])
def test_a_row_without_a_path_leaves_the_others_split_by_theirs(
    tmp_path: Path, stored: str, bad: str | None, place: int
) -> None:
    """Two captions of each image, one of them twice, and one more row: the split of the others is as without it."""
    rows: list[tuple[str | None, str]] = [
        (f"{n}.png", f"{kind} {n}") for n in range(30) for kind in ("first", "second")
    ]
    rows += [("3.png", "first 3")]

    def split(rows: list[tuple[str | None, str]], name: str) -> list[set[str]]:
        files, texts = zip(*rows, strict=True)
        images = files if stored == "texts" else [{"bytes": None, "path": file} for file in files]
        datasets.Dataset.from_dict({"image": images, "text": texts}).to_parquet(tmp_path / name)
        options: dict[str, Any] = {"label": None, "val_fraction": 0.3, "image_folder": tmp_path / "photos"}
        source = module("parquet", data_files=str(tmp_path / name), **options)
        with pytest.warns(UserWarning, match=rf"Left out 1 of {len(rows)} rows that say what another does"):
            found = [source.dataset("train"), source.dataset("val")]
        return [{texts[row] for row in part.rows} - {"bad"} for part in found if isinstance(part, RowsDataset)]

    train, val = split([*rows[:place], (bad, "bad"), *rows[place:]], "bad.parquet")
    assert {text.split()[1] for text in train}.isdisjoint(text.split()[1] for text in val)
    assert [train, val] == split(rows, "good.parquet")


def test_labels_that_a_table_keeps_as_floats(tmp_path: Path) -> None:
    labels = [0.0, 2.0, None, 1.5, float("nan"), 1.0]
    rows = {"image": [png(photo(number)) for number in range(6)], "label": labels}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    data = module(
        "parquet",
        data_files=str(tmp_path / "a.parquet"),
        val_split="train",
        caption=None,
        classes=3,
        report=tmp_path / "report.jsonl",
        max_bad_share=1.0,
    )
    assert [batch["label"].tolist() for batch in data.val_dataloader()] == [[0, 2, 1, 1], [1, 1]]
    reasons = list(read_faults(tmp_path / "report.jsonl").values())
    assert reasons == ["no label", *(f"label {bad} is neither a class nor an index below 3" for bad in (1.5, "nan"))]


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


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_that_are_given_for_a_column_that_says_how_many(tmp_path: Path, streaming: bool) -> None:
    """Its numbers are named then, as are those of the other splits; the same names twice do no harm either."""
    numbers = datasets.ClassLabel(num_classes=3)
    table(range(6)).cast_column("label", numbers).save_to_disk(tmp_path / "numbers")
    table(range(6)).save_to_disk(tmp_path / "names")
    options: dict[str, Any] = {"val_split": "train", "streaming": streaming}
    given: list[tuple[str, Any, str]] = [("numbers", ["dog", "cow", "cat"], "dog"), ("names", [*CLASSES], "cat")]
    for name, classes, first in [*given, ("names", 3, "0")]:
        data = module(str(tmp_path / name), classes=classes, **options)
        assert next(iter(data.val_dataloader()))["label"].tolist() == [0, 1, 2, 0]
        assert data.class_names[0] == first


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
    lines = [json.dumps({"file": f"{number}.png", "text": f"photo {number}"}) for number in range(4)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {"data_files": str(tmp_path / "b.jsonl"), "val_split": "train", "image": "file"}
    data = module("json", label=None, image_folder=tmp_path, **options)
    assert captions(data.val_dataloader()) == [f"photo {number}" for number in range(4)]
    with pytest.raises(ValueError, match=r"None of 4 items can be read.*No such file or directory: '0\.png'"):
        captions(module("json", label=None, **options).val_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "class"}, r"must be columns of the data, but class is not among image, label, text, texts"),
        ({"image": "photo"}, r"but photo is not among"),
        ({"caption": ["text", "caption"]}, r"but caption is not among"),
        ({"label": "texts"}, r"`label` must be a column of whole numbers or names, but texts holds"),
        ({"caption": ["text", "label"]}, r"`caption` must be columns of strings or lists of strings, but label holds"),
        ({"image": "label"}, r"`image` must be a column of images or of paths, but label holds"),
        ({"image": "texts"}, r"`image` must be a column of images or of paths, but texts holds"),
        ({"images_per_epoch": 8}, r"`images_per_epoch` is for `streaming`"),
        ({"revision": "v7", "name": "en"}, r"saved is what `save_to_disk` wrote, which name, revision cannot choose"),
        ({"split": "dev"}, r"no split 'dev' in .*saved, which has train, val"),
        ({"val_split": "val"}, r"The split val must have the classes cat, cow, dog, not a, b"),
        ({"val_split": "val", "classes": 3}, r"The split val must have the classes cat, cow, dog, not a, b"),
        ({"val_split": "val", "classes": [*CLASSES]}, r"The split val must have the classes cat, cow, dog, not a, b"),
        ({"classes": 2, "val_split": "train"}, r"`classes` must be the 3 of the column label, got 2"),
        ({"classes": ["dog", "cow", "cat"]}, r"`classes` must be those of .*, cat, cow, dog, got dog, cow, cat: its"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    val = table(range(2)).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    datasets.DatasetDict({"train": table(range(4)), "val": val}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        module(str(tmp_path / "saved"), **options).setup("fit")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("/no/such/folder", {}, r"`path`='/no/such/folder' cannot be loaded .*FileNotFoundError: .*Give a folder"),
        ("parquet", {}, r"`path`: parquet needs files that it is to read: give `data_files` or `data_dir`"),
        ("parquet", {"data_files": "/no.parquet"}, r"`path`='parquet' cannot be loaded .*/no\.parquet"),
        ("FOLDER/empty", {}, r"cannot be loaded as a data set \(EmptyDatasetError"),
        ("parquet", {"data_files": {"dev": "FOLDER/a.parquet"}}, r"Unknown split \"train\".*and a split that it has"),
        ("FOLDER/none", {}, r"cannot be loaded as a data set|There must be train images"),
        ("parquet", {"data_files": "FOLDER/a.parquet", "label": "nothing"}, r"but nothing holds none in 3 rows"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_error(
    tmp_path: Path, path: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    table(range(3)).add_column("nothing", [None] * 3, feature=datasets.Value("string")).to_parquet(
        tmp_path / "a.parquet"
    )
    table(range(3)).select(()).save_to_disk(tmp_path / "none", num_shards=1)
    given = json.loads(json.dumps([path, options]).replace("FOLDER", str(tmp_path)))
    with pytest.raises(ValueError, match=message):
        module(given[0], **given[1]).setup("fit")


def test_pickles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`path`: pandas reads pickles, which may run code"):
        module("pandas", data_files="a.pkl")


def test_a_folder_of_one_split_has_no_other(tmp_path: Path) -> None:
    table(range(4)).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"holds one split, but 'val' is asked for too"):
        module(str(tmp_path / "saved"), val_split="val").setup("fit")


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lpl-lightning\[data\]"'):
        module(str(tmp_path)).setup("fit")


COUNTS = """---
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: int64}
  - {name: text, dtype: string}
  splits:
  - {name: train, num_bytes: 1, num_examples: 8}
  - {name: validation, num_bytes: 1, num_examples: 40}
configs:
- config_name: default
  data_files:
  - {split: train, path: train.parquet}
  - {split: validation, path: validation.parquet}
---
"""


def test_what_a_card_counts_is_believed_of_training_alone(tmp_path: Path) -> None:
    for name, numbers in (("train", range(20)), ("validation", range(20, 32))):
        rows = table(numbers).cast_column("label", datasets.Value("int64"))
        rows.select_columns(["image", "label", "text"]).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text(COUNTS)
    data = module(str(tmp_path), val_split="validation", streaming=True, classes=3)
    assert captions(data.val_dataloader()) == [f"photo {number}" for number in range(20, 32)]
    assert len(captions(data.train_dataloader())) == 8
    data.count_all()
    assert len(data.dataset("train")) == 20


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ['{}', 'a.png']\n---\n"


@pytest.mark.parametrize("name", ["../secret/*.png", "{folder}/secret/*.png", "https://example.org/a.png"])
def test_a_card_of_a_data_set_that_leads_elsewhere(name: str, tmp_path: Path, ran: Path) -> None:
    for folder in ("secret", "data"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / folder / "a.png")
    name = name.format(folder=tmp_path)
    (tmp_path / "data" / "README.md").write_text(CARD.format(name))
    refused(
        ran, "README.md cannot be used: it names", lambda: HuggingFaceDataModule(str(tmp_path / "data"), 16).setup()
    )


def test_a_saved_table_that_leads_elsewhere(tmp_path: Path, ran: Path) -> None:
    rows = table(range(4))
    rows.save_to_disk(tmp_path / "secret")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "data")
    state = tmp_path / "data" / "train" / "state.json"
    said = json.loads(state.read_text())
    said["_data_files"] = [{"filename": "../../secret/" + said["_data_files"][0]["filename"]}]

    def load() -> None:
        HuggingFaceDataModule(str(tmp_path / "data"), 16).setup()

    load()
    kept = state.read_text()
    state.write_text(json.dumps(said))
    refused(ran, "state.json cannot be used: it names '../../secret/", load)
    state.write_text(kept)
    (tmp_path / "data" / "dataset_dict.json").write_text(json.dumps({"splits": ["../secret"]}))
    refused(ran, "dataset_dict.json cannot be used: it names '../secret'", load)


def test_rows_that_lead_out_of_the_folder_of_images(tmp_path: Path, ran: Path) -> None:
    for folder in ("secret", "images"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / folder / "a.png")
    for rows in (["../secret/a.png"] * 2, [str(tmp_path / "secret" / "a.png")] * 2):
        datasets.Dataset.from_dict({"image": rows, "n": [0, 1]}).to_parquet(str(tmp_path / "rows.parquet"))
        files, images = str(tmp_path / "rows.parquet"), str(tmp_path / "images")

        def first(files: str = files, images: str = images) -> object:
            data = HuggingFaceDataModule("parquet", 16, data_files=files, image_folder=images)
            data.setup("fit")
            return data.dataset("train")[0]

        refused(ran, "leads out of `image_folder`", first)
