from __future__ import annotations

import os
from pathlib import Path

import pytest

from lpl_lightning.evaluation import content_key as made
from lpl_lightning.evaluation.content_key import content_key
from lpl_lightning.evaluation.image_files import ImageFiles

TIME = 10**18


def write(folder: Path, count: int, size: int) -> list[Path]:
    """Files of one size and time, as uncompressed images that were unpacked are."""
    folder.mkdir()
    paths = [folder / f"{i}.bmp" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i % 251]) * size)
        os.utime(path, ns=(TIME, TIME))
    return paths


def change(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(TIME, TIME))


def key(paths: list[Path]) -> str:
    return content_key([str(path) for path in paths], [path.name for path in paths], "about")


def test_each_byte_of_a_small_set_counts(tmp_path: Path) -> None:
    paths = write(tmp_path / "a", 70, 3 * made.END)
    first = key(paths)
    assert key(write(tmp_path / "b", 70, 3 * made.END)) == first
    seen = {first}
    for path, place in ((paths[0], 0), (paths[69], -1), (paths[33], made.END + 5), (paths[2], made.END)):
        change(path, place)
        seen.add(key(paths))
    assert len(seen) == 5
    assert ImageFiles(tmp_path / "a", "x").quick_key() != ImageFiles(tmp_path / "b", "x").quick_key()


def test_of_a_large_set_ends_and_evenly_spaced_files_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * made.END
    monkeypatch.setattr(made, "WHOLE", 20 * size)
    paths = write(tmp_path / "a", 60, size)
    first = key(paths)
    for path in paths:
        for place in (0, made.END - 1, size - made.END, size - 1):
            change(path, place)
            assert key(paths) != first, (path.name, place)
            change(path, place)
    assert key(paths) == first
    middle = [i for i, path in enumerate(paths) if _differs(paths, path, size // 2)]
    assert middle == list(range(0, 60, 3)), "as many as make up what is looked at whole"


def _differs(paths: list[Path], path: Path, place: int) -> bool:
    before = key(paths)
    change(path, place)
    found = key(paths) != before
    change(path, place)
    return found


def test_what_is_read_of_a_large_set_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "WHOLE", 10 * 3 * made.END)
    paths = write(tmp_path / "a", 100, 3 * made.END)
    sizes: list[int] = []
    monkeypatch.setattr(made, "blake2b", lambda *args, **kwargs: _Counting(sizes))
    key(paths)
    assert sum(sizes) < 10 * 3 * made.END + 90 * 2 * made.END + 100 * 100


class _Counting:
    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def update(self, given: bytes) -> None:
        self.sizes.append(len(given))

    def digest(self) -> bytes:
        return b""

    def hexdigest(self) -> str:
        return ""
