from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import FORKED
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpl_lightning.evaluation.cache import ReferenceCache, default_folder

MADE: dict[str, Any] = {"class": "X", "weights": "ab", "size": 64, "antialias": True, "mean": [0.5, 0.4], "note": "ü"}
IMAGES: dict[str, Any] = {"name": "photos", "count": 20, "hash": "cd", "image_size": 64}


def state() -> dict[str, Tensor]:
    whole = torch.randn(6, 4)
    return {
        "features": whole,
        "shared": whole,
        "turned": whole.T,
        "part": whole[::2, 1:],
        "double": torch.randn(3, dtype=torch.float64),
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "yes": torch.tensor([True, False]),
        "none": torch.empty(0, 5),
        "grown": torch.randn(2, requires_grad=True),
    }


def file_of(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_was_stored_is_found(tmp_path: Path) -> None:
    kept = state()
    cache = ReferenceCache(tmp_path / "new" / "cache")
    assert cache.find("k", MADE) is None
    cache.store("k", MADE, kept, IMAGES)
    cache.store("k", MADE, kept, IMAGES)  # over the one that is there
    assert file_of(tmp_path / "new" / "cache") == cache.path("k", MADE)
    found = ReferenceCache(str(tmp_path / "new" / "cache")).find("k", dict(reversed(MADE.items())))
    assert found is not None
    assert found.images == IMAGES
    assert found.tensors.keys() == kept.keys()
    for name, tensor in kept.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert not found.tensors["grown"].requires_grad


@pytest.mark.parametrize(
    "other",
    [
        MADE | {"weights": "ac"},
        MADE | {"antialias": False},
        MADE | {"size": 64.5},
        MADE | {"mean": [0.4, 0.5]},
        MADE | {"new": None},
        {key: value for key, value in MADE.items() if key != "size"},
    ],
)
def test_other_settings_and_images_find_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    cache = ReferenceCache(tmp_path)
    cache.store("k", MADE, state(), IMAGES)
    assert cache.find("k", other) is None
    assert cache.find("l", MADE) is None
    cache.store("k", other, {"x": torch.ones(1)}, {})
    cache.store("l", MADE, {"y": torch.ones(1)}, {})
    assert len(list(tmp_path.iterdir())) == 3
    for key, made, names in (("k", other, {"x"}), ("l", MADE, {"y"}), ("k", MADE, set(state()))):
        found = cache.find(key, made)
        assert found is not None
        assert set(found.tensors) == names


def test_a_file_in_the_place_of_another_is_not_taken(tmp_path: Path) -> None:
    """Whatever its name is."""
    cache = ReferenceCache(tmp_path)
    cache.store("k", MADE, state(), IMAGES)
    for key, made in (("l", MADE), ("k", MADE | {"size": 32})):
        place = cache.path(key, made)
        assert place is not None
        place.write_bytes(file_of(tmp_path).read_bytes())
        with pytest.warns(UserWarning, match="it is of other images or settings than its name says"):
            assert cache.find(key, made) is None
        place.unlink()


def damaged(path: Path) -> dict[str, bytes]:
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    return {
        "empty": b"",
        "cut": whole[:-3],
        "cut in its header": whole[:100],
        "flipped": bytes(flipped),
        "other": b"x" * 99,
    }


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    cache, kept = ReferenceCache(tmp_path), {"x": torch.ones(4), "y": torch.zeros(4)}
    cache.store("k", MADE, kept, IMAGES)
    path = file_of(tmp_path)
    for content in damaged(path).values():
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=rf"{path.name} is damaged \(.*\): what it held is computed anew"):
            assert cache.find("k", MADE) is None
        cache.store("k", MADE, kept, IMAGES)
        assert cache.find("k", MADE) is not None


def test_changes_that_keep_the_bytes_or_the_tensors_are_seen(tmp_path: Path) -> None:
    """Other names, shapes and dtypes of the same bytes, another count of images, another format."""
    cache = ReferenceCache(tmp_path)
    cache.store("k", MADE, {"x": torch.ones(4), "y": torch.zeros(4)}, IMAGES)
    path = file_of(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    good = {"x": torch.ones(4), "y": torch.zeros(4)}
    save_file(good, path, metadata=metadata)
    assert cache.find("k", MADE) is not None
    x, y = good.values()
    more = {"images": json.dumps(IMAGES | {"count": 21}, sort_keys=True)}
    less = [{name: said for name, said in metadata.items() if name != lacking} for lacking in metadata]
    changes: list[tuple[dict[str, Tensor], dict[str, str] | None]] = [
        *(({"x": y, "y": x}, metadata), ({"w": x, "y": y}, metadata), ({"x": x.view(2, 2), "y": y}, metadata)),
        *(({"x": x.view(torch.int32), "y": y}, metadata), ({"x": x}, metadata), (good, metadata | more)),
        *((good, metadata | {"format": "another"}), (good, None), *((good, lacking) for lacking in less)),
    ]
    for tensors, said in changes:
        save_file(tensors, path, metadata=said)
        with pytest.warns(UserWarning, match="is damaged"):
            assert cache.find("k", MADE) is None


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = ReferenceCache(None)
    cache.store("k", MADE, state(), IMAGES)
    assert cache.find("k", MADE) is None
    assert cache.path("k", MADE) is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = ReferenceCache(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="cannot be written .*: the next evaluation computes its values anew"):
        cache.store("k", MADE, state(), IMAGES)
    assert cache.find("k", MADE) is None
    cache = ReferenceCache(tmp_path / "full")
    place = cache.path("k", MADE)
    assert place is not None
    (place / "folder").mkdir(parents=True)  # in the place of the file: the last step fails
    with pytest.warns(UserWarning, match="cannot be written"):
        cache.store("k", MADE, state(), IMAGES)
    assert [path.name for path in (tmp_path / "full").iterdir()] == [place.name]


def write(folder: Path, value: float) -> None:
    cache = ReferenceCache(folder)
    for _ in range(100):
        cache.store("k", MADE, {"x": torch.full((10_000,), value)}, {"value": value})


def test_processes_may_write_at_once(tmp_path: Path) -> None:
    other = FORKED.Process(target=write, args=(tmp_path, 1.0))
    other.start()
    cache, seen = ReferenceCache(tmp_path), set()
    while other.is_alive():
        cache.store("k", MADE, {"x": torch.zeros(10_000)}, {"value": 0.0})
        found = cache.find("k", MADE)  # which would warn of half a file, and warnings are errors
        assert found is not None
        assert set(found.tensors["x"].tolist()) == {found.images["value"]}
        seen.add(found.images["value"])
    assert other.exitcode == 0
    assert 0.0 in seen
    assert file_of(tmp_path) == cache.path("k", MADE)


def test_others_may_read_the_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    cache = ReferenceCache(tmp_path / "cache")
    cache.store("k", MADE, state(), IMAGES)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "plain", file_of(tmp_path / "cache"))}
    assert len(modes) == 1


def test_the_default_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "lpl_lightning" / "references"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_folder() == tmp_path / ".cache" / "lpl_lightning" / "references"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == tmp_path / ".cache" / "lpl_lightning" / "references"
