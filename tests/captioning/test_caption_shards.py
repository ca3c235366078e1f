"""``lpl caption`` of tar shards: new shards that training reads, however often a run was killed."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from captioners import blip, florence, full_disk, photo, transformers
from conftest import ROOT
from forked import LPL, Script, ended_well
from PIL import Image

from lpl_lightning.captioning.shards import ShardImages
from lpl_lightning.cli import main
from lpl_lightning.data import WebDatasetDataModule
from lpl_lightning.data.shards import Contents, TarStream
from lpl_lightning.data.webdataset import find_shards

webdataset: Any = import_module("webdataset")

# Random models end where they must, so nearly every caption may be cut off.
pytestmark = pytest.mark.filterwarnings("ignore:.*reached `max_new_tokens` and may be cut off")
BAD = pytest.mark.filterwarnings(
    "ignore:.*could not be captioned", "ignore:.*cannot be used as they are", "ignore:.*have an empty caption"
)
TASK = "<MORE_DETAILED_CAPTION>"
SHORT = ("--max_new_tokens=8", "--batch_size=2", "--num_workers=0", "--device=cpu")
File = tuple[str, bytes]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "florence"
    florence(folder)
    return folder


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def jpeg(number: int) -> bytes:
    content = io.BytesIO()
    photo(16 + number % 9, number).save(content, "JPEG", quality=95)
    return content.getvalue()


def write_shards(folder: Path, lengths: list[int]) -> list[Path]:
    """Shards as img2dataset has them written: by webdataset, a photo, its text and what is known of it a sample."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, number = [], 0
    for shard, length in enumerate(lengths):
        paths.append(folder / f"{shard:05}.tar")
        with webdataset.TarWriter(str(paths[-1])) as writer:
            for index in range(length):
                key = f"{shard:05}{index:04}"
                known = json.dumps({"key": key, "status": "success"})
                writer.write({"__key__": key, "jpg": jpeg(number), "txt": f"old {number}", "json": known.encode()})
                number += 1
    return paths


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", [5, 4, 3])
    return tmp_path / "shards"


def spoil(path: Path, number: int) -> None:
    """Put something else in the place of a photo."""
    content, image = path.read_bytes(), jpeg(number)
    assert content.count(image) == 1
    path.write_bytes(content.replace(image, b"x" * len(image)))


def caption(images: object, model: Path, out: Path | None, *args: str) -> None:
    given = [] if out is None else [f"--out={out}"]
    main(["caption", str(images), f"--model={model}", *SHORT, *given, *args])


def report(out: Path) -> Any:
    return json.loads((out / "captions-report.json").read_text())


def members(path: Path) -> list[tuple[object, ...]]:
    """What tarfile says of all members, and what is in them."""
    with tarfile.open(path) as archive:
        return [
            (one.name, one.type, one.linkname, one.mode, one.uid, one.uname, one.mtime)
            + (file.read() if one.isreg() and (file := archive.extractfile(one)) else b"",)
            for one in archive
        ]


def captions_in(path: Path, member: str = "caption.txt") -> dict[str, str]:
    found = {str(one[0]): one[-1] for one in members(path)}
    named = {name: name.partition(".") for name in found}
    return {key: found[name].decode() for name, (key, _, ending) in named.items() if ending == member}  # type: ignore[attr-defined]


def by_hand(model: Path, path: Path) -> dict[str, str]:
    """Florence-2 called on one image of a shard at a time."""
    loaded = transformers.Florence2ForConditionalGeneration.from_pretrained(model)
    processor = transformers.AutoProcessor.from_pretrained(model)
    found = {}
    for name, *_, content in members(path):
        if str(name).endswith(".jpg"):
            image = Image.open(io.BytesIO(content))  # type: ignore[arg-type]
            inputs = processor(text=TASK, images=image, return_tensors="pt")
            tokens = loaded.generate(**inputs, max_new_tokens=8, do_sample=False)
            text = processor.batch_decode(tokens, skip_special_tokens=False)[0]
            text = processor.post_process_generation(text, task=TASK, image_size=image.size)[TASK]
            found[str(name).removesuffix(".jpg")] = " ".join(text.split())
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def module(urls: object, **options: Any) -> WebDatasetDataModule:
    given: dict[str, Any] = {"val_urls": str(urls), "batch_size": 2, "num_workers": 0, "max_bad_share": 1.0}
    return WebDatasetDataModule(str(urls), 16, **(given | options))


# What it writes


def test_new_shards_hold_the_old_ones_and_captions(shards: Path, tiny: Path, tmp_path: Path) -> None:
    before = files_of(shards)
    caption(shards / "{00000..00002}.tar", tiny, tmp_path / "out")
    assert files_of(shards) == before
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == sorted(before)
    everything = set()
    for path in sorted(shards.iterdir()):
        new = members(tmp_path / "out" / path.name)
        assert [one for one in new if not str(one[0]).endswith(".caption.txt")] == members(path)
        expected = by_hand(tiny, path)
        assert captions_in(tmp_path / "out" / path.name) == expected
        everything |= set(expected.values())
        # Beside the others of its sample, without which a reader would not find it.
        keys = [str(one[0]).partition(".")[0] for one in new]
        assert keys == sorted(keys)
        assert [keys.count(key) for key in expected] == [4] * len(expected)
        # What is new has nothing of the time or the machine in it.
        assert all(one[1:7] == (b"0", "", 0o644, 0, "", 0) for one in new if str(one[0]).endswith(".caption.txt"))
    assert len(everything) >= 8
    assert report(tmp_path / "out")["counts"] == {
        "shards": 3, "shards_written": 3, "images": 12, "captioned": 12, "not_captioned_yet": 0, "failed": 0,
        "empty": 0, "reached_max_new_tokens": 10, "faults": 0,
    }  # fmt: skip
    assert "00001.tar/000010000" in report(tmp_path / "out")["reached_max_new_tokens"]
    record = json.loads((tmp_path / "out" / "captions-record.json").read_text())
    assert record["shards"] == {"member": "caption.txt"}
    # A second run has nothing to do, and no need of the model's weights.
    state = files_of(tmp_path / "out")
    caption(shards, tiny, tmp_path / "out", "--num_workers=1")
    assert files_of(tmp_path / "out") == state


def test_training_reads_them(shards: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    caption(shards, tiny, out)
    expected = {key: text for path in sorted(shards.iterdir()) for key, text in by_hand(tiny, path).items()}
    data = module(out, caption="caption.txt")
    assert list(data.validation_captions()) == list(expected.values())
    # The caption beside an image in training is that of this image.
    pictures = {}
    for path in sorted(shards.iterdir()):
        for name, *_, content in members(path):
            if str(name).endswith(".jpg"):
                item = module(shards).dataset("val").prepare.transform(Image.open(io.BytesIO(content)))  # type: ignore[arg-type]
                pictures[str(name).removesuffix(".jpg")] = item["image"]
    seen = 0
    for batch in data.train_dataloader():
        for image, text in zip(batch["image"], batch["caption"], strict=True):
            (key,) = [key for key, other in pictures.items() if torch.equal(image, other)]
            assert text == expected[key]
            seen += 1
    assert seen == 12
    # The old captions are still there: alone, and drawn along with the new ones.
    assert list(module(out, caption="txt").validation_captions()) == [f"old {number}" for number in range(12)]
    torch.manual_seed(0)
    drawn = module(out, caption=["caption.txt", "txt"], batch_size=4)
    texts = [text for batch in drawn.train_dataloader() for text in batch["caption"]]
    assert 0 < sum(text.startswith("old ") for text in texts) < 12
    # As the documentation says it.
    args = ["--data.urls", str(out), "--data.caption", "caption.txt", "--data.batch_size", "2"]
    configs = ["configs/cc12m256.yaml", "configs/tiny.yaml", "configs/data/webdataset.yaml"]
    given = [word for config in configs for word in ("-c", str(ROOT / config))]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.logger.init_args.save_dir={tmp_path / 'runs'}"]
    main(["fit", *given, *args, *quiet])
    assert list((tmp_path / "runs").rglob("samples/step-00000002.png"))


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_compressed_shards_become_plain_ones(shards: Path, tiny: Path, tmp_path: Path, mode: str) -> None:
    (tmp_path / "packed").mkdir()
    for path in sorted(shards.iterdir())[:2]:
        with (
            tarfile.open(path) as old,
            tarfile.open(tmp_path / "packed" / f"{path.name}.{mode[2:]}", mode) as new,  # type: ignore[call-overload]
        ):
            for one in old:
                new.addfile(one, old.extractfile(one))
    caption(tmp_path / "packed", tiny, tmp_path / "out", "--num_workers=1")
    caption(shards / "0000{0,1}.tar", tiny, tmp_path / "plain")
    for name in ("00000.tar", "00001.tar"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_loader_processes_and_batches_of_one_change_nothing(shards: Path, tiny: Path, tmp_path: Path) -> None:
    caption(shards, tiny, tmp_path / "a")
    caption(shards, tiny, tmp_path / "b", "--num_workers=2")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_captions_may_replace_the_old_ones(shards: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`member`: 5 samples of .*00000\.tar have txt already: 000000000, .*overwrite"
    ):
        caption(shards, tiny, tmp_path / "out", "--member=txt")
    assert not list((tmp_path / "out").glob("*.tar"))
    caption(shards, tiny, tmp_path / "out", "--member=txt", "--overwrite=true")
    for path in shards.iterdir():
        assert captions_in(tmp_path / "out" / path.name, "txt") == by_hand(tiny, path)
        assert len(members(tmp_path / "out" / path.name)) == len(members(path))
    # By a second model beside the first.
    florence(tmp_path / "other", seed=1)
    caption(tmp_path / "out", tmp_path / "other", tmp_path / "both", "--member=other.txt")
    assert captions_in(tmp_path / "both" / "00000.tar", "other.txt") == by_hand(
        tmp_path / "other", shards / "00000.tar"
    )
    assert captions_in(tmp_path / "both" / "00000.tar", "txt") == by_hand(tiny, shards / "00000.tar")


def test_empty_captions_are_no_members(shards: Path, tmp_path: Path) -> None:
    blip(tmp_path / "blip", ends_at_once=True)
    with pytest.warns(UserWarning, match=r"5 of 5 images have an empty caption"):
        caption(shards / "00000.tar", tmp_path / "blip", tmp_path / "out")
    assert members(tmp_path / "out" / "00000.tar") == members(shards / "00000.tar")
    assert report(tmp_path / "out")["empty"] == [f"00000.tar/{number:09}" for number in range(5)]
    # Nor is the caption that one was to replace.
    with pytest.warns(UserWarning, match=r"5 of 5 images have an empty caption"):
        caption(shards / "00000.tar", tmp_path / "blip", tmp_path / "new", "--member=txt", "--overwrite=true")
    assert captions_in(tmp_path / "new" / "00000.tar", "txt") == {}
    assert len(members(tmp_path / "new" / "00000.tar")) == len(members(shards / "00000.tar")) - 5


# Shards that are damaged


def damaged_shards(folder: Path) -> Path:
    """Every kind of damage that ``WebDatasetDataModule`` knows, and members that it passes over."""
    folder.mkdir()
    odd: list[tuple[str, bytes | None]] = [
        ("sub", None),
        ("sub/a.jpg", jpeg(1)),
        ("sub/a.txt", b"old a"),
        ("link.jpg", None),
        ("b.jpg", jpeg(2)[:200]),
        ("b.txt", b"old b"),
        ("c.jpg", b""),
        ("noimage.txt", b"old"),
        ("__meta__", b"{}"),
        ("README", b"no dot"),
        ("d.JPG", jpeg(3)),
        ("d.jpg", jpeg(4)),
        ("e.jpg", jpeg(5)),
        ("sub/a.jpg", jpeg(6)),
        ("noimage.jpg", jpeg(7)),
        ("é.jpg", jpeg(8)),
    ]
    with tarfile.open(folder / "0.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in odd:
            header = tarfile.TarInfo(name)
            if content is None:
                header.type, header.linkname = (tarfile.DIRTYPE, "") if name == "sub" else (tarfile.SYMTYPE, "e.jpg")
            header.size, header.mtime, header.uname = len(content or b""), 1234567890, "someone"
            archive.addfile(header, io.BytesIO(content or b""))
    (cut, damaged, lone, other) = write_shards(folder / "more", [4, 4, 1, 2])
    cut.rename(folder / "1.tar")
    content = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(content[: content.index(jpeg(2)) + 100])
    with tarfile.open(damaged) as archive:
        at = archive.getmember("000010001.jpg")
    content = damaged.read_bytes()
    lost = b"x" * (at.offset_data - at.offset)
    (folder / "2.tar").write_bytes(content[: at.offset] + lost + content[at.offset_data :])
    (folder / "3.tar").write_bytes(b"no archive" * 200)
    packed = gzip.compress(lone.read_bytes() + other.read_bytes(), 0)
    (folder / "4.tar.gz").write_bytes(packed[: packed.index(jpeg(10)) + 100])
    shutil.rmtree(folder / "more")
    return folder


@BAD
def test_damage_costs_what_it_costs_in_training(tiny: Path, tmp_path: Path) -> None:
    old, out = damaged_shards(tmp_path / "old"), tmp_path / "out"
    caption(old, tiny, out)
    said = report(out)
    scan = TarStream(find_shards(str(old), "urls", False, False), Contents(("jpg",))).scan(False)
    expected = {name.removeprefix(f"{old}/"): why for name, why in scan.faults.items()}
    assert expected.keys() == {
        "0.tar/noimage", "0.tar/d.jpg", "0.tar/sub/a", "1.tar", "2.tar", "2.tar/000010001", "3.tar", "4.tar.gz",
    }  # fmt: skip
    assert said["faults"] == expected, "what the data module says of the old ones"
    assert scan.lengths == [6, 2, 3, 0, 2]
    assert (said["counts"]["images"], said["counts"]["faults"]) == (13, 8)
    assert said["failed"].keys() == {"0.tar/b", "0.tar/c"}
    # All that can be read of the old ones, in shards that are whole.
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["0.tar", "1.tar", "2.tar", "4.tar"]
    assert [one for one in members(out / "0.tar") if not str(one[0]).endswith(".caption.txt")] == members(old / "0.tar")
    assert list(captions_in(out / "0.tar")) == ["sub/a", "d", "e", "é"]
    assert list(captions_in(out / "1.tar")) == ["000000000", "000000001"]
    assert list(captions_in(out / "2.tar")) == ["000010000", "000010002", "000010003"]
    assert [name for name, *_ in members(out / "2.tar")][4:6] == ["000010001.json", "000010001.txt"]
    new = TarStream(find_shards(str(out), "urls", False, False), Contents(("jpg",), None, ("caption.txt",))).scan(False)
    left = {name.removeprefix(f"{out}/"): why for name, why in new.faults.items()}
    assert left.keys() == {
        "0.tar/b", "0.tar/c", "0.tar/noimage", "0.tar/d.jpg", "0.tar/sub/a", "2.tar/000010001",
    }  # fmt: skip
    assert left["0.tar/b"] == "no caption (it has jpg, txt)"
    # On demand the first of them ends it.
    with pytest.raises(ValueError, match=r"old/0\.tar/.* cannot be captioned \(.*set `on_error` to skip"):
        caption(old, tiny, tmp_path / "other", "--on_error=raise")


def test_an_image_that_cannot_be_read_stops_it_if_asked(shards: Path, tiny: Path, tmp_path: Path) -> None:
    spoil(shards / "00001.tar", 6)
    with pytest.raises(ValueError, match=rf"{shards}/00001\.tar/000010001 cannot be captioned \(not an image"):
        caption(shards, tiny, tmp_path / "out", "--on_error=raise")
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00000.tar"]
    with pytest.warns(UserWarning, match=r"1 of 12 images could not be captioned"):
        caption(shards, tiny, tmp_path / "out")
    assert len(captions_in(tmp_path / "out" / "00001.tar")) == 3


def test_sparse_members_and_those_too_large_to_read(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GNU tar leaves out the holes of a file, which a copy must not do."""
    (tmp_path / "files").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(1))
    with (tmp_path / "files" / "a.bin").open("wb") as file:
        file.seek(1 << 16)
        file.write(b"end")
    (tmp_path / "files" / "a.raw").write_bytes(b"b" * 100_000)
    for name, options in (("gnu", ["--format=gnu"]), ("pax", ["--format=pax"])):
        command = ["tar", "--sparse", *options, "-cf", str(tmp_path / "old" / f"{name}.tar"), "a.jpg", "a.raw", "a.bin"]
        subprocess.run(command, cwd=tmp_path / "files", check=True)
    monkeypatch.setattr("lpl_lightning.data.tar_members.LARGEST", 80_000)
    with pytest.warns(UserWarning, match=r"2 samples or shards cannot be used as they are"):
        caption(tmp_path / "old", tiny, tmp_path / "out")
    for name in ("gnu.tar", "pax.tar"):
        found = {one[0]: one[-1] for one in members(tmp_path / "out" / name)}
        assert found.keys() == {"a.jpg", "a.bin", "a.caption.txt"}
        assert found["a.bin"] == (tmp_path / "files" / "a.bin").read_bytes()
        assert "has a.raw of 100,000 bytes, more than the 80,000" in report(tmp_path / "out")["faults"][name]


# Going on

LONG = ("--batch_size=3",)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and what a run that nothing stops makes of them."""
    folder = tmp_path_factory.mktemp("whole")
    write_shards(folder / "old", [14, 14, 14, 7])
    spoil(folder / "old" / "00001.tar", 17)
    with pytest.warns(UserWarning, match=r"1 of 49 images could not be captioned"):
        caption(folder / "old", tiny, folder / "new", *LONG)
    return folder


def captioning(images: Path, model: Path, out: Path, *args: str, script: Sequence[str | Path] = (LPL,)) -> Script:
    """A real process that captions."""
    return Script(*script, "caption", images, f"--model={model}", f"--out={out}", *SHORT, *LONG, *args)


def rows(out: Path, name: str) -> int:
    part = out / "captions-parts" / name / "part-0-of-1.jsonl"
    return part.read_bytes().count(b"\n") if part.exists() else 0


@BAD
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_continued_it_is_as_if_it_had_not_been(
    whole: Path, tiny: Path, tmp_path: Path, processes: int
) -> None:
    out = tmp_path / "out"
    shares = [f"--shard={index}/{processes}" for index in range(processes)]
    running = [captioning(whole / "old", tiny, out, share) for share in shares]
    until = time.monotonic() + 120
    # Each is within its second shard.
    second = [f"{index + processes:05}.tar" for index in range(processes)]
    alive = dict(zip(running, second, strict=True))
    while alive and time.monotonic() < until:
        for one in [one for one, name in alive.items() if rows(out, name)]:
            one.process.kill()
            del alive[one]
        time.sleep(0.002)
    assert [one.end().returncode for one in running] == [-signal.SIGKILL] * processes
    written = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert out / "00000.tar" in written
    assert len(written) < 4, "it was to be killed in the middle"
    if processes == 1:
        assert 3 <= rows(out, second[0]) < 14
    ended_well(*(captioning(whole / "old", tiny, out, share) for share in shares))
    assert files_of(out) == files_of(whole / "new")
    assert all(path.stat().st_mtime_ns == then for path, then in written.items()), "what is finished is left alone"


@BAD
def test_killed_while_it_writes_a_shard_it_loses_no_caption(whole: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (Path(__file__).with_name("dying_run.py"), ".00001.tar.", "1")
    assert captioning(whole / "old", tiny, out, script=script).end().returncode == -signal.SIGKILL
    assert [path.name for path in out.rglob("*.unfinished")] == [".00001.tar.part-0-of-1.unfinished"]
    assert [path.name for path in out.glob("[0-9]*.tar")] == ["00000.tar"]
    part = out / "captions-parts" / "00001.tar" / "part-0-of-1.jsonl"
    before = part.read_bytes()
    assert before.count(b"\n") == 14
    caption(whole / "old", tiny, out, *LONG)
    assert part.read_bytes() == before
    assert files_of(out) == files_of(whole / "new")


@BAD
def test_shares_are_of_whole_shards(whole: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    caption(whole / "old", tiny, out, *LONG, "--shard=2/3", "--limit=5")  # and is stopped
    assert report(out)["counts"]["captioned"] == 6
    assert report(out)["counts"]["shards_written"] == 0
    caption(whole / "old", tiny, out, *LONG, "--shard=1/2")  # It goes on as two.
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["00001.tar", "00003.tar"]
    assert report(out)["counts"] == {
        "shards": 4, "shards_written": 2, "images": 35, "captioned": 26, "not_captioned_yet": 8, "failed": 1,
        "empty": 0, "reached_max_new_tokens": 24, "faults": 0,
    }  # fmt: skip
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    caption(whole / "old", tiny, out, *LONG)
    assert files_of(out) == files_of(whole / "new")
    # More processes than shards.
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "8")
    caption(whole / "old", tiny, out, *LONG)
    assert files_of(out).keys() == files_of(whole / "new").keys()


def test_a_deleted_shard_is_written_anew_without_the_model(
    shards: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    caption(shards, tiny, out)
    state = files_of(out)
    (out / "00001.tar").unlink()
    monkeypatch.setattr("lpl_lightning.captioning.models.Captioner.__init__", None)
    caption(shards, tiny, out)
    assert files_of(out) == state


def test_it_can_be_tried_out(shards: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    caption(shards, tiny, out, "--limit=7")
    counts = report(out)["counts"]
    assert [counts[name] for name in ("shards_written", "images", "captioned", "not_captioned_yet")] == [1, 9, 7, 2]
    caption(shards, tiny, out, "--limit=0")
    assert report(out)["counts"] == counts
    caption(shards, tiny, out)
    caption(shards, tiny, tmp_path / "once")
    assert files_of(out) == files_of(tmp_path / "once")


def test_shards_that_are_added_are_captioned(shards: Path, tiny: Path, tmp_path: Path) -> None:
    caption(shards / "00000.tar", tiny, tmp_path / "out")
    caption(shards, tiny, tmp_path / "out")
    caption(shards, tiny, tmp_path / "once")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "once")


def test_a_full_disk_is_one_error_and_it_goes_on_later(
    shards: Path, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    caption(shards, tiny, tmp_path / "once")
    for size, file in ((20, r"captions-record\.json"), (1500, r"out/00000\.tar")):
        capfd.readouterr()  # what is printed goes to a file too
        with full_disk(size), pytest.raises(ValueError, match=rf"{file} cannot be written \(.*call the same command"):
            caption(shards, tiny, out)
        assert not list(out.glob("*.tar"))
        assert not list(out.rglob(".*"))
    caption(shards, tiny, out)
    assert files_of(out) == files_of(tmp_path / "once")


def test_too_little_room_is_warned_of(
    shards: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.warns(UserWarning, match=r"has room for 1,000 bytes, but what is to be written takes over 102,400"):
        caption(shards, tiny, tmp_path / "out", "--limit=0")


# What it refuses


@BAD
def test_another_model_other_settings_and_other_shards_are_refused(shards: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    caption(shards / "0000{0,1}.tar", tiny, out)
    florence(tmp_path / "other", seed=1)
    state = files_of(out)
    with pytest.raises(ValueError, match=r"holds captions of another model.*: weights_blake2b was '\w+' and is '\w+'"):
        caption(shards, tmp_path / "other", out)
    with pytest.raises(
        ValueError, match=r": num_beams was None and is 2; member was 'caption.txt' and is 'a.txt'\. Go"
    ):
        caption(shards, tiny, out, "--num_beams=2", "--member=a.txt")
    with tarfile.open(shards / "00001.tar") as archive:
        archive.extractall(tmp_path / "photos", filter="data")
    with pytest.raises(ValueError, match=r"folder was None and is '.*photos'"):
        caption(tmp_path / "photos", tiny, out)
    assert files_of(out) == state
    # A shard that was replaced, whether its captions are finished or not.
    (shards / "00001.tar").write_bytes((shards / "00000.tar").read_bytes() + bytes(10240))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"00001\.tar has [\d,]+ bytes, and had [\d,]+ when .* anew, remove .* and"
        ):
            caption(shards, tiny, out)
        (out / "00001.tar").unlink(missing_ok=True)
    shutil.rmtree(out / "captions-parts" / "00001.tar")
    caption(shards, tiny, out)
    assert list(captions_in(out / "00001.tar").values()) == list(captions_in(out / "00000.tar").values())


def test_shards_from_elsewhere_are_kept(shards: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "00001.tar").write_bytes(b"mine")
    with pytest.raises(
        ValueError, match=r"1 shards are there that `lpl caption` did not write, .*out/00001\.tar\. Move"
    ):
        caption(shards, tiny, out)
    assert files_of(out) == {"00001.tar": b"mine"}
    caption(shards, tiny, out, "--overwrite=true")
    assert captions_in(out / "00001.tar") == by_hand(tiny, shards / "00001.tar")
    # One that was cut off since, as by a copy that did not end.
    (out / "00000.tar").write_bytes((out / "00000.tar").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"1 shards are there that .* or not so: .*00000\.tar"):
        caption(shards, tiny, out)


@pytest.mark.parametrize(
    ("images", "out", "args", "message"),
    [
        ("old", None, [], r"`out` must be a folder for the new shards: those of `images` are left as they are"),
        ("old", "old", [], r"`out` must be another folder than that of the shards, but .*00000\.tar is in it"),
        ("links", "old", [], r"`out` must be another folder than that of the shards, but .*links/00000\.tar is in it"),
        ("links", "links", [], r"`out` must be another folder than that of the shards"),
        (
            "old",
            "out",
            ["--format=sidecar"],
            r"`format`='sidecar' is of folders; captions of shards go into new shards",
        ),
        ("old", "out", ["--member=Caption.txt"], r"`member` must be what follows .* in lower case .*got 'Caption.txt'"),
        ("old", "out", ["--member=jpg"], r"`member` must be .* no ending of images"),
        ("old", "out", ["--member=a/b"], r"`member` must be what follows a sample's key"),
        ("photos", "out", ["--member=a"], r"`member`='a' is of shards, but `images`='.*photos' names none"),
        ("both", "out", [], r"holds tar shards \(0\.tar\) and images \(.*a\.png\)\. Name the shards, as in '.*0\.tar'"),
        ("nothing", "out", [], r"`images` must hold images, but no file in .*nothing"),
        (
            "old/0000{8..9}.tar",
            "out",
            [],
            r"`images` must name tar files or folders of them, but .*08\.tar is not there",
        ),
        ("https://x.org/{0..3}.tar", "out", [], r"must be shards in files, got https://x.org/0.tar, .*Download them"),
        ("pipe:touch ran", "out", [], r"must be shards in files, got pipe:touch ran"),
        ("old/00000.tar::old/00000.tar", "out", [], r"each shard once, but has .*00000\.tar several times"),
        ("old/00000.tar::links/00000.tar", "out", [], r"old/00000\.tar and .*links/00000\.tar would both become 00000"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str, out: str | None, args: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (old,) = write_shards(tmp_path / "old", [2])
    for name in ("links", "photos", "both", "nothing"):
        (tmp_path / name).mkdir()
    (tmp_path / "links" / "00000.tar").symlink_to(old)
    (tmp_path / "both" / "0.tar").write_bytes(b"")
    photo(16, 0).save(tmp_path / "both" / "a.png")
    photo(16, 0).save(tmp_path / "photos" / "a.png")
    before = files_of(tmp_path)
    given = images if ":" in images else tmp_path / images
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        caption(given, tiny, None if out is None else tmp_path / out, *args)
    assert files_of(tmp_path) == before


def test_a_pattern_without_quotes_is_refused(tiny: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`lpl caption` takes one folder or, in quotes, pattern of shards, got a.tar b"
    ):
        main(["caption", "a.tar", "b.tar", f"--model={tiny}"])


def test_images_are_found_by_their_numbers_in_any_order(shards: Path) -> None:
    images = ShardImages(shards / "00000.tar", range(5))
    for number in (0, 1, 4, 2, 2, 3, 0):
        assert images[number] == jpeg(number)
