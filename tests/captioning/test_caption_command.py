"""``lpl caption``: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from captioners import blip, florence, make_photos, photo, qwen, transformers
from conftest import ROOT
from forked import LPL, Script
from PIL import Image

from lpl_lightning.captioning.command import _place
from lpl_lightning.cli import main
from lpl_lightning.data import ImageFolderDataModule

# Random models end where they must, so nearly every caption may be cut off.
pytestmark = pytest.mark.filterwarnings("ignore:.*reached `max_new_tokens` and may be cut off")
TASK = "<MORE_DETAILED_CAPTION>"
SHORT = ("--max_new_tokens=8", "--batch_size=2", "--num_workers=0", "--device=cpu")
UNREADABLE = "ignore:.*could not be captioned"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "florence"
    florence(folder)
    return folder


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def caption(images: Path, model: Path, *args: str) -> None:
    main(["caption", str(images), f"--model={model}", *SHORT, *args])


def table(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().split("\n")[:-1]]
    assert all(row.keys() == {"file_name", "text"} for row in rows)
    return {row["file_name"]: row["text"] for row in rows}


def report(folder: Path) -> Any:
    return json.loads((folder / "captions-report.json").read_text())


def by_hand(model: Path, folder: Path) -> dict[str, str]:
    """Florence-2 called on one image at a time."""
    loaded = transformers.Florence2ForConditionalGeneration.from_pretrained(model)
    processor = transformers.AutoProcessor.from_pretrained(model)
    found = {}
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path)
        inputs = processor(text=TASK, images=image, return_tensors="pt")
        tokens = loaded.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.batch_decode(tokens, skip_special_tokens=False)[0]
        text = processor.post_process_generation(text, task=TASK, image_size=image.size)[TASK]
        found[path.relative_to(folder).as_posix()] = " ".join(text.split())
    return found


def read_by_the_data_module(root: Path, captions: Any, **options: Any) -> dict[str, str]:
    module = ImageFolderDataModule(root, 16, val_root=root, num_workers=0, captions=captions, **options)
    dataset = module.dataset("val")
    found = {Path(path).relative_to(root).as_posix(): number for number, (path, _) in enumerate(dataset.files)}
    return {name: dataset[number]["caption"] for name, number in found.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# What it writes


def test_a_table_that_training_reads(photos: Path, tiny: Path, tmp_path: Path) -> None:
    expected = by_hand(tiny, photos)
    assert len(expected) == 9
    assert len(set(expected.values())) >= 6

    caption(photos, tiny, f"--out={tmp_path / 'captions'}")
    assert table(tmp_path / "captions") == expected
    assert [name for name in files_of(photos) if not name.endswith(".png")] == ["notes.csv"]
    assert read_by_the_data_module(photos, "metadata", caption_folder=tmp_path / "captions") == expected

    caption(photos, tiny)
    assert table(photos) == expected
    assert read_by_the_data_module(photos, "metadata") == expected

    caption(photos, tiny, f"--out={tmp_path}")
    assert table(tmp_path) == {f"photos/{name}": text for name, text in expected.items()}
    (photos / "metadata.jsonl").unlink()
    assert read_by_the_data_module(photos, "metadata") == expected


def test_text_files_that_training_reads(photos: Path, tiny: Path, tmp_path: Path) -> None:
    caption(photos, tiny, "--format=sidecar", f"--out={tmp_path / 'out'}")
    expected = by_hand(tiny, photos)
    assert read_by_the_data_module(photos, "sidecar") == expected
    assert (photos / "sub" / "2.txt").read_text() == expected["sub/2.png"] + "\n"
    assert len(list(photos.rglob("*"))) == 9 + 9 + 2, "no other files are left"
    # The other format of the same captions needs no model.
    shutil.copytree(tiny, tmp_path / "same")
    caption(photos, tmp_path / "same", f"--out={tmp_path / 'out'}")
    assert table(tmp_path / "out") == expected


def test_the_record_says_by_what(photos: Path, tiny: Path, tmp_path: Path) -> None:
    caption(photos, tiny, f"--out={tmp_path / 'out'}", "--num_beams=2")
    record = json.loads((tmp_path / "out" / "captions-record.json").read_text())
    assert record["name"] == str(tiny)
    assert record["images"] == {"folder": str(photos)}
    assert record["settings"] == {
        "prompt": TASK, "max_new_tokens": 8, "num_beams": 2, "temperature": None, "seed": None, "dtype": "float32",
    }  # fmt: skip
    assert record["versions"]["transformers"] == transformers.__version__
    assert len(record["model"]["weights_blake2b"]) == 32
    assert report(tmp_path / "out")["counts"] == {
        "images": 9, "captioned": 9, "not_captioned_yet": 0, "failed": 0, "empty": 0, "reached_max_new_tokens": 9,
    }  # fmt: skip


def test_loader_processes_change_nothing(photos: Path, tiny: Path, tmp_path: Path) -> None:
    caption(photos, tiny, f"--out={tmp_path / 'a'}")
    caption(photos, tiny, f"--out={tmp_path / 'b'}", "--num_workers=2")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


# How it goes on


LONG = ("--max_new_tokens=40", "--num_beams=4")


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty photos and a file that is none, one photo of them cut in half, captioned in one go in both formats."""
    folder = tmp_path_factory.mktemp("whole")
    make_photos(folder / "photos", 40)
    (folder / "photos" / "5.jpg").write_text("text")
    content = (folder / "photos" / "31.png").read_bytes()
    (folder / "photos" / "31.png").write_bytes(content[: len(content) // 2])
    shutil.copytree(folder / "photos", folder / "captioned")
    for format in ("sidecar", "metadata"):
        with pytest.warns(UserWarning, match=r"2 of 41 images could not be captioned"):
            caption(folder / "captioned", tiny, *LONG, f"--format={format}")
    return folder


@pytest.mark.filterwarnings(UNREADABLE)
def test_killed_and_continued_it_is_as_if_it_had_not_been(whole: Path, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "photos", tmp_path / "photos")
    words = ["caption", tmp_path / "photos", f"--model={tiny}", *SHORT, *LONG, "--format=sidecar"]
    captioning = Script(LPL, *words)
    part = tmp_path / "photos" / "captions-parts" / "part-0-of-1.jsonl"
    until = time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") >= 8) and time.monotonic() < until:
        time.sleep(0.005)
    captioning.process.kill()
    assert captioning.end().returncode == -signal.SIGKILL
    assert 8 <= part.read_bytes().count(b"\n") < 41, "it was to be killed in the middle"
    assert not (tmp_path / "photos" / "captions-report.json").exists()
    for format in ("sidecar", "metadata"):
        caption(tmp_path / "photos", tiny, *LONG, f"--format={format}")
    assert files_of(tmp_path / "photos") == files_of(whole / "captioned")


def test_killed_while_it_writes_it_leaves_no_trace(photos: Path, tiny: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(photos, tmp_path / "whole")
    caption(whole, tiny, "--format=sidecar")
    words = ["caption", photos, f"--model={tiny}", *SHORT, "--format=sidecar"]
    assert Script(Path(__file__).with_name("dying_run.py"), "", 12, *words).end().returncode == -signal.SIGKILL
    assert [path.name for path in photos.rglob("*.unfinished")], "it was to be killed within a write"
    assert files_of(photos).keys() - files_of(whole).keys()
    caption(photos, tiny, "--format=sidecar")
    assert files_of(photos) == files_of(whole)


@pytest.mark.filterwarnings(UNREADABLE)
def test_several_processes_write_what_one_does(
    whole: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "photos", tmp_path / "photos")
    caption(tmp_path / "photos", tiny, *LONG, "--shard=0/3", "--limit=3")  # and is killed
    found = report(tmp_path / "photos")["counts"]
    assert (found["captioned"] + found["failed"], found["not_captioned_yet"]) == (4, 37)
    part = tmp_path / "photos" / "captions-parts" / "part-0-of-3.jsonl"
    part.write_bytes(part.read_bytes()[:-20])
    (tmp_path / "photos" / "metadata.jsonl").unlink()
    # It goes on as two.
    caption(tmp_path / "photos", tiny, *LONG, "--shard=1/2")
    assert table(tmp_path / "photos").items() < table(whole / "captioned").items()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    caption(tmp_path / "photos", tiny, *LONG)
    for name in ("metadata.jsonl", "captions-report.json", "captions-record.json"):
        assert (tmp_path / "photos" / name).read_bytes() == (whole / "captioned" / name).read_bytes()
    assert len(list(part.parent.iterdir())) == 3


def test_only_new_images_are_captioned(photos: Path, tiny: Path, tmp_path: Path) -> None:
    caption(photos, tiny)
    part = photos / "captions-parts" / "part-0-of-1.jsonl"
    before, old = part.read_bytes(), table(photos)
    photo(20, 100).save(photos / "11.png")
    photo(20, 101).save(photos / "sub" / "99.png")
    (photos / "4.png").unlink()
    caption(photos, tiny)
    assert part.read_bytes().startswith(before)
    added = part.read_bytes()[len(before) :].splitlines()
    assert [json.loads(line)["file_name"] for line in added] == ["11.png", "sub/99.png"]
    assert table(photos) == by_hand(tiny, photos)
    assert {name: text for name, text in old.items() if name != "4.png"}.items() < table(photos).items()


def test_a_run_can_be_tried_out(photos: Path, tiny: Path) -> None:
    caption(photos, tiny, "--limit=0")
    assert table(photos) == {}
    caption(photos, tiny, "--limit=3")
    assert table(photos).items() < by_hand(tiny, photos).items()
    assert report(photos)["counts"]["captioned"] == 4
    caption(photos, tiny)
    assert table(photos) == by_hand(tiny, photos)


def test_drawn_captions_are_the_same_however_a_run_was_cut(photos: Path, tiny: Path, tmp_path: Path) -> None:
    drawn = ("--temperature=1.5", "--seed=3")
    caption(photos, tiny, *drawn, f"--out={tmp_path / 'a'}")
    caption(photos, tiny, *drawn, f"--out={tmp_path / 'b'}", "--limit=5")
    caption(photos, tiny, *drawn, f"--out={tmp_path / 'b'}")
    assert table(tmp_path / "a") == table(tmp_path / "b") != by_hand(tiny, photos)


def test_another_model_or_other_settings_are_refused(photos: Path, tiny: Path, tmp_path: Path) -> None:
    caption(photos, tiny)
    florence(tmp_path / "other", seed=1)
    shutil.copytree(photos, tmp_path / "elsewhere")
    for args, message in (
        (
            (photos, tmp_path / "other"),
            r"holds captions of another model.*: weights_blake2b was '\w+' and is '\w+'\. Go",
        ),
        ((photos, tiny, "--num_beams=3"), r": num_beams was None and is 3\. Go on"),
        ((photos, tiny, "--prompt=<CAPTION>"), r": prompt was '<MORE_DETAILED_CAPTION>' and is '<CAPTION>'"),
        (
            (photos, tiny, "--max_new_tokens=9", "--dtype=bfloat16"),
            r"max_new_tokens was 8 and is 9; dtype was 'float32'",
        ),
        ((photos / "sub", tiny, f"--out={photos}"), r": folder was '.' and is 'sub'"),
    ):
        with pytest.raises(ValueError, match=message):
            caption(*args)
    # A folder that was moved, and a model that was, are the same.
    caption(tmp_path / "elsewhere", shutil.copytree(tiny, tmp_path / "moved"), "--limit=0")


def test_another_tokenizer_is_refused(photos: Path, tiny: Path, tmp_path: Path) -> None:
    caption(photos, tiny)
    shutil.copytree(tiny, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("{", '{"note": 1,', 1))
    with pytest.raises(ValueError, match=r"settings_blake2b was '\w+' and is '\w+'"):
        caption(photos, tmp_path / "other")


def test_other_versions_are_warned_of(photos: Path, tiny: Path) -> None:
    caption(photos, tiny, "--limit=0")
    path = photos / "captions-record.json"
    path.write_text(path.read_text().replace(f'"{transformers.__version__}"', '"4.0"'))
    with pytest.warns(UserWarning, match=r"captions were begun with other versions, .*'transformers': '4.0'"):
        caption(photos, tiny)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"must be the record that `lpl caption` wrote, but cannot be read"):
        caption(photos, tiny)


@pytest.mark.parametrize(("given", "expected"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_each_process_of_a_launcher_has_a_device_of_its_own(
    given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is none, the one that was looked for."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    looked_for: list[str] = []

    def empty(size: int, device: str) -> torch.Tensor:
        looked_for.append(device)
        return torch.zeros(size)

    monkeypatch.setattr(torch, "empty", empty)
    _place(given)
    assert looked_for == [expected]


# Captions that are there already


def test_text_files_from_elsewhere_are_kept(photos: Path, tiny: Path, tmp_path: Path) -> None:
    (photos / "4.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"1 captions are there already that `lpl caption` did not write: .*4\.txt"):
        caption(photos, tiny, "--format=sidecar")
    assert [path.name for path in photos.rglob("*.txt")] == ["4.txt"]
    caption(photos, tiny, f"--out={tmp_path / 'out'}")  # a table in another folder leaves it alone
    assert (photos / "4.txt").read_text() == "mine"
    caption(photos, tiny, "--format=sidecar", "--overwrite=true")
    assert read_by_the_data_module(photos, "sidecar") == by_hand(tiny, photos)
    # What was edited since is kept, what was deleted is written anew.
    (photos / "0.txt").write_text("edited")
    (photos / "1.txt").unlink()
    caption(photos, tiny, "--format=sidecar")
    assert read_by_the_data_module(photos, "sidecar") == by_hand(tiny, photos) | {"0.png": "edited"}


def test_tables_from_elsewhere_are_kept(photos: Path, tiny: Path, tmp_path: Path) -> None:
    path = photos / "metadata.jsonl"
    mine = '{"file_name": "0.png", "text": "mine"}\n'
    path.write_text(mine)
    with pytest.raises(
        ValueError, match=r"1 rows of .*metadata.jsonl are not as `lpl caption` wrote them: line 1\. Move"
    ):
        caption(photos, tiny)
    assert path.read_text() == mine
    caption(photos, tiny, "--overwrite=true")
    expected = by_hand(tiny, photos)
    assert table(photos) == expected
    # Rows that were edited since.
    lines = path.read_text().split("\n")
    lines[3] = lines[3].replace('"text": "', '"text": "edited ')
    edited = "\n".join(lines)
    path.write_text(edited)
    with pytest.raises(ValueError, match=r"1 rows of .* are not as `lpl caption` wrote them: line 4"):
        caption(photos, tiny)
    assert path.read_text() == edited
    path.unlink()
    for name in ("metadata.csv", "metadata.parquet"):
        (photos / name).write_text("")
        with pytest.raises(ValueError, match=rf"`out`: .*{name} is there already, and a folder may hold one table"):
            caption(photos, tiny)
        (photos / name).unlink()


def test_two_images_of_one_text_file_are_refused(photos: Path, tiny: Path) -> None:
    photo(16, 1).save(photos / "0.jpg")
    with pytest.raises(ValueError, match=r"1 would be of several: 0\.jpg and 0\.png"):
        caption(photos, tiny, "--format=sidecar")
    caption(photos, tiny)
    assert len(table(photos)) == 10


# Images that have no caption


@pytest.fixture
def damaged(photos: Path) -> Path:
    """Five more files, none of which is an image."""
    whole = (photos / "0.png").read_bytes()
    (photos / "empty.png").touch()
    (photos / "half.png").write_bytes(whole[: len(whole) // 2])
    (photos / "text.jpg").write_text("text")
    (photos / "link.png").symlink_to(photos / "nowhere.png")
    (photos / "sub" / "zeros.webp").write_bytes(b"\0" * 100)
    return photos


def test_images_that_cannot_be_read_are_counted_and_tried_again(damaged: Path, tiny: Path) -> None:
    with pytest.warns(UserWarning, match=r"5 of 14 images could not be captioned; .*captions-report.json names them"):
        caption(damaged, tiny)
    expected = {"empty.png", "half.png", "text.jpg", "link.png", "sub/zeros.webp"}
    assert report(damaged)["failed"].keys() == expected
    assert "truncated" in report(damaged)["failed"]["half.png"]
    assert report(damaged)["failed"]["text.jpg"] == "not an image that Pillow can identify"
    first = table(damaged)
    assert len(first) == 9
    assert not first.keys() & expected
    state = files_of(damaged)
    with pytest.warns(UserWarning, match=r"5 of 14 images could not be captioned"):
        caption(damaged, tiny)
    assert files_of(damaged) == state
    for name in expected:
        (damaged / name).unlink()
    photo(20, 50).save(damaged / "half.png")
    caption(damaged, tiny)
    assert table(damaged) == by_hand(tiny, damaged)
    assert report(damaged)["failed"] == {}


@pytest.mark.filterwarnings(UNREADABLE)
def test_training_as_the_page_says_goes_without_them(damaged: Path, tiny: Path, tmp_path: Path) -> None:
    caption(damaged, tiny, f"--out={tmp_path / 'captions'}")
    page = (ROOT / "lpl_lightning" / "data" / "README.md").read_text()
    command = page.partition("Train on them by\n\n```bash\n")[2].partition("```")[0]
    given = dict(re.findall(r"--data\.(\w+) (\S+)", command))
    assert given.pop("root") == "PHOTOS"
    given["caption_folder"] = str(tmp_path / given["caption_folder"])
    assert read_by_the_data_module(damaged, **given) == table(tmp_path / "captions")


def test_images_that_cannot_be_read_stop_it_if_asked(damaged: Path, tiny: Path) -> None:
    with pytest.raises(
        ValueError, match=r"empty\.png cannot be captioned \(not an .*set `on_error` to skip; captions made"
    ):
        caption(damaged, tiny, "--on_error=raise", "--batch_size=1")
    kept = (damaged / "captions-parts" / "part-0-of-1.jsonl").read_text().splitlines()
    assert len(kept) == 6, "those before it"
    assert not (damaged / "metadata.jsonl").exists()


def test_a_folder_of_which_none_can_be_read(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("text")
    with pytest.warns(UserWarning, match=r"1 of 1 images could not be captioned"):
        caption(tmp_path / "photos", tiny)
    assert table(tmp_path / "photos") == {}


def test_an_image_that_the_processor_refuses_does_not_take_others_with_it(photos: Path, tmp_path: Path) -> None:
    qwen(tmp_path / "qwen")
    Image.new("RGB", (4000, 10)).save(photos / "3.jpg")  # Qwen2-VL takes no strips of more than 200 to 1
    with pytest.warns(UserWarning, match=r"1 of 10 images could not be captioned"):
        caption(photos, tmp_path / "qwen", "--batch_size=4")
    assert list(report(photos)["failed"]) == ["3.jpg"]
    assert "the model's processor refuses it: ValueError: absolute aspect" in report(photos)["failed"]["3.jpg"]
    assert len(table(photos)) == 9


@pytest.mark.parametrize("format", ["metadata", "sidecar"])
def test_empty_captions_are_named(photos: Path, tmp_path: Path, format: str) -> None:
    blip(tmp_path / "blip", ends_at_once=True)
    with pytest.warns(UserWarning, match=r"9 of 9 images have an empty caption; .* names them"):
        caption(photos, tmp_path / "blip", f"--format={format}")
    assert len(report(photos)["empty"]) == 9
    assert not list(photos.rglob("*.txt"))
    with pytest.raises(ValueError, match=r"9 of 9 images have no caption"):
        read_by_the_data_module(photos, format)
    with pytest.warns(UserWarning, match=r"9 of 9 images have an empty caption"):
        caption(photos, tmp_path / "blip", f"--format={format}")  # and are not made again
    assert len((photos / "captions-parts" / "part-0-of-1.jsonl").read_text().splitlines()) == 9


def test_an_empty_caption_replaces_that_of_another_source(photos: Path, tmp_path: Path) -> None:
    (photos / "4.txt").write_text("mine")
    blip(tmp_path / "blip", ends_at_once=True)
    with pytest.warns(UserWarning, match=r"9 of 9 images have an empty caption"):
        caption(photos, tmp_path / "blip", "--format=sidecar", "--overwrite=true")
    assert not list(photos.rglob("*.txt"))


# Arguments


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch_size=0"], r"`batch_size` must be 1 or more, got 0"),
        (["--max_new_tokens=0"], r"`max_new_tokens` must be 1 or more"),
        (["--num_beams=0"], r"`num_beams` must be 1 or more, got 0"),
        (["--num_workers=-1"], r"`num_workers` must be 0 or more"),
        (["--limit=-1"], r"`limit` must be 0 or more"),
        (["--temperature=0"], r"`temperature` must be above 0, got 0"),
        (["--shard=2/2"], r"`shard` must be I/N, with I from 0 to N - 1, got '2/2'"),
        (["--device=nowhere"], r"`device`='nowhere' cannot be used: .* Give 'cpu', or leave it out"),
        (["--out=/proc/nowhere"], r"`out`: /proc/nowhere cannot be written .* Give another folder"),
        (["--prompt=<OD>"], r"`prompt`='<OD>' does not give text"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    photos: Path, tiny: Path, args: list[str], message: str
) -> None:
    before = files_of(photos)
    with pytest.raises(ValueError, match=message):
        caption(photos, tiny, *args)
    assert files_of(photos) == before


def test_missing_folders_are_refused(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`images` must be a folder of images, but .*nowhere does not exist"):
        caption(tmp_path / "nowhere", tiny)
    with pytest.raises(ValueError, match=r"`images` must hold images, but no file in"):
        caption(tmp_path, tiny)
