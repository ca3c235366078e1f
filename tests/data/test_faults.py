from __future__ import annotations

import io
import json
import os
import random
import struct
import threading
import zlib
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image, features

from lpl_lightning.data import ImageFolderDataModule
from lpl_lightning.data.faults import Faults, Unreadable, first_readable, read_faults
from lpl_lightning.data.reading import read_rgb


def picture(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(kind: str, seed: int = 0, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, format=kind, **options)
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture(1).save(buffer, format=kind, save_all=True, append_images=[picture(2)], duration=50)
    return buffer.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes do not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


BAD: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "not an image"),
    "text.jpg": (b"<html>404 Not Found</html>", "not an image"),
    # Pillow would hand it to another program, whatever it is called.
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n", "not an image"),
    "cut.jpg": (encoded("JPEG")[:400], "Truncated|truncated"),
    "cut.png": (encoded("PNG")[:600], "truncated|Truncated"),
    "bomb.png": (png_of(60_000, 60_000), "DecompressionBomb"),
    "moving.gif": (animated("GIF"), "2 frames"),
    "moving.png": (animated("PNG"), "2 frames"),
    "moving.webp": (animated("WEBP"), "2 frames"),
    "pages.tif": (animated("TIFF"), "2 frames"),
}


def folder_of(root: Path, good: int = 60) -> Path:
    root.mkdir()
    for name, (content, _) in BAD.items():
        (root / name).write_bytes(content)
    for i in range(good):
        (root / f"good{i:02d}.png").write_bytes(encoded("PNG", i))
    return root


def module(root: Path, **options: Any) -> ImageFolderDataModule:
    settings: dict[str, Any] = {"val_root": root, "batch_size": 5, "num_workers": 0, "max_bad_share": 0.5} | options
    return ImageFolderDataModule(root, 16, **settings)


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_in_one_error(tmp_path: Path, name: str) -> None:
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unreadable, match=rf"{name} cannot be read \(.*({reason}).*set `on_error` to skip"):
        read_rgb(str(tmp_path / name))
    with pytest.raises(Unreadable, match=rf"item 7 cannot be read \(.*({reason}|it is empty)"):
        read_rgb(content, "item 7")


def test_a_preview_beside_a_photo_is_no_animation() -> None:
    """As phones write them (MPO)."""
    content = animated("MPO")
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.n_frames == 2  # type: ignore[attr-defined]
    assert read_rgb(content, "photo").size == (24, 20)


def test_those_found_beforehand_are_left_out_and_written_down(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos")
    report = tmp_path / "reports" / "bad.jsonl"
    data = module(root, report=report)
    with pytest.warns(UserWarning, match=r"Left out 10 of 70 images"):
        data.setup("fit")
    assert len(data.dataset("train")) == 60
    found = read_faults(report)
    assert set(found) == {str(root / name) for name in BAD}
    assert len(report.read_text().splitlines()) == 10
    for name, (_, reason) in BAD.items():
        assert any(word in found[str(root / name)] for word in reason.split("|"))


@pytest.mark.parametrize("workers", [0, 2])
def test_those_met_in_training_are_replaced_and_written_down(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch keeps its size, each bad image stands in the report, and what takes its place is the same each time."""
    root = folder_of(tmp_path / "photos")
    batches = []
    for run in range(2):
        torch.manual_seed(0)
        report = tmp_path / f"{run}.jsonl"
        data = module(root, verify=False, report=report, num_workers=workers)
        loader = data.train_dataloader()
        batches.append([batch["image"] for batch in loader])
        assert [len(batch) for batch in batches[-1]] == [5] * 14
        assert set(read_faults(report)) == {str(root / name) for name in BAD}
    assert all(torch.equal(one, two) for one, two in zip(*batches, strict=True))
    # Other processes meet them in the next epoch, and in validation; each stands there once all the same.
    assert sum(len(batch["image"]) for batch in loader) == 70
    assert [len(batch["image"]) for batch in data.val_dataloader()] == [5] * 14
    assert len(report.read_text().splitlines()) == len(BAD)
    with caplog.at_level("INFO"):
        data.teardown("fit")
    assert f"10 items could not be used: {report} names them" in caplog.text


@pytest.mark.filterwarnings("ignore:Left out 1 of 20")
def test_going_on_where_an_image_turned_bad_in_the_epoch(tmp_path: Path) -> None:
    """It is replaced where it is met; without it, as ``verify`` has it, the epoch would be another."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(20):
        (root / f"{number:02}.png").write_bytes(encoded("PNG", number))
    torch.manual_seed(0)
    stopped: Any = module(root).train_dataloader()
    whole = [batch["image"] for batch in stopped]
    begun: Any = module(root).train_dataloader()
    next(iter(begun))
    (root / "07.png").write_bytes(b"")
    going: Any = module(root).train_dataloader()
    with pytest.raises(ValueError, match=r"items 20 there, 19 here.* `--data\.verify false` goes on"):
        going.load_state_dict(begun.state_dict())
    going = module(root, verify=False).train_dataloader()
    going.load_state_dict(begun.state_dict())
    rest = [batch["image"] for batch in going]
    assert len(rest) == 3
    same = [
        torch.equal(one, two)
        for batch, other in zip(rest, whole[1:], strict=True)
        for one, two in zip(batch, other, strict=True)
    ]
    assert same.count(False) <= 1


def write_all(report: Path, number: int, start: Any) -> None:
    """Write faults one by one, as other processes do at the same time."""
    faults = Faults(max_bad_share=1, report=report)
    start.wait()
    for at in range(300):
        faults.write({f"{at}\n\udcff.png": f"met by {number}"})


def test_processes_name_each_once(tmp_path: Path) -> None:
    report = tmp_path / "bad.jsonl"
    start = get_context("fork").Barrier(4)
    processes = [get_context("fork").Process(target=write_all, args=(report, number, start)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(report.read_text().splitlines()) == 300
    assert set(read_faults(report)) == {f"{at}\n\udcff.png" for at in range(300)}


def test_a_report_that_was_cut_off_or_removed_goes_on(tmp_path: Path) -> None:
    report = tmp_path / "bad.jsonl"
    faults = Faults(report=report)
    faults.write({"1": "bad", "2": "bad"})
    with report.open("a") as file:
        file.write('{"name": "3", "rea')
    faults.write({"2": "bad", "3": "bad"})
    faults.write({"3": "bad"})
    assert read_faults(report) == dict.fromkeys("123", "bad")
    assert len(report.read_text().splitlines()) == 4
    report.unlink()
    faults.write({"1": "bad"})
    assert read_faults(report) == {"1": "bad"}


def test_raise_ends_at_the_first(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos")
    for verify in (True, False):
        data = module(root, verify=verify, on_error="raise")
        with pytest.raises(ValueError, match=r"cannot be read \(.*set `on_error` to skip it"):
            list(data.train_dataloader())


def test_too_many_bad_ones_end_the_run_with_the_list(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos")
    report = tmp_path / "bad.jsonl"
    with pytest.raises(
        ValueError, match=r"10 of 70 items .* more than `max_bad_share` \(0.1\) allows; .*bad\.jsonl names"
    ):
        module(root, max_bad_share=0.1, report=report).setup("fit")
    assert len(read_faults(report)) == 10
    faults = Faults(max_bad_share=0.1)
    faults.passed(89)
    for number in range(10):
        faults.take(Unreadable(str(number), "bad"))
        faults.take(Unreadable(str(number), "bad"))  # met again, it is no second one
    with pytest.raises(ValueError, match=r"11 of 100 items"):
        faults.take(Unreadable("11", "bad"))
    # Few images, all of which have been met before there is enough to judge by.
    faults = Faults(max_bad_share=0.1)
    for number in range(30):
        faults.take(Unreadable(str(number), "bad"))
    faults.passed(69)
    with pytest.raises(ValueError, match=r"30 of 100 items"):
        faults.passed()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.filterwarnings("ignore:Left out")
def test_each_run_has_a_report_of_its_own(tmp_path: Path, verify: bool) -> None:
    """Of one data module with several trainers, what is found once beforehand too, and none of a run without files."""
    root, reports = folder_of(tmp_path / "photos"), []
    data = module(root, verify=verify)
    bad = {str(root / name) for name in BAD}
    for name in ("first", "second"):
        trainer = quiet(tmp_path / name)
        for _ in range(2):
            trainer.validate(Nothing(), data, verbose=False)
        reports.append(data.faults.report)
        assert set(read_faults(tmp_path / name / "bad_data.jsonl")) == bad
        assert len((tmp_path / name / "bad_data.jsonl").read_text().splitlines()) == len(bad)
    assert reports == [tmp_path / name / "bad_data.jsonl" for name in ("first", "second")]
    quiet(tmp_path / "third", fast_dev_run=1).validate(Nothing(), data, verbose=False)
    assert data.faults.report is None


def test_a_report_that_was_asked_for_is_that_of_all_runs(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos")
    data = module(root, verify=False, report=tmp_path / "all.jsonl")
    for name in ("first", "second"):
        quiet(tmp_path / name).validate(Nothing(), data, verbose=False)
        assert data.faults.report == tmp_path / "all.jsonl"
        assert not (tmp_path / name / "bad_data.jsonl").exists()
    assert set(read_faults(tmp_path / "all.jsonl")) == {str(root / name) for name in BAD}


class Nothing(pl.LightningModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing."""


def quiet(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder, **options)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(4):
        (root / f"{number}.png").write_bytes(encoded("PNG", number))
    os.mkfifo(root / "pipe.jpg")
    (root / "itself.jpg").symlink_to("itself.jpg")
    (root / "itself").symlink_to("itself")
    # Ends the wait of a reader, if there is one.
    threading.Thread(target=lambda: (root / "pipe.jpg").open("wb").close(), daemon=True).start()
    report = tmp_path / "bad.jsonl"
    for buckets in (None, {"divisor": 4}):
        data = module(root, report=report, verify=buckets is None, buckets=buckets, batch_size=2)
        with pytest.warns(UserWarning, match=r"Left out 2 of 6 images"):
            data.setup("fit")
        assert len(data.dataset("train")) == 4
    found = read_faults(report)
    assert found[str(root / "pipe.jpg")] == "ValueError: it is no file"
    assert "symbolic links" in found[str(root / "itself.jpg")]


@pytest.mark.parametrize("verify", [True, False])
def test_an_image_too_long_to_be_resized_is_a_bad_one(tmp_path: Path, verify: bool) -> None:
    """0.8 GB as a square of 16 px, from a file of a few kilobytes."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(4):
        (root / f"{number}.png").write_bytes(encoded("PNG", number))
    Image.new("1", (1, 1_000_000)).save(root / "line.png")
    report = tmp_path / "bad.jsonl"
    data = module(root, verify=verify, report=report, max_bad_share=0.2)
    if verify:
        with pytest.warns(UserWarning, match=r"Left out 1 of 5 images .* 1000000 pixels high and 1 wide"):
            data.setup("fit")
    assert [len(batch["image"]) for batch in data.val_dataloader()] == [4 if verify else 5]
    assert list(read_faults(report)) == [str(root / "line.png")]
    assert "where it covers 16 x 16; crop it" in read_faults(report)[str(root / "line.png")]


def test_the_next_item_takes_the_place_of_a_bad_one() -> None:
    def get(index: int) -> int:
        if index in (2, 3, 9):
            raise Unreadable(str(index), "bad")
        return index

    faults = Faults(max_bad_share=1)
    assert [first_readable(get, index, 10, faults) for index in range(10)] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    assert faults.met == {"2": "bad", "3": "bad", "9": "bad"}
    assert faults.good == 10

    def none(index: int) -> int:
        raise Unreadable(str(index), "bad")

    with pytest.raises(ValueError, match=r"None of 3 items can be read"):
        first_readable(none, 0, 3, Faults(max_bad_share=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, r"`on_error` must be one of skip, raise, got 'ignore'"),
        ({"max_bad_share": 1.5}, r"`max_bad_share` must be in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **options)


def damages(rng: random.Random) -> list[Callable[[bytes], bytes]]:
    """What happens to files: cut, flipped, zeroed, doubled, parts missing, the end of another."""

    def flipped(data: bytes) -> bytes:
        found = bytearray(data)
        for _ in range(rng.choice((1, 3, 20))):
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        return bytes(found)

    def zeroed(data: bytes) -> bytes:
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.randrange(1, 200))
        return data[:start] + bytes(end - start) + data[end:]

    def missing(data: bytes) -> bytes:
        start = rng.randrange(len(data))
        return data[:start] + data[start + rng.randrange(1, 50) :]

    def head(data: bytes) -> bytes:
        found = bytearray(data)
        for _ in range(4):
            found[rng.randrange(min(64, len(found)))] = rng.randrange(256)
        return bytes(found)

    return [
        lambda data: data[: rng.randrange(len(data))],
        flipped,
        zeroed,
        missing,
        head,
        lambda data: data[: len(data) // 2] + encoded("PNG", 99)[-300:],
        lambda data: rng.randbytes(rng.randrange(400)),
    ]


def test_a_thousand_damaged_files_are_all_accounted_for(tmp_path: Path) -> None:
    """None crashes or hangs the run; each is an image, or stands in the report."""
    rng = random.Random(0)
    kinds = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm", "TGA": "tga"}
    kinds |= {"WEBP": "webp"} if features.check("webp") else {}
    root = tmp_path / "photos"
    root.mkdir()
    names = []
    for number in range(1200):
        kind = rng.choice(list(kinds))
        name = f"{number:04d}.{kinds[kind]}"
        (root / name).write_bytes(rng.choice(damages(rng))(encoded(kind, number)))
        names.append(str(root / name))
    report = tmp_path / "bad.jsonl"
    data = module(root, max_bad_share=1.0, report=report, batch_size=50)
    with pytest.warns(UserWarning, match=r"Left out \d+ of 1200 images"):
        data.setup("fit")
    bad = read_faults(report)
    kept = [path for path, _ in data.dataset("train").files]
    assert sorted([*bad, *kept]) == sorted(names)
    assert len(bad) > 500
    assert len(kept) > 100
    for line in report.read_text().splitlines():
        assert set(json.loads(line)) == {"name", "reason"}
    # And in training, unseen before: every batch is whole, and the same files stand in the report.
    met = tmp_path / "met.jsonl"
    unseen = module(root, max_bad_share=1.0, report=met, verify=False, batch_size=50)
    for batch in unseen.train_dataloader():
        assert batch["image"].shape == (50, 3, 16, 16)
        assert batch["image"].isfinite().all()
    assert read_faults(met) == bad


def test_a_report_that_could_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for report, said in (
        (tmp_path, "must be a file, but"),
        (tmp_path / "file" / "x" / "a.jsonl", "is a file. Give an"),
    ):
        with pytest.raises(ValueError, match=said):
            Faults(report=report)
        with pytest.raises(ValueError, match=said):
            Faults().begin(report)
    Faults(report=tmp_path / "new" / "a.jsonl")
