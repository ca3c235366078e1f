from __future__ import annotations

import csv
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from PIL import Image

from lpl_lightning.data import ImageFolderDataModule, ImageFolderDataset
from lpl_lightning.data.base import Split
from lpl_lightning.data.faults import read_faults


def folder_of(root: Path, *names: str) -> Path:
    """Images, each of another grey."""
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (level, level, level)).save(root / name)
    return root


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def open_module(root: Path, captions: Any = "metadata", **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(root, image_size=8, num_workers=0, captions=captions, **options)


def captions_of(root: Path, captions: Any = "metadata", **options: Any) -> dict[str, list[str]]:
    """All captions of each image, as the data set holds them."""
    dataset = open_module(root, captions, val_root=root, **options).dataset("train")
    assert dataset.captions is not None
    names = [Path(path).relative_to(root).as_posix() for path, _ in dataset.files]
    return dict(zip(names, map(list, dataset.captions), strict=True))


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# Where captions are


def test_text_files_beside_images(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "cat/b.JPG", "cat/deep/er/c.d.png", ".hidden/x.png")
    write(tmp_path / "a.txt", "one\n\n  two \t\n")
    write(tmp_path / "cat/b.txt", "\ufeffein Kätzchen\r\nzwei\u2028halbe\r\n")
    write(tmp_path / "cat/deep/er/c.d.txt", "no line end")
    assert captions_of(tmp_path, "sidecar") == {
        "a.png": ["one", "two"],
        "cat/b.JPG": ["ein Kätzchen", "zwei\u2028halbe"],
        "cat/deep/er/c.d.png": ["no line end"],
    }


def test_a_csv_table(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "cat/b.png", "cat/c d.png")
    write(
        tmp_path / "metadata.csv",
        '\ufefflicense,text,file_name\r\nMIT,"one, or ""1""",a.png\r\nMIT,two,./cat/b.png\r\n'
        'MIT,"of\ntwo lines",cat/c d.png\r\nMIT, three ,cat//b.png\r\n',
    )
    assert captions_of(tmp_path) == {
        "a.png": ['one, or "1"'],
        "cat/b.png": ["two", "three"],
        "cat/c d.png": ["of\ntwo lines"],
    }


def test_a_jsonl_table(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "cat/b.png", "cat/c.png")
    table = jsonl(
        {"file_name": "a.png", "prompt": "ein Kätzchen\u2028", "width": 8},
        {"file_name": "cat/b.png", "prompt": ["two", None, " ", "three"]},
        {"file_name": "cat/c.png", "prompt": "four"},
        {"file_name": "cat/b.png", "prompt": "five"},
    )
    write(tmp_path / "metadata.jsonl", table + "\n\n")
    assert captions_of(tmp_path, caption_column="prompt") == {
        "a.png": ["ein Kätzchen"],
        "cat/b.png": ["two", "three", "five"],
        "cat/c.png": ["four"],
    }


def test_several_columns_are_several_captions(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "b.png")
    write(tmp_path / "metadata.csv", "file_name,x,y,z\na.png,1,2,3\nb.png,,5,6\n")
    assert captions_of(tmp_path, caption_column=["z", "x"]) == {"a.png": ["3", "1"], "b.png": ["6"]}


def test_one_table_serves_the_folders_below(tmp_path: Path) -> None:
    folder_of(tmp_path, "train/a.png", "train/deep/b.png", "val/a.png", "train2/a.png", "other/a.png")
    lines = ["file_name,text", "train/a.png,ta", "train/deep/b.png,tb", "val/a.png,va", "train2/a.png,other"]
    write(tmp_path / "metadata.csv", "\n".join([*lines, "gone/a.png,of a folder that was not unpacked"]))
    data = open_module(tmp_path / "train", val_root=tmp_path / "val")
    train, val = data.dataset("train"), data.dataset("val")
    assert [train[i]["caption"] for i in range(2)] == ["ta", "tb"]
    assert [val[i]["caption"] for i in range(len(val))] == ["va"]
    # A table in the folder itself comes first.
    write(tmp_path / "val/metadata.csv", "file_name,text\na.png,own")
    assert captions_of(tmp_path / "val") == {"a.png": ["own"]}


def test_rows_of_files_that_are_no_images_to_be_read_are_passed_over(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", ".hidden/b.png")
    write(tmp_path / "clip.mp4", "film")
    write(tmp_path / "metadata.csv", "file_name,text\na.png,one\nclip.mp4,two\n.hidden/b.png,three\n")
    assert captions_of(tmp_path) == {"a.png": ["one"]}


# What batches hold


def test_a_captioned_folder_has_no_classes(tmp_path: Path) -> None:
    folder_of(tmp_path, "cat/a.png", "dog/b.png", "c.png")
    for name in ("cat/a", "dog/b", "c"):
        write(tmp_path / f"{name}.txt", name)
    data = open_module(tmp_path, "sidecar", val_root=tmp_path, batch_size=3)
    data.setup("fit")
    assert data.has_captions
    assert data.class_names == ()
    assert data.num_classes == 0
    (batch,) = data.train_dataloader()
    assert batch.keys() == {"image", "original_size", "crop_top_left", "caption"}
    levels = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert [["cat/a", "dog/b", "c"][level] for level in levels] == batch["caption"]
    assert not ImageFolderDataModule(tmp_path, 8).has_captions


def test_training_draws_a_caption_and_others_take_the_first(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png")
    write(tmp_path / "a.txt", "one\ntwo\nthree")
    data = open_module(tmp_path, "sidecar", val_root=tmp_path, test_root=tmp_path)
    counts = Counter(data.dataset("train")[0]["caption"] for _ in range(300))
    assert counts.keys() == {"one", "two", "three"}
    assert all(60 < count < 140 for count in counts.values())  # 100 expected, a standard deviation of 8
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append([data.dataset("train")[0]["caption"] for _ in range(20)])
    assert drawn[0] == drawn[1]
    for split in ("val", "test"):
        assert {data.dataset(split)[0]["caption"] for _ in range(20)} == {"one"}


def test_workers_load_captions(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(5)]
    folder_of(tmp_path, *names)
    write(tmp_path / "metadata.jsonl", jsonl(*({"file_name": n, "text": [n, n]} for n in names)))
    data = ImageFolderDataModule(
        tmp_path, 8, val_root=tmp_path, batch_size=3, num_workers=1, captions="metadata", num_generate=7
    )
    data.setup("fit")
    first, second = data.val_dataloader()
    assert isinstance(first["caption"], list)
    assert sorted(first["caption"] + second["caption"]) == names
    assert first["original_size"].tolist() == [[8, 8]] * 3


def test_held_out_images_keep_their_captions(tmp_path: Path) -> None:
    names = [f"{c}/{i}.png" for c in "ab" for i in range(20)]
    folder_of(tmp_path, *names)
    write(tmp_path / "metadata.csv", "file_name,text\n" + "".join(f"{name},of {name}\n" for name in names))
    data = open_module(tmp_path, val_fraction=0.3)
    seen = []
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        dataset = data.dataset(split)
        found = [dataset[i]["caption"] for i in range(len(dataset))]
        assert found == [f"of {Path(path).relative_to(tmp_path).as_posix()}" for path, _ in dataset.files]
        seen += found
    assert sorted(seen) == sorted(f"of {name}" for name in names)


def test_captions_of_unreadable_images_go_with_them(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "c.png")
    write(tmp_path / "b.png", "not an image")
    for name in "abc":
        write(tmp_path / f"{name}.txt", name)
    data = open_module(tmp_path, "sidecar", val_root=tmp_path, max_bad_share=0.5)
    with pytest.warns(UserWarning, match=r"Left out 1 of 3 images"):
        data.setup("fit")
    train = data.dataset("train")
    assert [train[i]["caption"] for i in range(2)] == ["a", "c"]


def test_captions_are_asked_for_without_decoding(tmp_path: Path) -> None:
    for i in range(12):
        write(tmp_path / f"{i}.png", "no image")
        write(tmp_path / f"{i}.txt", f"{i}\nanother")
    data = open_module(tmp_path, "sidecar", val_fraction=0.2, num_generate=7, batch_size=99, verify=False)
    data.setup("predict")
    (requests,) = data.predict_dataloader()
    files = [Path(path).stem for path, _ in data.dataset("val").files]
    assert 1 < len(files) < 7
    assert data.sample_captions(2) == files[:2]
    assert data.sample_captions(15) == [files[i % len(files)] for i in range(15)]
    assert requests["caption"] == data.sample_captions(7)
    assert requests["label"].tolist() == [0] * 7


def test_prompts_replace_captions(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "b.png")
    write(tmp_path / "p.txt", "first\nsecond")
    plain = ImageFolderDataModule(tmp_path, 8, num_generate=3, prompts=str(tmp_path / "p.txt"))
    assert next(iter(plain.predict_dataloader()))["caption"] == ["first", "second", "first"]
    # No image here has a caption, and none is looked for.
    captioned = open_module(tmp_path, "sidecar", num_generate=3, prompts=tmp_path / "p.txt")
    captioned.setup("predict")
    assert next(iter(captioned.predict_dataloader()))["caption"] == ["first", "second", "first"]


# Images without captions


def seven_without(root: Path) -> Path:
    """Ten images, of which three have a caption."""
    folder_of(root, *(f"{i}.png" for i in range(10)))
    for i in (0, 4, 5):
        write(root / f"{i}.txt", f"caption {i}")
    write(root / "1.txt", " \n\n")
    rows = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in (0, 4, 5)]
    write(root / "metadata.jsonl", jsonl(*rows, {"file_name": "1.png", "text": ""}, {"file_name": "2.png"}))
    return root


@pytest.mark.parametrize("source", ["sidecar", "metadata"])
def test_images_without_a_caption_are_refused_at_once(tmp_path: Path, source: str) -> None:
    data = open_module(seven_without(tmp_path), source, val_fraction=0.3)
    message = r"7 of 10 images have no caption: .*[^ ]+\.png.* and 2 more\. .*`missing_captions` to skip .* to empty"
    with pytest.raises(ValueError, match=message) as caught:
        data.setup("fit")
    assert str(caught.value).count(".png") == 5
    with pytest.raises(ValueError, match=r"images have no caption"):
        data.sample_captions(3)


@pytest.mark.parametrize("source", ["sidecar", "metadata"])
def test_images_without_a_caption_are_skipped_if_asked(tmp_path: Path, source: str) -> None:
    found = captions_of(seven_without(tmp_path), source, missing_captions="skip")
    assert found == {f"{i}.png": [f"caption {i}"] for i in (0, 4, 5)}
    # Those left are divided: none of them has a hash below this.
    data = open_module(tmp_path, source, missing_captions="skip", val_fraction=1e-6)
    assert [len(data.dataset(split)) for split in ("train", "val")] == [2, 1]


@pytest.mark.parametrize("source", ["sidecar", "metadata"])
def test_images_without_a_caption_get_an_empty_one_if_asked(tmp_path: Path, source: str) -> None:
    found = captions_of(seven_without(tmp_path), source, missing_captions="empty")
    assert found == {f"{i}.png": [f"caption {i}" if i in (0, 4, 5) else ""] for i in range(10)}


def test_a_folder_of_which_all_would_be_skipped_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "b.png")
    with pytest.raises(ValueError, match=r"`root` must hold images with captions, but none of the 2 in .* has one"):
        open_module(tmp_path, "sidecar", missing_captions="skip").setup("fit")


def test_only_the_splits_of_a_stage_need_captions(tmp_path: Path) -> None:
    folder_of(tmp_path, "train/a.png", "test/b.png")
    write(tmp_path / "test/b.txt", "b")
    data = open_module(tmp_path / "train", "sidecar", val_root=tmp_path / "train", test_root=tmp_path / "test")
    data.setup("test")
    assert data.dataset("test")[0]["caption"] == "b"
    with pytest.raises(ValueError, match=r"1 of 1 images have no caption: .*a\.png"):
        data.setup("fit")


# Files that are wrong


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "file_name,text\na.png,one\nb.png,two\nc.png,three\n", r"csv must name .* 2 in .*: b\.png, c"),
        ("metadata.jsonl", jsonl({"file_name": "x/a.png", "text": "one"}), r"jsonl must name files .* 1 .*: x/a\.png"),
        ("metadata.csv", "file_name,caption\na.png,one\n", r"`caption_column`, but text is not .*file_name, caption"),
        ("metadata.csv", "file_name,text\n", r"but text is not among its columns, for it has no rows"),
        (
            "metadata.csv",
            "name,text\na.png,one\n",
            r"line 2, must name its image in the column `file_name`.*name, text",
        ),
        ("metadata.csv", "file_name,text\n,one\n", r"line 2, must name its image in the column `file_name`, got ''"),
        ("metadata.csv", "file_name,text\na.png,a cat, asleep\n", r"line 2, has more fields .*Quote captions"),
        (
            "metadata.csv",
            'file_name,text\na.png,"a cat\nb.png,two\nc.png,"three"\n',
            r"must be CSV, but the row that begins in line 2",
        ),
        ("metadata.jsonl", '\n{"file_name": \n', r"line 2, must be JSON, but is not"),
        ("metadata.jsonl", '["a.png", "one"]\n', r"line 1, must be a JSON object such as"),
        ("metadata.jsonl", jsonl({"file_name": "a.png", "text": 5}), r"line 1, must have a string.*`text`, got 5"),
        ("metadata.jsonl", jsonl({"file_name": "a.png", "text": "cat \ud83d"}), r"line 1, has half a character"),
        ("metadata.jsonl", jsonl({"file_name": "a.png", "prompt": "one"}), r"but text is not among file_name, prompt"),
        ("metadata.csv", "file_name,text,text\na.png,one,\n", r"must name each column once, but has text several"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", r"csv must be UTF-8 text, but its byte 24 .*`iconv"),
        ("metadata.jsonl", '{"file_name": "a.png"}'.encode("utf-16"), r"jsonl must be UTF-8 text, but its byte 0 "),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    folder_of(tmp_path, "a.png")
    write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        captions_of(tmp_path)


def test_a_text_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png")
    write(tmp_path / "a.txt", b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt must be UTF-8 text, but its byte 3 is not.* Save it as UTF-8"):
        captions_of(tmp_path, "sidecar")


def test_folders_in_the_place_of_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, "a.png")
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "metadata.csv").mkdir()
    for source, name in (("sidecar", "a.txt"), ("metadata", "metadata.csv")):
        with pytest.raises(ValueError, match=rf"{name} must be a text file, but is none"):
            captions_of(tmp_path, source)

    def refuse(place: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr("os.scandir", refuse)  # whoever runs the tests may read all
    with pytest.raises(ValueError, match=rf"The folder {tmp_path} may not be read"):
        captions_of(tmp_path, "sidecar")


# What comes twice


def test_images_beside_one_text_file_are_named_and_the_first_counts(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", *(f"{i}.png" for i in range(9)), "cat/1.png", "1.webp", "1.x.png", "8.webp")
    for name in [*(f"{i}.txt" for i in range(8)), "cat/1.txt", "1.x.txt"]:
        write(root / name, name)
    report = tmp_path / "bad.jsonl"
    options: dict[str, Any] = {"missing_captions": "empty", "report": report}
    with pytest.warns(UserWarning, match=r"Left out 1 of 13 images whose text file is another's too: .*1\.webp"):
        found = captions_of(root, "sidecar", **options)
    assert found.keys() == {*(f"{i}.png" for i in range(9)), "cat/1.png", "1.x.png", "8.webp"}
    assert read_faults(report) == {str(root / "1.webp"): f"its text file is that of {root / '1.png'} too"}
    with pytest.raises(ValueError, match=r"1\.webp cannot be read \(its text file is that of .*1\.png too\)"):
        captions_of(root, "sidecar", on_error="raise", **options)
    with pytest.raises(ValueError, match=r"1 of 13 items cannot be read, more than `max_bad_share`"):
        captions_of(root, "sidecar", max_bad_share=0.05, **options)


def test_rows_that_say_the_same_are_named_and_count_once(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "b.png")
    texts: list[tuple[str, Any]] = [("a", "one"), ("b", "one"), ("a", "two"), ("a", " one "), ("b", ""), ("b", "")]
    texts += [("a", ["two", "three"])]
    rows = [{"file_name": f"{name}.png", "text": text} for name, text in texts]
    table = write(tmp_path / "metadata.jsonl", jsonl(*rows))
    report = tmp_path / "reports/bad.jsonl"
    with pytest.warns(UserWarning, match=r"Left out 1 of 7 rows that say of an image what another has said"):
        found = captions_of(tmp_path, report=report, max_bad_share=0.2)
    assert found == {"a.png": ["one", "two", "two", "three"], "b.png": ["one"]}
    assert read_faults(report) == {f"{table}, line 4": "another row has said the same of a.png"}
    with pytest.warns(UserWarning, match=r"Left out 1 of 7 rows"):
        assert captions_of(tmp_path, max_bad_share=0) == found, "nothing is lost with them"
    with pytest.raises(ValueError, match=r"line 4 cannot be read \(another row has said the same of a\.png\)"):
        captions_of(tmp_path, on_error="raise")


def test_no_table_and_two_tables_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "photos/deep/a.png")
    with pytest.raises(
        FileNotFoundError,
        match=r"metadata\.jsonl, metadata\.csv or metadata\.parquet in .*photos, or in the folder above",
    ):
        captions_of(tmp_path / "photos")
    for name in ("metadata.csv", "metadata.jsonl"):
        write(tmp_path / "photos" / name, "")
    with pytest.raises(
        ValueError, match=r"must hold one table .*metadata\.jsonl, .*metadata\.csv\. Remove all but one"
    ):
        captions_of(tmp_path / "photos")


def test_validation_images_among_the_training_images_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "train/a.png", "val/b.png")
    write(tmp_path / "metadata.csv", "file_name,text\ntrain/a.png,one\nval/b.png,two\n")
    with pytest.raises(ValueError, match=r"`val_root` must not lie in `root`, .*val is in "):
        open_module(tmp_path, val_root=tmp_path / "val").setup("fit")


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`captions` must be one of None, sidecar, metadata, got 'text'"):
        open_module(tmp_path, "text")
    with pytest.raises(ValueError, match=r"`missing_captions` must be one of raise, skip, empty, got 'drop'"):
        open_module(tmp_path, missing_captions="drop")
    with pytest.raises(ValueError, match=r"`captions` must be those of 1 files, got 2"):
        ImageFolderDataset([("a.png", None)], 8, captions=[["one"], ["two"]])
    with pytest.raises(FileNotFoundError, match=r"`root` must be a folder of images, but .*gone does not exist"):
        open_module(tmp_path / "gone").setup("fit")
    with pytest.raises(ValueError, match=r"`root` must hold images"):
        open_module(tmp_path).setup("fit")


@pytest.mark.parametrize("columns", ["caption_0", "[caption_0, caption_1]"])
def test_a_command_line_can_make_it(tmp_path: Path, columns: str) -> None:
    folder_of(tmp_path, "a.png")
    write(tmp_path / "metadata.csv", "file_name,caption_0,caption_1\na.png,one,two\n")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(ImageFolderDataModule, "data")
    arguments = [f"--data.root={tmp_path}", f"--data.val_root={tmp_path}", "--data.image_size=8"]
    arguments += ["--data.captions=metadata", f"--data.caption_column={columns}", "--data.prompts=p.txt"]
    data = ImageFolderDataModule(**parser.parse_args(arguments).data.as_dict())
    assert data.dataset("train").captions == [("one", "two") if columns[0] == "[" else ("one",)]
    with pytest.raises(SystemExit):
        parser.parse_args([*arguments, "--data.captions=txt"])


# Real photos

ROWS_PER_FOLDER = 4


@pytest.fixture
def unpack(shared: Path, tmp_path: Path) -> Callable[[str], dict[str, list[str]]]:
    """Unpacks the first images of train/ and val/, and their rows; gives the rows' fields by file name."""

    def first_images(name: str) -> dict[str, list[str]]:
        archive = shared / "data" / name
        if not archive.is_file():
            pytest.skip(f"no {name} in ../shared/data: real captions are not at hand")
        with zipfile.ZipFile(archive) as files:
            header, *lines = files.read("metadata.csv").decode().splitlines()
            # Without quotes a row is what lies between its commas.
            plain = [line.split(",") for line in lines if '"' not in line]
            rows = [
                row
                for folder in ("train/", "val/")
                for row in [row for row in plain if row[0].startswith(folder)][:ROWS_PER_FOLDER]
            ]
            files.extractall(tmp_path, [row[0] for row in rows])
            files.extract("metadata.csv", tmp_path / "whole")
        content = io.StringIO()
        csv.writer(content).writerows([header.split(","), *rows])
        write(tmp_path / "metadata.csv", content.getvalue())
        return {row[0]: row[1:] for row in rows}

    return first_images


def test_emoji(unpack: Callable[[str], dict[str, list[str]]], tmp_path: Path) -> None:
    rows = unpack("emoji128.zip")
    data = open_module(tmp_path / "train", val_root=tmp_path / "val")
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        dataset = data.dataset(split)
        assert len(dataset) == ROWS_PER_FOLDER
        for i, (path, _) in enumerate(dataset.files):
            item = dataset[i]
            assert item["caption"] == rows[f"{split}/{Path(path).name}"][0]
            assert " emoji of " in item["caption"]
            assert item["original_size"].tolist() == [128, 128]
    # The whole table names images that were not unpacked.
    (tmp_path / "whole/metadata.csv").replace(tmp_path / "metadata.csv")
    with pytest.raises(ValueError, match=r"must name files that are there, but \d+ in its column"):
        captions_of(tmp_path / "train")


def test_photos_with_five_captions(unpack: Callable[[str], dict[str, list[str]]], tmp_path: Path) -> None:
    rows = unpack("flickr8k128.zip")
    found = captions_of(tmp_path, caption_column=[f"caption_{i}" for i in range(5)])
    assert len(found) == 2 * ROWS_PER_FOLDER
    assert found == {name: [text.strip() for text in texts] for name, texts in rows.items()}
    assert {len(texts) for texts in found.values()} == {5}
