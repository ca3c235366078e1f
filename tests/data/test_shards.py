from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from shard_files import File, bare_tar, photo, png, sample, write_shards

from lpl_lightning.data.faults import Unreadable
from lpl_lightning.data.reading import read_rgb
from lpl_lightning.data.shards import Contents, Scan, TarStream

CONTENTS = Contents(("png", "jpg"), "cls", ("txt",), ("0", "1", "2"))


def written(folder: Path, *shards: list[File] | bytes) -> list[str]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.tar" for number in range(len(shards))]
    for path, files in zip(paths, shards, strict=True):
        path.write_bytes(files if isinstance(files, bytes) else bare_tar(files))
    return [str(path) for path in paths]


def read(
    shards: list[str], contents: Contents = CONTENTS, scan: Scan | None = None
) -> tuple[list[str], dict[str, str]]:
    """Captions of the samples whose images can be decoded too, or their keys, and what is wrong with others."""
    stream = TarStream(shards, contents, None if scan is None else scan.skipped)
    good, bad = [], {}
    for shard in range(len(shards)):
        for handle in stream.read(shard):
            try:
                found = handle()
                assert isinstance(found.image, bytes)
                read_rgb(found.image, found.name)
                good.append(found.captions[0] if found.captions else found.key)
            except Unreadable as fault:
                bad[fault.name] = fault.reason
    return good, bad


def samples(*numbers: int) -> list[File]:
    return [file for number in numbers for file in sample(number)]


def test_members_of_one_key_are_a_sample(tmp_path: Path) -> None:
    (shard,) = shards = write_shards(tmp_path, [3])
    stream = TarStream(shards, CONTENTS)
    handles, bare = stream.read(0), stream.read(0, images=False)
    assert next(handles)() == (f"{shard}/000", "000", png(photo(0)), 0, ("photo 0",))
    assert next(bare)().image == b""
    assert stream.scan() == ([3], {}, {})


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards(tmp_path: Path, mode: str) -> None:
    shards = written(tmp_path, bare_tar(samples(0, 1), mode))
    assert read(shards) == (["photo 0", "photo 1"], {})
    whole = Path(shards[0]).read_bytes()
    Path(shards[0]).write_bytes(whole[: len(whole) - 60])
    good, bad = read(shards)
    assert good in ([], ["photo 0"], ["photo 0", "photo 1"])
    assert "is cut off" in bad[shards[0]]
    scan = TarStream(shards, CONTENTS).scan()
    assert read(shards, scan=scan) == (good, {})


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ([("9.cls", b"0"), ("9.txt", b"x")], "9", r"no image \(it has cls, txt\)"),
        ([("9.png", b""), ("9.txt", b"x")], "9", r"no label \(it has png, txt\)"),
        ([("9.png", b""), ("9.cls", b"0")], "9", r"no caption \(it has png, cls\)"),
        ([("9.png", b""), ("9.cls", b"0"), ("9.png", b"")], "9.png", "two members of this name"),
        (sample(0), "000", "the shard has this key twice"),
    ],
)
def test_what_headers_show_is_found_by_both_ways(tmp_path: Path, files: list[File], name: str, message: str) -> None:
    good = [("9.txt", b"x")] if "two members" in message else []
    (shard,) = shards = written(tmp_path, [*samples(0, 1), *files, *good, *samples(2)])
    captions, bad = read(shards)
    assert captions == [f"photo {number}" for number in range(3)]
    assert bad[f"{shard}/{name}"].startswith(message.split(r" \(")[0]) or message in bad[f"{shard}/{name}"]
    scan = TarStream(shards, CONTENTS).scan()
    assert scan.faults[f"{shard}/{name}"] == bad[f"{shard}/{name}"]
    captions, later = read(shards, scan=scan)
    assert captions == [f"photo {number}" for number in range(3)]
    assert not later.keys() & scan.faults.keys()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("9.png", b"torn"), ("9.cls", b"0"), ("9.txt", b"x")], "not an image"),
        ([("9.png", b""), ("9.cls", b"0"), ("9.txt", b"x")], "it is empty"),
        ([("9.png", png(photo(1))[:60]), ("9.cls", b"0"), ("9.txt", b"x")], "OSError"),
        (
            [("9.png", png(photo(1))), ("9.cls", b"3"), ("9.txt", b"x")],
            "label 3 is neither a class nor an index below 3",
        ),
        ([("9.png", png(photo(1))), ("9.cls", b"-1"), ("9.txt", b"x")], "label '-1' is neither"),
        ([("9.png", png(photo(1))), ("9.cls", b"1"), ("9.txt", b" \n")], "no caption in txt"),
        ([("9.png", png(photo(1))), ("9.cls", b"1"), ("9.txt", b"caf\xe9")], "its txt is not UTF-8"),
    ],
)
def test_what_is_wrong_within_members_costs_one_sample(tmp_path: Path, files: list[File], message: str) -> None:
    shards = written(tmp_path, [*samples(0), *files, *samples(1)])
    captions, bad = read(shards)
    assert captions == ["photo 0", "photo 1"]
    ((name, found),) = bad.items()
    assert name == f"{shards[0]}/9"
    assert message in found
    assert TarStream(shards, CONTENTS).scan().lengths == [3]


def test_a_key_of_another_shard_is_one_too_many_unless_that_is_allowed(tmp_path: Path) -> None:
    shards = written(tmp_path, samples(0, 1), samples(1, 2), samples(0))
    scan = TarStream(shards, CONTENTS).scan()
    assert scan.lengths == [2, 1, 0]
    assert set(scan.faults) == {f"{shards[1]}/001", f"{shards[2]}/000"}
    assert shards[0] in scan.faults[f"{shards[2]}/000"]
    assert read(shards, scan=scan) == (["photo 0", "photo 1", "photo 2"], {})
    assert TarStream(shards, CONTENTS).scan(across=False) == ([2, 2, 1], {}, {})


def test_a_shard_cut_off_anywhere_loses_only_what_is_cut(tmp_path: Path) -> None:
    whole = bare_tar(samples(0, 1, 2))
    ends = [tarfile_end(whole, f"{number:03}.txt") for number in range(3)]
    for cut in [*range(0, len(whole), 97), *(end - 3 for end in ends)]:
        (shard,) = shards = written(tmp_path, whole[:cut])
        captions, bad = read(shards)
        assert captions == [f"photo {number}" for number in range(3) if ends[number] <= cut], cut
        assert (shard in bad) == (cut < len(whole) - 512), cut
        scan = TarStream(shards, CONTENTS).scan()
        assert scan.faults == bad
        assert read(shards, scan=scan) == (captions, {})


def tarfile_end(content: bytes, name: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        header = archive.getmember(name)
    return header.offset_data + header.size


@pytest.mark.parametrize("seed", range(4))
def test_damaged_shards_never_end_or_hang_a_run(tmp_path: Path, seed: int) -> None:
    """Bytes changed, cut out and put in at random, 75 times: each sample is given, or it or its shard is named."""
    rng, whole = np.random.default_rng(seed), bare_tar(samples(0, 1, 2), mtime=seed % 2 / 2)
    for _ in range(75):
        content = bytearray(whole)
        for place in rng.integers(len(content), size=rng.integers(1, 20)).tolist():
            content[place] = int(rng.integers(256))
        start = int(rng.integers(len(content)))
        if rng.random() < 0.3:
            del content[start : start + int(rng.integers(1, 3000))]
        elif rng.random() < 0.3:
            content[start:start] = rng.bytes(int(rng.integers(1, 3000)))
        shards = written(tmp_path, bytes(content))
        captions, bad = read(shards)
        scan = TarStream(shards, CONTENTS).scan()
        assert len(captions) + len(bad) > 0
        assert scan.faults.keys() <= bad.keys()
        again, later = read(shards, scan=scan)
        assert again == captions
        assert scan.lengths[0] == len(again) + len(later)
        lost = {f"photo {number}" for number in range(3)} - set(captions)
        assert not lost or bad


@pytest.mark.parametrize("which", [0, 512])
def test_reading_goes_on_where_one_of_two_headers_is_damaged(tmp_path: Path, which: int) -> None:
    """As webdataset's writer makes two for each member."""
    content = bytearray(bare_tar(samples(0, 1, 2), mtime=0.5))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        header = archive.getmember("001.png")
        assert header.offset_data - header.offset == 1536
    # The first says what is in the block that follows it; the last is the member's own.
    content[(header.offset if which == 0 else header.offset_data - 512) + 3] ^= 1
    shards = written(tmp_path, bytes(content))
    captions, bad = read(shards)
    assert captions == (["photo 0", "photo 1", "photo 2"] if which == 0 else ["photo 0", "photo 2"])
    assert "blocks are no headers" in bad[shards[0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cut off"), (b"words, no tar" * 100, "blocks are no headers"), (b"\0" * 10240, None)],
)
def test_files_that_are_no_archives(tmp_path: Path, content: bytes, message: str | None) -> None:
    shards = written(tmp_path, content)
    captions, bad = read(shards)
    assert captions == []
    assert (message is None and not bad) or message in bad[shards[0]]  # type: ignore[operator]
    Path(shards[0]).unlink()
    assert "cannot be opened (FileNotFoundError" in read(shards)[1][shards[0]]


def test_a_size_below_zero_ends_the_shard_and_one_too_large_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = tarfile.TarInfo("9.png")
    header.size = -512
    negative = header.tobuf(tarfile.GNU_FORMAT)
    shards = written(tmp_path, bare_tar(samples(0))[:-1024] + negative + bare_tar(samples(1)))
    captions, bad = read(shards)
    assert captions == ["photo 0"]
    assert "damaged" in bad[shards[0]]
    shards = written(tmp_path, [*samples(0), ("9.png", b"x" * 2000), ("9.cls", b"0"), ("9.txt", b"x"), *samples(1)])
    monkeypatch.setattr("lpl_lightning.data.tar_members.LARGEST", 1000)
    captions, bad = read(shards)
    assert captions == ["photo 0", "photo 1"]
    assert "2,000 bytes, more than the 1,000" in bad[f"{shards[0]}/9"]


def test_names_and_links_reach_nothing_outside(tmp_path: Path) -> None:
    content = io.BytesIO()
    (tmp_path / "secret").write_bytes(png(photo(5)))
    with tarfile.open(fileobj=content, mode="w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "a.png"), (tarfile.LNKTYPE, "b.png"), (tarfile.FIFOTYPE, "c.png")):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, str(tmp_path / "secret")
            archive.addfile(header)
        for name, data in (("../../up.png", png(photo(0))), ("/tmp/root.png", png(photo(1)))):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    shards = written(tmp_path / "shards", content.getvalue())
    keys, bad = read(shards, Contents(("png",)))
    assert keys == ["../../up", "/tmp/root"]
    assert not bad
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "secret", "shards"]


@pytest.mark.parametrize(
    ("files", "contents", "expected"),
    [
        (
            [("a.json", json.dumps({"text": ["x ", " y"], "n": 2}).encode())],
            ("json:n", ("json:text",)),
            (2, ("x", "y")),
        ),
        ([("a.json", b'{"text": "x", "n": "dog"}')], ("json:n", ("json:text",)), (1, ("x",))),
        ([("a.cls", b"dog\n"), ("a.txt", b"\xef\xbb\xbfx\r\n\r\ny")], ("cls", ("txt",)), (1, ("x", "y"))),
        ([("a.txt", b"x"), ("a.json", b'{"text": "y"}')], (None, ("json:text", "txt")), (None, ("y", "x"))),
        ([("a.json", b'{"text": 5}')], (None, ("json:text",)), "a string, a list of strings or nothing"),
        ([("a.json", b'{"other": 5}')], (None, ("json:text",)), "no caption in json:text"),
        ([("a.json", b"[1]")], (None, ("json:text",)), "its json is no JSON object"),
        ([("a.json", b'{"text"')], (None, ("json:text",)), "its json is no JSON object"),
        ([("a.json", b"[" * 100_000)], (None, ("json:text",)), "its json is no JSON object"),
        ([("a.json", b'{"text": "\\ud800"}')], (None, ("json:text",)), "half a character"),
        ([("a.json", b'{"n": true}')], ("json:n", ()), "label True is neither"),
        ([("a.json", b"{}")], ("json:n", ()), "no label"),
    ],
)
def test_labels_and_captions(
    tmp_path: Path,
    files: list[File],
    contents: tuple[str | None, tuple[str, ...]],
    expected: tuple[int | None, tuple[str, ...]] | str,
) -> None:
    shards = written(tmp_path, [("a.PNG", png(photo(0))), *files])
    stream = TarStream(shards, Contents(("png",), *contents, ("cat", "dog", "cow")))
    handles = stream.read(0)
    handle = next(handles)
    if isinstance(expected, str):
        with pytest.raises(Unreadable, match=expected):
            handle()
    else:
        found = handle()
        assert (found.label, found.captions or ()) == expected
        assert next(handles, None) is None
