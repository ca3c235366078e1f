from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from lpl_lightning.data.reading import load_rgb, upright_size, upright_sizes

FORMATS = ["x.png", "x.jpg", "x.webp", "x.tif"]


def save(path: Path, orientation: int | None = None, **options: Any) -> Path:
    """30 wide and 20 high as it is stored."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("name", FORMATS)
def test_the_header_says_what_is_seen_upright(
    tmp_path: Path, name: str, orientation: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the EXIF standard, by what decoding gives, and without decoding."""
    path = str(save(tmp_path / name, orientation))
    turned = orientation is not None and orientation > 4
    decoded = load_rgb(path)

    def never(_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    assert upright_size(path) == ((30, 20) if turned else (20, 30)) == (decoded.height, decoded.width)


def test_a_compressed_tiff_too(tmp_path: Path) -> None:
    assert upright_size(str(save(tmp_path / "x.tif", 6, compression="tiff_lzw"))) == (30, 20)


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_png_that_says_so_behind_its_pixels(tmp_path: Path, orientation: int) -> None:
    """As the PNG standard allows, and viewers and Pillow heed."""
    path = save(tmp_path / "x.png")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = path.read_bytes()
    end = data.index(b"IEND") - 4
    path.write_bytes(data[:end] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[end:])
    assert upright_size(str(path)) == ((30, 20) if orientation == 6 else (20, 30))
    assert load_rgb(str(path)).height == upright_size(str(path))[0]


def test_many_are_read_in_threads_and_bad_ones_are_named(tmp_path: Path) -> None:
    """More than a task takes; what is cut off behind the header has a size all the same."""
    paths, expected = [], {}
    for index in range(150):
        path = tmp_path / f"{index}.png"
        Image.new("L", (index % 7 + 1, index % 5 + 1)).save(path)
        paths.append(str(path))
        expected[str(path)] = (index % 5 + 1, index % 7 + 1)
    whole = Path(paths[0]).read_bytes()
    Path(paths[0]).write_bytes(whole[: whole.index(b"IDAT") + 6])
    Path(paths[3]).write_bytes(b"")
    Path(paths[100]).write_text("no image")
    sizes, bad = upright_sizes(paths)
    assert bad.keys() == {paths[3], paths[100]}
    assert set(bad.values()) == {"not an image that Pillow can identify"}
    assert sizes == {path: size for path, size in expected.items() if path not in bad}
