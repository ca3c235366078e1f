from __future__ import annotations

import os
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms
from torch.utils.data import Dataset, IterableDataset

from lpl_lightning.evaluation.generated import GeneratedFolder, write_png
from lpl_lightning.evaluation.image_batches import loader
from lpl_lightning.evaluation.image_files import ImageFiles, PixelHash

Pixels = npt.NDArray[np.uint8]


def photo(width: int = 8, height: int = 8, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, pixels: Pixels | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo() if pixels is None else pixels).save(path, **options)
    return path


def names(files: ImageFiles) -> list[str]:
    return [Path(path).relative_to(files.folder).as_posix() for path in files.paths]


def batch(*images: Pixels) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).movedim(3, 1).float() / 127.5 - 1


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


# Files


def test_items_are_the_files_pixels(tmp_path: Path) -> None:
    """Of all images at any depth, whatever they are called."""
    photos = [photo(seed=i) for i in range(4)]
    for name, pixels in zip(["a b.png", "Ünï/图.PNG", "c/d/e.webp", "z.bmp"], photos, strict=True):
        save(tmp_path / name, pixels, **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "z.bmp").rename(tmp_path / "y.jpg")  # what is in a file counts
    save(tmp_path / ".hidden.png", photo(3, 5))
    save(tmp_path / ".cache" / "x.png", photo(3, 5))
    (tmp_path / "settings.json").write_text("{}")
    files = ImageFiles(tmp_path, "real")
    assert names(files) == ["a b.png", "c/d/e.webp", "y.jpg", "Ünï/图.PNG"]
    assert len(files) == 4
    for i, pixels in enumerate([photos[0], photos[2], photos[3], photos[1]]):
        item = files[i]
        assert list(item) == ["image", "index"]
        assert item["index"] == i
        assert item["image"].dtype == torch.float32
        torch.testing.assert_close(item["image"], batch(pixels)[0], rtol=0, atol=1e-6)
    with pytest.raises(IndexError):
        files[4]
    with pytest.raises(IndexError):
        files[-1]


def test_written_images_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for index, label in ((10, 0), (9, 1), (2, 2), (1000000, 0), (999999, 1)):
        save(tmp_path / f"{label:04d}" / f"{index:06d}.png")
    assert [int(Path(name).stem) for name in names(ImageFiles(tmp_path, "x"))] == [2, 9, 10, 999999, 1000000]
    save(tmp_path / "0003" / "2.png")  # the number 2 again
    assert names(ImageFiles(tmp_path, "x")) == [
        *("0000/000010.png", "0000/1000000.png", "0001/000009.png", "0001/999999.png", "0002/000002.png"),
        "0003/2.png",
    ]
    (tmp_path / "0003" / "2.png").rename(tmp_path / "0003" / "²٣.png")  # digits, but not of ours
    assert names(ImageFiles(tmp_path, "x"))[-1] == "0003/²٣.png"


def test_captions_lie_beside(tmp_path: Path) -> None:
    for index, text in ((0, "a cat"), (1, "\n ein Häschen \nsecond"), (2, "日本")):
        save(tmp_path / "0000" / f"{index}.png")
        (tmp_path / "0000" / f"{index}.txt").write_text(text, encoding="utf-8")
    files = ImageFiles(tmp_path, "real", captions=True)
    assert [files[i]["caption"] for i in range(3)] == ["a cat", "ein Häschen", "日本"]
    (tmp_path / "0000" / "1.txt").write_text(" \n")
    (tmp_path / "0000" / "2.txt").unlink()
    with pytest.raises(
        ValueError, match=r"`real`: 2 of 3 images in .* have no caption: 0000/1.png, 0000/2.png\. Write"
    ):
        ImageFiles(tmp_path, "real", captions=True)
    assert len(ImageFiles(tmp_path, "real")) == 3


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`generated` must be a folder of images, but .*none does not exist"):
        ImageFiles(tmp_path / "none", "generated")
    with pytest.raises(ValueError, match="`generated` must hold images"):
        ImageFiles(tmp_path, "generated")
    with pytest.raises(ValueError, match="`image_size` must be 1 or more, got 0"):
        ImageFiles(tmp_path, "generated", image_size=0)


# What is refused


def png16() -> bytes:
    """8 x 8 RGB of 16 bits a channel, by hand from the format's definition; 25,700 is 100 of 255."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + struct.pack(">H", 25700) * 24) * 8
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def of(mode: str, value: int | tuple[int, ...], **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.new(mode, (8, 8), value).save(path, **options)


def palette(path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 30, 60, 90])
    image.save(path)


def profile(gamma: float) -> bytes:
    """A color profile of sRGB's primaries, adapted to D50 as the standard has them, whose values are powers."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(65536 * value) for value in values))

    primaries = {"r": (0.43607, 0.22249, 0.01392), "g": (0.38515, 0.71687, 0.09708), "b": (0.14307, 0.06061, 0.7141)}
    tags = {f"{name}XYZ": b"XYZ \0\0\0\0" + fixed(*value) for name, value in primaries.items()}
    tags["wtpt"] = b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249)
    curve = b"curv" + struct.pack(">IIHH", 0, 1, round(256 * gamma), 0)
    tags |= {f"{name}TRC": curve for name in "rgb"}
    start, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s12x4s28x", start + len(body), b"lcms", 0x2400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (head + fixed(0.9642, 1.0, 0.8249)).ljust(128, b"\0") + table + body


# What each is called in the error, and what a viewer shows, but for the profile, which nothing here applies.
OTHERS: dict[str, tuple[str, Callable[[Path], Any], str, tuple[int, int, int]]] = {
    "grey": ("x.png", of("L", 100), "mode L", (100, 100, 100)),
    "grey jpeg": ("x.jpg", of("L", 100), "mode L", (100, 100, 100)),
    "one bit": ("x.png", of("1", 1), "mode 1", (255, 255, 255)),
    "palette": ("x.png", palette, "mode P", (30, 60, 90)),
    "gif": ("x.gif", palette, "mode P", (30, 60, 90)),
    "rgba": ("x.png", of("RGBA", (200, 100, 0, 51)), "mode RGBA", (244, 224, 204)),
    "opaque rgba": ("x.png", of("RGBA", (200, 100, 0, 255)), "mode RGBA", (200, 100, 0)),
    "webp rgba": ("x.webp", of("RGBA", (200, 100, 0, 0)), "mode RGBA", (255, 255, 255)),
    "transparent color": ("x.png", of("RGB", (1, 2, 3), transparency=(1, 2, 3)), "a transparent color", (255,) * 3),
    "cmyk": ("x.tif", of("CMYK", (0, 255, 255, 0)), "mode CMYK", (255, 0, 0)),
    "cmyk jpeg": ("x.jpg", of("CMYK", (0, 255, 255, 0), quality=100), "mode CMYK", (255, 0, 0)),
    "profile": (
        "x.png",
        of("RGB", (9, 99, 199), icc_profile=profile(1.0)),
        "a color profile that is not sRGB",
        (9, 99, 199),
    ),
    "16-bit grey": ("x.png", of("I;16", 100 * 257), "mode I;16", (100,) * 3),
    "16-bit rgb": ("x.png", lambda path: path.write_bytes(png16()), "not 8 bits a channel", (100,) * 3),
    "16-bit ppm": (
        "x.ppm",
        lambda path: path.write_bytes(b"P6 8 8 65535\n" + struct.pack(">H", 25700) * 192),
        "not 8 bits a channel",
        (100,) * 3,
    ),
    "8-bit ppm of text, up to 51": (
        "x.ppm",
        lambda path: path.write_bytes(b"P3 8 8 51\n" + b"20 " * 192),
        "not 8 bits a channel",
        (100,) * 3,
    ),
}


def test_a_profile_that_says_what_is_meant_anyway_is_let_be(tmp_path: Path) -> None:
    """Such as sRGB itself, a power near its curve, and one that cannot be read."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, icc in enumerate([srgb, profile(2.2), b"no profile"]):
        of("RGB", (9, 99, 199), icc_profile=icc)(tmp_path / f"{number}.png")
    ImageFiles(tmp_path, "real").check()


@pytest.mark.parametrize("case", OTHERS)
def test_other_modes_are_refused_or_converted(tmp_path: Path, case: str) -> None:
    name, write, called, expected = OTHERS[case]
    write(tmp_path / name)
    save(tmp_path / "a.png")
    refused = rf"`real`: 1 of 2 images in .* are not RGB of 8 bits: {name} \({called}\)\. .* set `convert`"
    with pytest.raises(ValueError, match=refused):
        ImageFiles(tmp_path, "real").check()
    with pytest.raises(ValueError, match="not RGB of 8 bits"):
        ImageFiles(tmp_path, "real")[0]  # of the image that would do
    files = ImageFiles(tmp_path, "real", convert=True)
    files.check()
    pixels = ((files[1]["image"] + 1) * 127.5).movedim(0, 2)
    tolerance = 3 if case == "cmyk jpeg" else 1e-3
    torch.testing.assert_close(pixels, torch.tensor(expected).expand(8, 8, 3).float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp", "x.tif", "x.ppm", "x.avif", "x.tga"])
def test_rgb_of_8_bits_is_taken_from_any_format(tmp_path: Path, name: str) -> None:
    flat = np.full((8, 8, 3), (200, 100, 50), dtype=np.uint8)
    try:
        save(tmp_path / name, flat)
    except (KeyError, ValueError):  # how Pillow says so, before 11.3 of a format that it does not know
        pytest.skip(f"Pillow was built without {name}")
    files = ImageFiles(tmp_path, "real")
    files.check()
    torch.testing.assert_close(files[0]["image"], batch(flat)[0], rtol=0, atol=8 / 255)


def test_text_ppm_of_8_bits_is_taken(tmp_path: Path) -> None:
    (tmp_path / "x.ppm").write_bytes(b"P3 8 8 255\n" + b"100 " * 192)
    image = ImageFiles(tmp_path, "real")[0]["image"]
    torch.testing.assert_close(image, torch.full_like(image, 100 / 127.5 - 1))


def test_files_that_are_no_images_are_refused_with_their_names(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    for i in range(7):
        (tmp_path / f"text{i}.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        ImageFiles(tmp_path, "real").check()
    said = str(caught.value)
    assert said.startswith(f"`real`: 9 of 10 images in {tmp_path} cannot be read: empty.jpg (it is empty), lost.png (")
    assert "text0.png (not an image that Pillow can identify)" in said
    assert "text2.png" in said
    assert "text3.png" not in said
    assert "and 4 more" in said


def test_images_cut_short_are_named_when_they_are_met(tmp_path: Path) -> None:
    save(tmp_path / "a.png", photo(64, 64))
    whole = save(tmp_path / "b.png", photo(64, 64)).read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:-2000])
    files = ImageFiles(tmp_path, "real")
    files.check()
    assert files[0]["index"] == 0
    with pytest.raises(ValueError, match=r"`real`: .*b\.png cannot be read \(.*\)\. Make it anew or remove it"):
        files[1]
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        list(loader(files, 1, num_workers=1))


def test_what_pillow_remarks_of_a_file_is_no_reason_to_refuse_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where warnings are errors, as in these tests."""
    save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    ImageFiles(tmp_path, "real").check()


# Sizes


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", photo(8, 8))
    ImageFiles(tmp_path, "real").check()
    save(tmp_path / "a.png", photo(9, 9))
    save(tmp_path / "b.png", photo(8, 6))
    with pytest.raises(ValueError, match="not squares of one size") as caught:
        ImageFiles(tmp_path, "real").check()
    assert str(caught.value) == (
        f"`real`: 2 of 5 images in {tmp_path} are not squares of one size, which 0.png with 8 x 8 is: a.png with "
        "9 x 9, b.png with 8 x 6. Set `image_size` to resize the shorter side (anti-aliased bicubic) and take the "
        "middle square."
    )


def test_images_that_are_not_square_are_refused_though_they_are_of_one_size(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.png", photo(8, 6))
    with pytest.raises(ValueError, match=r"2 of 2 .* not squares of one size: 0\.png with 8 x 6, 1\.png with 8 x 6\."):
        ImageFiles(tmp_path, "real").check()


def test_images_are_resized_and_cropped_as_pillow_does(tmp_path: Path) -> None:
    save(tmp_path / "0.png", photo(8, 8))
    save(tmp_path / "1.png", photo(40, 24, seed=1))
    save(tmp_path / "2.png", photo(4, 6, seed=2))
    save(tmp_path / "3.png", photo(8, 20, seed=3))
    files = ImageFiles(tmp_path, "real", image_size=8)
    expected = [
        photo(8, 8),
        np.asarray(Image.fromarray(photo(40, 24, seed=1)).resize((13, 8), Image.Resampling.BICUBIC))[:, 2:10],
        np.asarray(Image.fromarray(photo(4, 6, seed=2)).resize((8, 12), Image.Resampling.BICUBIC))[2:10],
        photo(8, 20, seed=3)[6:14],
    ]
    for i, pixels in enumerate(expected):
        torch.testing.assert_close(files[i]["image"], batch(pixels)[0], rtol=0, atol=1e-6)


def test_provenance_says_what_is_done(tmp_path: Path) -> None:
    said = {"folder": tmp_path.name, "image_size": 8, "enlarged": 0}
    plain = {"resize": "none", "crop": "none", "convert": False}
    save(tmp_path / "0.png", photo(8, 8))
    assert ImageFiles(tmp_path, "x").provenance() == said | plain | {"count": 1}
    assert ImageFiles(tmp_path, "x", image_size=8).provenance() == said | plain | {"count": 1}
    save(tmp_path / "1.png", photo(8, 9))
    wide = {"crop": "middle square", "count": 2, "convert": True}
    assert ImageFiles(tmp_path, "x", image_size=8, convert=True).provenance() == said | plain | wide
    for i, side in enumerate((7, 4, 16)):
        save(tmp_path / f"{i + 2}.png", photo(side, 16))
    resized = {"resize": "bicubic, antialiased", "crop": "middle square", "count": 5, "enlarged": 2, "convert": False}
    assert ImageFiles(tmp_path, "x", image_size=8).provenance() == said | resized


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_are_seen_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    """The row that stands at the top of the eye's view, as EXIF defines it, is lit."""
    lit = np.zeros((16, 16, 3), dtype=np.uint8)
    where: Any = {1: np.s_[:8], 2: np.s_[:8], 3: np.s_[8:], 4: np.s_[8:]}
    sides: Any = {5: np.s_[:, :8], 6: np.s_[:, :8], 7: np.s_[:, 8:], 8: np.s_[:, 8:]}
    lit[(where | sides)[orientation]] = 255
    save(tmp_path / f"x.{suffix}", lit, exif=exif(orientation))
    image = ImageFiles(tmp_path, "x")[0]["image"]
    assert image[:, :6].mean() > 0.95
    assert image[:, 10:].mean() < -0.95


def test_rotated_images_are_cropped_upright(tmp_path: Path) -> None:
    pixels = photo(20, 8, seed=5)
    save(tmp_path / "x.png", pixels, exif=exif(6))
    image = ImageFiles(tmp_path, "x", image_size=8)[0]["image"]
    torch.testing.assert_close(image, batch(np.rot90(pixels, -1)[6:14])[0], rtol=0, atol=1e-6)


# Keys


def test_the_quick_key_follows_files_and_settings(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save(first / "1.png")
    save(first / "a" / "2.png", photo(seed=1))
    shutil.copytree(first, second)  # with times of change
    key = ImageFiles(first, "x").quick_key()
    assert len(bytes.fromhex(key)) == 16
    assert ImageFiles(second, "y", captions=False).quick_key() == key
    assert (
        len({key, *(ImageFiles(first, "x", **kind).quick_key() for kind in ({"image_size": 8}, {"convert": True}))})
        == 3
    )
    (second / "a" / "2.png").rename(second / "a" / "3.png")
    renamed = ImageFiles(second, "x").quick_key()
    (second / "a" / "3.png").rename(second / "a" / "2.png")
    assert ImageFiles(second, "x").quick_key() == key
    found = (second / "1.png").stat()
    os.utime(second / "1.png", ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    touched = ImageFiles(second, "x").quick_key()
    with (second / "1.png").open("ab") as file:
        file.write(b"x")
    os.utime(second / "1.png", ns=(found.st_atime_ns, found.st_mtime_ns))
    longer = ImageFiles(second, "x").quick_key()
    save(second / "3.png")
    assert len({key, renamed, touched, longer, ImageFiles(second, "x").quick_key()}) == 5


def test_the_quick_key_needs_no_image_to_be_whole(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    assert ImageFiles(tmp_path, "x").quick_key()


def naive_hash(*images: Pixels) -> str:
    """From the definition."""
    own = [
        blake2b(f"(3, {x.shape[0]}, {x.shape[1]})".encode() + bytes(x.transpose(2, 0, 1).ravel()), digest_size=16)
        for x in images
    ]
    total = sum(int(digest.hexdigest(), 16) for digest in own) % (1 << 128)
    return blake2b(f"{len(images)} {total}".encode(), digest_size=16).hexdigest()


def hashed(*batches: torch.Tensor) -> PixelHash:
    found = PixelHash()
    for images in batches:
        found.add(images)
    return found


PHOTOS = arrays(np.uint8, st.tuples(st.integers(2, 9), st.integers(1, 5), st.integers(1, 5), st.just(3)))


@settings(deadline=None)
@given(images=PHOTOS, seed=st.integers(0, 999), data=st.data())
def test_the_pixel_hash_is_of_the_set(images: Pixels, seed: int, data: st.DataObject) -> None:
    whole = hashed(batch(*images))
    assert whole.hexdigest() == naive_hash(*images)
    shuffled = list(images)
    random.Random(seed).shuffle(shuffled)
    at = data.draw(st.integers(1, len(images) - 1))
    parts = [hashed(batch(*part)) for part in (shuffled[:at], shuffled[at:])]
    merged = PixelHash()
    for part in parts:
        merged.merge(part)
    assert merged == whole == hashed(batch(*shuffled[:at]), batch(*shuffled[at:]))
    assert merged.hexdigest() == whole.hexdigest()
    changed = images.copy()
    place = tuple(data.draw(st.integers(0, length - 1)) for length in images.shape)
    changed[place] ^= np.uint8(data.draw(st.integers(1, 255)))
    assert hashed(batch(*changed)).hexdigest() != whole.hexdigest()
    assert hashed(batch(*images), batch(images[at])).hexdigest() != whole.hexdigest()
    assert hashed(batch(*images[1:])).hexdigest() != whole.hexdigest()


def test_the_pixel_hash_is_of_images_as_metrics_round_them() -> None:
    images = batch(photo(5, 4) // 2, photo(5, 4, seed=1) // 2)
    plain = hashed(images).hexdigest()
    assert hashed(images + 0.4 / 127.5 * torch.rand_like(images)).hexdigest() == plain
    assert hashed(images + 0.6 / 127.5).hexdigest() != plain
    assert hashed(images.double()).hexdigest() == plain
    assert hashed(images.contiguous(memory_format=torch.channels_last)).hexdigest() == plain
    assert hashed(images.reshape(2, 3, 5, 4)).hexdigest() != plain
    with pytest.raises(ValueError, match="`images` must be"):
        PixelHash().add(images * 3)


def test_the_pixel_hash_tells_repeats_that_add_up_to_nothing() -> None:
    """A sum alone would forget an image that comes 2^128 times; the count does not."""
    images = batch(photo())
    around = PixelHash(count=2**128, total=0)
    around.merge(hashed(images))
    assert around.total == hashed(images).total
    assert around.hexdigest() != hashed(images).hexdigest()
    assert hashed(*[images] * 9).total < 2**128


# Loaders


class Plain(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> Any:
        return self.items[position]


@pytest.mark.parametrize(("count", "world_size"), [(10, 1), (10, 3), (2, 4), (9, 3)])
def test_processes_share_a_set_without_repeats(count: int, world_size: int) -> None:
    dataset = Plain([{"image": torch.full((3, 2, 2), float(i))} for i in range(count)])
    seen = []
    for rank in range(world_size):
        batches = list(loader(dataset, 2, 0, rank, world_size))
        assert all(len(part["image"]) == 2 for part in batches[:-1])
        positions = [i for part in batches for i in part["index"].tolist()]
        assert positions == list(range(count))[rank::world_size]
        assert positions == [int(value) for part in batches for value in part["image"][:, 0, 0, 0]]
        seen += positions
    assert sorted(seen) == list(range(count))


def test_two_loader_processes_give_the_same(tmp_path: Path) -> None:
    for i in range(11):
        save(tmp_path / f"{i}.png", photo(seed=i))
        (tmp_path / f"{i}.txt").write_text(f"photo {i}")
    files = ImageFiles(tmp_path, "x", captions=True)
    whole = hashed(*(part["image"] for part in loader(files, 4, num_workers=0)))
    shares = [list(loader(files, 3, num_workers=2, rank=rank, world_size=2)) for rank in range(2)]
    merged = PixelHash()
    for share in shares:
        merged.merge(hashed(*(part["image"] for part in share)))
    assert merged == whole
    assert whole.hexdigest() == naive_hash(*(photo(seed=i) for i in range(11)))
    assert [text for part in shares[1] for text in part["caption"]] == [f"photo {i}" for i in range(1, 11, 2)]
    assert torch.cat([part["index"] for part in shares[1]]).tolist() == list(range(1, 11, 2))


def of_images_alone(items: list[Any]) -> dict[str, Any]:
    """As users write them: what a batch shall have is picked by name."""
    return {"image": torch.zeros(len(items), 3, 2, 2), "caption": [str(item) for item in items]}


def test_an_index_is_the_position_and_random_numbers_are_left_alone() -> None:
    """An item's own may be of a larger set, which a subset is of, or a name: features are put where it says."""
    dataset = Plain([{"index": own} for own in (7, 1006, 5, "a")])
    before = torch.get_rng_state()
    batches = list(loader(dataset, 3, num_workers=1, collate_fn=of_images_alone))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2], [3]]
    assert batches[1]["caption"] == [str({"index": "a"})]
    assert torch.equal(before, torch.get_rng_state())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def test_loaders_say_what_is_wrong() -> None:
    dataset = Plain([{}])
    with pytest.raises(ValueError, match="`rank` must be below `world_size`, 2, got 2"):
        loader(dataset, 1, 0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more"):
        loader(dataset, 0, 0)
    with pytest.raises(ValueError, match="`dataset` must be map-style, with a length, got Stream"):
        loader(Stream(), 1, 0)
    with pytest.raises(ValueError, match="`dataset` must have dictionaries with an `image` for items.* got tuple"):
        list(loader(Plain([(1, 2)]), 1, 0))
    with pytest.raises(ValueError, match="`collate_fn` must leave no image out, got 1 of 2"):
        list(loader(Plain([(1, 2), (3, 4)]), 2, 0, collate_fn=lambda items: of_images_alone(items[:1])))
    (batch,) = loader(Plain([(1, 2)]), 1, 0, collate_fn=of_images_alone)
    assert batch["index"].tolist() == [0]


def test_two_commands_may_make_the_same_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one between the other's writing of the file and its putting in place: it is whole at each moment."""
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    folder, replace = GeneratedFolder(tmp_path), os.replace
    seen = []

    def meanwhile(part: Path, path: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        folder.write(image, 3, 1, "a\nb")
        monkeypatch.setattr(os, "replace", meanwhile)
        replace(part, path)
        seen.append(path.name)

    monkeypatch.setattr(os, "replace", meanwhile)
    folder.write(image, 3, 1, "a\nb")
    write_png(image, tmp_path / "0001" / "000003.png")
    assert seen == ["000003.txt", "000003.png", "000003.png"]
    assert sorted(path.name for path in (tmp_path / "0001").iterdir()) == ["000003.png", "000003.txt"]
    with Image.open(tmp_path / "0001" / "000003.png") as written:
        assert torch.equal(torch.from_numpy(np.array(written)).movedim(2, 0), image)


def test_a_caption_of_several_lines_is_scored_as_a_whole(tmp_path: Path) -> None:
    """A line of such a file is a caption, of which the first is taken."""
    folder = GeneratedFolder(tmp_path)
    folder.write(torch.zeros(3, 8, 8, dtype=torch.uint8), 0, 0, "A street at night.\n\nTwo people  cross it. ")
    assert ImageFiles(tmp_path, "images", captions=True)[0]["caption"] == "A street at night. Two people cross it."


def test_real_photos(shared: Path, tmp_path: Path) -> None:
    archive = shared / "data" / "imagenette128.zip"
    if not archive.is_file():
        pytest.skip("imagenette128.zip is not at hand")
    with zipfile.ZipFile(archive) as file:
        members = [name for name in file.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))][:200]
        file.extractall(tmp_path, members)
    files = ImageFiles(tmp_path, "real", convert=True)
    said = files.provenance()
    assert (said["count"], said["image_size"], said["resize"]) == (200, 128, "none")
    decoded = [np.asarray(Image.open(path).convert("RGB")) for path in files.paths]
    found = hashed(*(part["image"] for part in loader(files, 64, num_workers=2)))
    assert found.hexdigest() == naive_hash(*decoded)
