"""Captions in Parquet, and tables that lie elsewhere than with the images."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lpl_lightning.data import ImageFolderDataModule

pytest.importorskip("pyarrow")
pa: Any = import_module("pyarrow")
pq: Any = import_module("pyarrow.parquet")


def folder_of(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


def captions_of(root: Path, **options: Any) -> dict[str, list[str]]:
    """All captions of each image, as the data set of the training images holds them."""
    module = ImageFolderDataModule(root, 8, num_workers=0, captions="metadata", val_root=root, **options)
    dataset = module.dataset("train")
    assert dataset.captions is not None
    names = [Path(path).relative_to(root).as_posix() for path, _ in dataset.files]
    return dict(zip(names, map(list, dataset.captions), strict=True))


def write(root: Path, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(pa.table(columns), root / "metadata.parquet", **options)


def test_a_parquet_table(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "cat/b.png", "cat/c.png")
    # Dictionary-encoded text, as other writers have it, in several row groups, and a column that must not be read.
    write(
        tmp_path,
        {
            "text": pa.array(["one", "zwei Kätzchen ", "three", "four"]).dictionary_encode(),
            "file_name": ["cat/b.png", "./a.png", "cat/c.png", "cat/b.png"],
            "image": [b"\x00" * 1000] * 4,
        },
        row_group_size=2,
    )
    assert captions_of(tmp_path) == {"a.png": ["zwei Kätzchen"], "cat/b.png": ["one", "four"], "cat/c.png": ["three"]}


def test_lists_and_several_columns_are_several_captions(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "b.png")
    write(tmp_path, {"file_name": ["a.png", "b.png"], "many": [["x", " y"], []], "one": [None, "z"]})
    assert captions_of(tmp_path, caption_column=["one", "many"]) == {"a.png": ["x", "y"], "b.png": ["z"]}


def test_one_parquet_table_serves_the_folders_below(tmp_path: Path) -> None:
    folder_of(tmp_path, "train/a.png", "val/a.png")
    write(tmp_path, {"file_name": ["train/a.png", "val/a.png"], "text": ["one", "two"]})
    assert captions_of(tmp_path / "train") == {"a.png": ["one"]}
    assert captions_of(tmp_path / "val") == {"a.png": ["two"]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a.png"], "text": ["x"]}, r"row 1, must name its image in the column `file_name`.*path, text"),
        ({"file_name": ["a.png"], "caption": ["x"]}, r"must have the columns of `caption_column`, but text is not"),
        ({"file_name": ["a.png"], "text": [3]}, r"parquet, row 1, must have a string, a list of strings or nothing"),
        ({"file_name": ["a.png"], "text": [b"x"]}, r"must have a string, a list of strings or nothing.*got b'x'"),
        ({"file_name": ["a.png", "b.png"], "text": ["x", "y"]}, r"must name files that are there, but 1 .*b\.png"),
        ({"file_name": ["a.png", None], "text": ["x", "y"]}, r"row 2, must name its image .*got None"),
    ],
)
def test_wrong_parquet_tables_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    folder_of(tmp_path, "a.png")
    write(tmp_path, columns)
    with pytest.raises(ValueError, match=message):
        captions_of(tmp_path)


def test_damaged_parquet_tables_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png")
    write(tmp_path, {"file_name": ["a.png"] * 1000, "text": [str(n) for n in range(1000)]})
    path = tmp_path / "metadata.parquet"
    content = path.read_bytes()
    for damaged in (b"", b"text", content[:-10], content[:200] + b"\0" * 100 + content[300:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"metadata\.parquet must be a Parquet file, but cannot be read as one"):
            captions_of(tmp_path)


def test_a_parquet_table_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, "a.png")
    write(tmp_path, {"file_name": ["a.png"], "text": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match=r'metadata\.parquet needs pyarrow: run pip install "lpl-light'):
        captions_of(tmp_path)


def test_two_tables_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png")
    write(tmp_path, {"file_name": ["a.png"], "text": ["x"]})
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    with pytest.raises(ValueError, match=r"must hold one table .*metadata\.csv, .*metadata\.parquet"):
        captions_of(tmp_path)


def test_a_table_may_lie_elsewhere(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", "a.png", "cat/b.png")
    (tmp_path / "captions").mkdir()
    rows = [{"file_name": "cat/b.png", "text": "new b"}, {"file_name": "a.png", "text": "new a"}]
    (tmp_path / "captions" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "metadata.csv").write_text("file_name,text\na.png,old a\ncat/b.png,old b\n")
    assert captions_of(root, caption_folder=tmp_path / "captions") == {"a.png": ["new a"], "cat/b.png": ["new b"]}
    assert captions_of(root) == {"a.png": ["old a"], "cat/b.png": ["old b"]}

    # Validation images of another folder keep their own table.
    val = folder_of(tmp_path / "val", "c.png")
    (val / "metadata.csv").write_text("file_name,text\nc.png,old c\n")
    module = ImageFolderDataModule(
        root, 8, val_root=val, num_workers=0, captions="metadata", caption_folder=tmp_path / "captions"
    )
    assert list(module.validation_captions()) == ["old c"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_table_elsewhere_serves_folders_beside_each_other(tmp_path: Path, order: int) -> None:
    """As ``lpl caption photos --out captions`` writes it for ``photos/train`` and its like."""
    names = ["train/1.png", "train/deep/2.png", "val/1.png", "held/1.png"]
    photos = folder_of(tmp_path / "photos", *names)
    (tmp_path / "captions").mkdir()
    rows = [json.dumps({"file_name": name, "text": f"of {name}"}) + "\n" for name in names[::order]]
    (tmp_path / "captions" / "metadata.jsonl").write_text("".join(rows))
    place = tmp_path / "captions"
    assert captions_of(photos / "train", caption_folder=place) == {
        "1.png": ["of train/1.png"],
        "deep/2.png": ["of train/deep/2.png"],
    }
    (photos / "metadata.jsonl").write_text('{"file_name": "val/1.png", "text": "old"}\n')
    train, val, held = (photos / name for name in ("train", "val", "held"))
    data = ImageFolderDataModule(train, 8, val, test_root=held, captions="metadata", caption_folder=place)
    assert list(data.validation_captions()) == ["of val/1.png"]
    assert data.dataset("test").captions == [("of held/1.png",)]
    (photos / "train" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"but 1 in .* are not: train/1\.png\. Paths are relative to \S*photos;"):
        captions_of(photos / "train", caption_folder=place)


def test_a_place_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`caption_folder`='x' needs `captions`: metadata, got 'sidecar'"):
        ImageFolderDataModule(tmp_path, 8, captions="sidecar", caption_folder="x")


def test_wrong_places_of_tables_are_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", "a.png")
    with pytest.raises(FileNotFoundError, match=r"`caption_folder` must hold a table of captions, but none of"):
        captions_of(root, caption_folder=tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}\n')
    with pytest.raises(ValueError, match=r"must name files that are there, but 1 .*Paths are relative to .*photos"):
        captions_of(root, caption_folder=tmp_path)
