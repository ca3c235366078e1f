import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import numpy.typing as npt
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor

from lpl_lightning.data.base import Split
from lpl_lightning.data.faults import Unreadable
from lpl_lightning.data.folder import ImageFolderDataModule, ImageFolderDataset
from lpl_lightning.data.listing import path_hash
from lpl_lightning.data.reading import read_rgb

RGB = tuple[int, int, int]


def save(path: Path, color: RGB = (10, 200, 77), size: int = 8) -> Path:
    """An image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), color).save(path)
    return path


def folder_of(root: Path, *names: str) -> Path:
    for name in names:
        save(root / name)
    return root


def levels(image: Tensor) -> npt.NDArray[np.float64]:
    """An item's image as (H, W, 3) in [0, 255]."""
    return (image.permute(1, 2, 0).numpy().astype(np.float64) + 1) * 127.5


def read(path: Path, size: int = 8, **options: Any) -> npt.NDArray[np.float64]:
    item = ImageFolderDataset([(str(path), None)], size, **options)[0]
    assert item["image"].dtype == torch.float32
    assert item["image"].shape == (3, size, size)
    return levels(item["image"])


def names(data: ImageFolderDataModule, split: Split) -> list[str]:
    return [Path(path).relative_to(data.root).as_posix() for path, _ in data.dataset(split).files]


def open_module(root: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(root, image_size=8, num_workers=0, **options)


# Pixels


def grey(mode: str, *value: int) -> Image.Image:
    return Image.new(mode, (8, 8), value[0] if len(value) == 1 else value)


def palette(alpha: bytes | None) -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 30, 60, 90])
    if alpha is not None:
        image.info["transparency"] = alpha
    return image


# What a viewer shows: alpha over white is `alpha * value + (1 - alpha) * 255`.
MODES: dict[str, tuple[str, Callable[[], Image.Image], RGB]] = {
    "rgb": ("x.png", lambda: grey("RGB", 10, 200, 77), (10, 200, 77)),
    "upper-case extension": ("x.PNG", lambda: grey("RGB", 10, 200, 77), (10, 200, 77)),
    "bmp": ("x.bmp", lambda: grey("RGB", 10, 200, 77), (10, 200, 77)),
    "grey": ("x.png", lambda: grey("L", 100), (100, 100, 100)),
    "one bit": ("x.png", lambda: grey("1", 1), (255, 255, 255)),
    "16-bit grey": ("x.png", lambda: Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), (100,) * 3),
    "16-bit white": ("x.png", lambda: Image.fromarray(np.full((8, 8), 65535, np.uint16)), (255,) * 3),
    "16-bit tiff": ("x.tif", lambda: Image.fromarray(np.full((8, 8), 7 * 257, np.uint16)), (7,) * 3),
    "32-bit tiff": ("x.tif", lambda: Image.fromarray(np.full((8, 8), 7 * 257, np.int32)), (7,) * 3),
    "dark 16-bit tiff": ("x.tif", lambda: Image.fromarray(np.full((8, 8), 250, np.uint16)), (1,) * 3),
    "rgba": ("x.png", lambda: grey("RGBA", 200, 100, 0, 51), (244, 224, 204)),
    "transparent": ("x.webp", lambda: grey("RGBA", 200, 100, 0, 0), (255, 255, 255)),
    "opaque": ("x.png", lambda: grey("RGBA", 200, 100, 0, 255), (200, 100, 0)),
    "grey and alpha": ("x.png", lambda: grey("LA", 5, 51), (205, 205, 205)),
    "palette": ("x.png", lambda: palette(None), (30, 60, 90)),
    "palette of a gif": ("x.gif", lambda: palette(None), (30, 60, 90)),
    "palette with alpha": ("x.png", lambda: palette(bytes([255, 51])), (210, 216, 222)),
    "cmyk red": ("x.tif", lambda: grey("CMYK", 0, 255, 255, 0), (255, 0, 0)),
    "cmyk half black": ("x.tif", lambda: grey("CMYK", 0, 0, 0, 155), (100, 100, 100)),
}


@pytest.mark.parametrize("case", MODES)
def test_every_kind_of_image_becomes_the_rgb_that_a_viewer_shows(tmp_path: Path, case: str) -> None:
    name, make, expected = MODES[case]
    make().save(tmp_path / name)
    np.testing.assert_allclose(read(tmp_path / name), np.broadcast_to(expected, (8, 8, 3)), atol=1e-3)


def test_integers_of_32_bits_that_may_be_of_8_or_16_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 250, np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(Unreadable, match="the range of its values is not known"):
        read_rgb(str(tmp_path / "x.tif"))


def test_cmyk_jpeg(tmp_path: Path) -> None:
    grey("CMYK", 0, 255, 255, 0).save(tmp_path / "x.jpg", quality=100)
    np.testing.assert_allclose(read(tmp_path / "x.jpg"), np.broadcast_to((255, 0, 0), (8, 8, 3)), atol=3)


@pytest.mark.parametrize(("top", "expected"), [(65535, 100), (25700, 255)])
def test_16_bit_pgm(tmp_path: Path, top: int, expected: int) -> None:
    """Written by hand from the format's definition: 25,700 of ``top``, big-endian."""
    (tmp_path / "x.pgm").write_bytes(b"P5 8 8 %d\n" % top + (25700).to_bytes(2, "big") * 64)
    np.testing.assert_allclose(read(tmp_path / "x.pgm"), expected, atol=1e-3)


def test_a_color_declared_transparent_turns_white(tmp_path: Path) -> None:
    image = grey("RGB", 1, 2, 3)
    image.putpixel((4, 4), (9, 9, 9))
    image.save(tmp_path / "x.png", transparency=(1, 2, 3))
    pixels = read(tmp_path / "x.png")
    np.testing.assert_allclose(pixels[4, 4], 9, atol=1e-3)
    np.testing.assert_allclose(pixels[0, 0], 255, atol=1e-3)


# The stored array for each EXIF orientation, from the standard's table of where row 0 and column 0 are seen:
# 1 top-left, 2 top-right, 3 bottom-right, 4 bottom-left, 5 left-top, 6 right-top, 7 right-bottom, 8 left-bottom.
STORED: dict[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: seen[:, ::-1].transpose(1, 0, 2),
    7: lambda seen: seen[::-1, ::-1].transpose(1, 0, 2),
    8: lambda seen: seen[::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, name: str) -> None:
    seen = np.zeros((32, 32, 3), np.uint8)
    seen[:16, :16], seen[:16, 16:], seen[16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](seen)))
    stored.save(tmp_path / name, exif=exif)
    pixels = read(tmp_path / name, 32)
    assert np.abs(pixels - seen).mean() < 6


@pytest.mark.parametrize("orientation", STORED)
def test_the_original_size_is_that_of_the_upright_image(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = STORED[orientation](np.zeros((20, 50, 3), np.uint8))
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.jpg", exif=exif)
    item = ImageFolderDataset([(str(tmp_path / "x.jpg"), None)], 10)[0]
    assert item["original_size"].tolist() == [20, 50]
    assert item["crop_top_left"].tolist() == [0, 8]  # of 10 x 25, 15 are cut off; 7.5 rounds to even


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_shrinking_is_anti_aliased(tmp_path: Path, interpolation: str) -> None:
    """A fine checkerboard becomes even grey; picking or blending neighbours would leave black or white."""
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "x.png")
    inside = read(tmp_path / "x.png", 8, interpolation=interpolation)[1:-1, 1:-1]
    np.testing.assert_allclose(inside, 127.5, atol=2)


def test_interpolations_differ(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    results = {read(tmp_path / "x.png", interpolation=i).tobytes() for i in ("bilinear", "bicubic", "lanczos")}
    assert len(results) == 3


def test_small_images_are_enlarged(tmp_path: Path) -> None:
    save(tmp_path / "x.png", (1, 2, 3), size=3)
    np.testing.assert_allclose(read(tmp_path / "x.png", 16), np.broadcast_to((1, 2, 3), (16, 16, 3)), atol=1e-3)


@pytest.mark.parametrize("upright", [False, True])
def test_the_centre_square_is_cropped_at_the_full_shorter_side(tmp_path: Path, upright: bool) -> None:
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :16], pixels[:8, 16:32], pixels[8:, 16:32], pixels[:, 32:] = 255, 50, 100, 255
    Image.fromarray(pixels.transpose(1, 0, 2) if upright else pixels).save(tmp_path / "x.png")
    square = read(tmp_path / "x.png", 16)[..., 0]
    expected = np.repeat([50, 100], 8)
    expected = np.broadcast_to(expected if upright else expected[:, None], (16, 16))
    np.testing.assert_allclose(square, expected, atol=1e-3)


def test_random_crops_and_flips_are_for_training_alone(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (8, 64, 3))
    for name in "ab":
        Image.fromarray(ramp).save(tmp_path / f"{name}.png")
    data = open_module(tmp_path, crop="random", horizontal_flip=True, val_fraction=0.5)
    torch.manual_seed(0)
    lefts, steps = set(), []
    for _ in range(200):
        row = np.round(levels(data.dataset("train")[0]["image"])[0, :, 0])
        lefts.add(int(row.min()))
        steps.append(int(row[1] - row[0]))
    assert lefts <= set(range(57))
    assert len(lefts) > 40  # of 57 places, about 55 expected
    assert set(steps) == {-1, 1}
    assert 70 < steps.count(1) < 130  # of 200 fair draws
    for split in ("val", "test"):
        rows = {levels(data.dataset(split)[0]["image"])[0].round().tobytes() for _ in range(20)}
        assert rows == {np.repeat(np.arange(28.0, 36.0), 3).tobytes()}


def test_training_is_neither_cropped_at_random_nor_flipped_by_default(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (8, 64, 3))
    for name in "ab":
        Image.fromarray(ramp).save(tmp_path / f"{name}.png")
    dataset = open_module(tmp_path).dataset("train")
    rows = {levels(dataset[0]["image"])[0].round().tobytes() for _ in range(20)}
    assert rows == {np.repeat(np.arange(28.0, 36.0), 3).tobytes()}


# Layout


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    folder_of(tmp_path, "dog/b.png", "dog/deep/er/a.JPG", "cat/z.png", "Emu/1.webp", "cat/.hidden.png")
    folder_of(tmp_path, ".hidden/x.png", "cat/.thumbs/x.png")
    (tmp_path / "empty").mkdir()
    for other in ("README.md", "cat/metadata.csv", "notes/x.txt"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("text")
    data = open_module(tmp_path, val_root=tmp_path)
    data.setup("fit")
    assert data.class_names == ("Emu", "cat", "dog")
    assert data.num_classes == 3
    assert names(data, "train") == ["Emu/1.webp", "cat/z.png", "dog/b.png", "dog/deep/er/a.JPG"]
    train = data.dataset("train")
    assert len(train) == 4
    assert [train[i]["label"] for i in range(4)] == [0, 1, 2, 2]


def test_images_directly_in_the_folder_have_no_class(tmp_path: Path) -> None:
    folder_of(tmp_path, "b.png", "a.png", "c.gif")
    (tmp_path / "folder.png").mkdir()
    data = open_module(tmp_path, val_root=tmp_path)
    data.setup("fit")
    assert data.class_names == ()
    assert data.num_classes == 0
    assert names(data, "train") == ["a.png", "b.png", "c.gif"]
    assert data.dataset("train")[0].keys() == {"image", "original_size", "crop_top_left"}


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "cat/a.png", "stray.png")
    with pytest.raises(ValueError, match=r"`root` must hold images either directly or .*stray\.png .* cat"):
        open_module(tmp_path).setup("fit")


def test_links_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere/1.png")
    save(tmp_path / "root/cat/1.png")
    root = tmp_path / "root"
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat/round").symlink_to(root / "cat")
    (root / "self").symlink_to(root)
    data = open_module(root, val_root=root)
    assert data.class_names == ("cat", "dog")
    assert names(data, "train") == ["cat/1.png", "dog/1.png"]


# Splits


def test_a_test_root_of_the_same_folder_is_all_of_it(tmp_path: Path) -> None:
    """As a `val_root` is, and not what is left to train on."""
    folder_of(tmp_path, *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(30)))
    data = open_module(tmp_path, val_fraction=0.3, test_root=tmp_path)
    assert sorted(names(data, "test")) == sorted([*names(data, "train"), *names(data, "val")])
    assert len(names(data, "test")) == 60


def test_held_out_images_are_those_with_a_low_hash(tmp_path: Path) -> None:
    folder_of(tmp_path, *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(30)))
    data = open_module(tmp_path, val_fraction=0.3)
    expected = []
    for path in sorted(tmp_path.rglob("*.png")):
        digest = hashlib.blake2b(path.relative_to(tmp_path).as_posix().encode(), digest_size=6).hexdigest()
        if int(digest, 16) < 0.3 * 16**12:
            expected.append(path.relative_to(tmp_path).as_posix())
    assert 5 < len(expected) < 35
    assert sorted(names(data, "val")) == sorted(expected)
    assert not set(names(data, "val")) & set(names(data, "train"))
    assert len(data.dataset("val")) + len(data.dataset("train")) == 60
    assert data.dataset("test") is data.dataset("val")
    val = data.dataset("val")
    assert all(val[i]["label"] == ["cat", "dog"].index(names(data, "val")[i][:3]) for i in range(len(val)))


def test_hashes_are_uniform() -> None:
    values = [path_hash(f"/data/cat/{i:05d}.jpg", Path("/data")) for i in range(10_000)]
    assert sum(value < 0.05 for value in values) == pytest.approx(500, abs=5 * 22)  # 5 standard deviations
    counts, _ = np.histogram(values, 10, (0, 1))
    assert np.abs(counts - 1000).max() < 5 * 30


def test_added_images_and_a_moved_root_leave_the_others_in_their_split(tmp_path: Path) -> None:
    before = open_module(folder_of(tmp_path / "a", *(f"cat/{i}.png" for i in range(40))), val_fraction=0.2)
    held_out, trained = set(names(before, "val")), set(names(before, "train"))
    (tmp_path / "a").rename(tmp_path / "b")
    folder_of(tmp_path / "b", *(f"{c}/{i}.png" for c in ("ant", "cat") for i in range(30, 60)))
    after = open_module(tmp_path / "b", val_fraction=0.2)
    assert held_out < set(names(after, "val"))
    assert trained < set(names(after, "train"))


def test_a_few_images_leave_one_for_each_split(tmp_path: Path) -> None:
    data = open_module(folder_of(tmp_path, "a.png", "b.png"), val_fraction=1e-6)
    assert len(data.dataset("train")) == len(data.dataset("val")) == 1


def test_one_image_can_serve_both_splits_if_asked(tmp_path: Path) -> None:
    save(tmp_path / "only.png")
    with pytest.raises(ValueError, match=r"`val_fraction` must leave images to train on, .* all 1 .*`val_root`"):
        open_module(tmp_path).setup("fit")
    data = open_module(tmp_path, val_root=tmp_path)
    data.setup("fit")
    assert names(data, "train") == names(data, "val") == ["only.png"]


def test_classes_of_other_folders_are_matched_by_name(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", "ant/1.png", "bee/1.png", "cat/1.png")
    folder_of(tmp_path / "val", "cat/2.png")
    folder_of(tmp_path / "test", "bee/3.png", "cat/3.png")
    data = open_module(tmp_path / "train", val_root=tmp_path / "val", test_root=str(tmp_path / "test"))
    data.setup()
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [3, 1, 2]
    assert data.dataset("val")[0]["label"] == 2
    test = data.dataset("test")
    assert {(Path(path).parent.name, label) for path, label in test.files} == {("bee", 1), ("cat", 2)}


@pytest.mark.parametrize("argument", ["val_root", "test_root"])
def test_classes_that_training_lacks_are_refused(tmp_path: Path, argument: str) -> None:
    folder_of(tmp_path / "train", "ant/1.png", "bee/1.png")
    folder_of(tmp_path / "other", "ant/1.png", "wasp/1.png")
    folder_of(tmp_path / "flat", "1.png", "2.png")
    message = rf"`{argument}` must have only the classes ant, bee, .*other has wasp\."
    with pytest.raises(ValueError, match=message):
        open_module(tmp_path / "train", **{argument: tmp_path / "other"}).setup()
    with pytest.raises(ValueError, match=r"flat has images outside any sub-folder"):
        open_module(tmp_path / "train", **{argument: tmp_path / "flat"}).setup()
    with pytest.raises(ValueError, match=rf"`{argument}` must have no classes, .* ant, wasp"):
        open_module(tmp_path / "flat", **{argument: tmp_path / "other"}).setup()


# Setup


@pytest.mark.parametrize("argument", ["root", "val_root", "test_root"])
def test_bad_folders_are_refused_in_setup(tmp_path: Path, argument: str) -> None:
    good = folder_of(tmp_path / "good", "1.png", "2.png")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "README.md").write_text("no image")

    def module(folder: str) -> ImageFolderDataModule:
        return open_module(**{"root": good, argument: tmp_path / folder})

    missing, file, empty = module("missing"), module("good/1.png"), module("empty")
    with pytest.raises(FileNotFoundError, match=rf"`{argument}` must be a folder .*missing does not exist"):
        missing.setup()
    with pytest.raises(ValueError, match=rf"`{argument}` must be a folder .*1\.png is a file; give its folder"):
        file.setup()
    with pytest.raises(ValueError, match=rf"`{argument}` must hold images, but .*empty .*\.jpg .*\.png .*convert"):
        empty.setup()


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    for value in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=rf"`val_fraction` must be in \(0, 1\), got {value}"):
            open_module(tmp_path, val_fraction=value)
    folder_of(tmp_path, "1.png", "2.png")
    with pytest.raises(ValueError, match=r"`crop` must be one of center, random, got 'middle'"):
        open_module(tmp_path, crop="middle").setup("fit")
    with pytest.raises(ValueError, match=r"`interpolation` must be one of .*bicubic.*, got 'nearest'"):
        open_module(tmp_path, interpolation="nearest").setup("fit")


def test_stages_look_at_what_they_need_alone(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "root", "cat/1.png", "cat/2.png")
    test = folder_of(tmp_path / "test", "cat/1.png")
    (root / "cat/bad.png").write_text("not an image")
    data = open_module(root, val_root=tmp_path / "missing", test_root=test)
    data.setup(TrainerFn.TESTING)  # as the trainer calls it; a warning of bad.png would be an error here
    assert len(data.dataset("test")) == 1
    data.setup(TrainerFn.PREDICTING)
    assert data.num_classes == 1
    for stage in (TrainerFn.VALIDATING, TrainerFn.FITTING):
        with pytest.raises(FileNotFoundError, match=r"`val_root`"):
            data.setup(stage)
    with pytest.raises(FileNotFoundError, match=r"`root`"):
        open_module(tmp_path / "missing").setup("predict")


def test_classes_are_known_before_setup(tmp_path: Path) -> None:
    folder_of(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "dog/bad.png").write_text("not an image")
    data = open_module(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.num_classes == 2


def test_setup_works_once(tmp_path: Path) -> None:
    data = open_module(folder_of(tmp_path, "1.png", "2.png", "3.png"), val_root=tmp_path)
    data.setup("fit")
    train = data.dataset("train")
    (tmp_path / "1.png").unlink()
    data.setup("fit")
    data.setup()
    assert data.dataset("train") is train
    assert len(train) == 3


def test_a_command_line_can_make_it(tmp_path: Path) -> None:
    folder_of(tmp_path, "1.png", "2.png")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(ImageFolderDataModule, "data")
    arguments = [f"--data.root={tmp_path}", "--data.image_size=8", "--data.crop=random", "--data.num_workers=0"]
    data = ImageFolderDataModule(**parser.parse_args(arguments).data.as_dict())
    assert len(data.dataset("train")) == 1
    with pytest.raises(SystemExit):
        parser.parse_args([*arguments, "--data.crop=middle"])


def test_loaders_yield_batches_also_from_a_worker(tmp_path: Path) -> None:
    folder_of(tmp_path, *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(6)))
    data = ImageFolderDataModule(tmp_path, 8, val_root=tmp_path, batch_size=5, num_workers=1, num_generate=5)
    data.setup("fit")
    train, val = list(data.train_dataloader()), list(data.val_dataloader())
    assert [batch["image"].shape for batch in train] == [(5, 3, 8, 8)] * 2
    assert val[0]["original_size"].tolist() == [[8, 8]] * 5
    assert val[0]["crop_top_left"].tolist() == [[0, 0]] * 5
    assert val[0]["original_size"].dtype == val[0]["crop_top_left"].dtype == torch.int64
    labels = torch.cat([batch["label"] for batch in val]).tolist()
    assert sorted(labels) == [0] * 6 + [1] * 6
    assert labels != sorted(labels), "the first batches of a validation hold more than the first classes"
    assert val[0]["label"].dtype == torch.int64
    (requests,) = data.predict_dataloader()
    assert requests["label"].tolist() == [0, 1, 0, 1, 0]


# Files that cannot be read


def spoil(folder: Path) -> dict[str, str]:
    """Write files that look like images to a listing alone; return the reason to be given for each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bad0_empty.jpg").write_bytes(b"")
    (folder / "bad1_text.jpg").write_text("<html>404 Not Found</html>")
    (folder / "bad2_link.png").symlink_to(folder / "gone.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for name in ("bad3_cut.png", "bad4_cut.jpg"):
        noise.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:500])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "bad5_float.tif")
    Image.fromarray(np.full((8, 8), -1, np.int32)).save(folder / "bad6_negative.tif")
    Image.new("L", (64, 64)).save(folder / "bad7_bomb.png")
    unknown, cut, depth = "not an image", "OSError", "range of its values"
    reasons = [unknown, unknown, "FileNotFoundError", cut, cut, depth, depth, "DecompressionBombError"]
    return dict(zip(sorted(path.name for path in folder.glob("bad*")), reasons, strict=True))


@pytest.fixture
def small_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set Pillow's own limit so that it warns from 40 x 40 pixels on and refuses from 57 x 57."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1599)


@pytest.mark.usefixtures("small_bombs")
def test_unreadable_files_are_left_out_with_one_warning(tmp_path: Path) -> None:
    reasons = spoil(tmp_path / "cat")
    folder_of(tmp_path, "cat/good1.png", "dog/good2.png")
    data = open_module(tmp_path, val_root=tmp_path, max_bad_share=0.8)
    with pytest.warns(UserWarning, match="cannot be read") as caught:
        data.setup("fit")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "Left out 8 of 10 images" in message
    assert " and 3 more" in message
    for name, reason in list(reasons.items())[:5]:
        assert reason in message.split(name)[1].split(")")[0]
    for split in ("train", "val"):
        assert sorted(names(data, split)) == ["cat/good1.png", "dog/good2.png"]
        assert sorted(data.dataset(split)[i]["label"] for i in range(2)) == [0, 1]
    data.setup("fit")  # A second warning would be an error.


@pytest.mark.usefixtures("small_bombs")
def test_a_read_of_an_unreadable_file_names_it_and_the_remedy(tmp_path: Path) -> None:
    reasons = spoil(tmp_path)
    data = open_module(tmp_path, val_root=tmp_path, verify=False, on_error="raise")
    data.setup("fit")
    train = data.dataset("train")
    assert len(train) == 8
    for i, (name, reason) in enumerate(reasons.items()):
        with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*{reason}.*set `on_error` to skip"):
            train[i]


@pytest.mark.usefixtures("small_bombs")
def test_a_folder_of_unreadable_files_is_refused(tmp_path: Path) -> None:
    spoil(tmp_path / "bad")
    good = folder_of(tmp_path / "good/bad", "1.png", "2.png").parent
    with pytest.raises(ValueError, match=r"train images .* none of 8 is: .*bad0_empty\.jpg \(not an image"):
        open_module(tmp_path / "bad", val_root=good / "bad").setup("fit")
    with pytest.raises(ValueError, match=r"val images .* none of 8 is: "):
        open_module(good / "bad", val_root=tmp_path / "bad").setup("fit")


@pytest.mark.usefixtures("small_bombs")
def test_remarks_of_pillow_are_not_errors(tmp_path: Path) -> None:
    save(tmp_path / "large.png", (5, 6, 7), size=50)
    palette(bytes([255, 51])).save(tmp_path / "palette.png")
    with pytest.raises(Image.DecompressionBombWarning):  # as warnings are errors here
        Image.open(tmp_path / "large.png")
    data = open_module(tmp_path, val_root=tmp_path)
    before = list(warnings.filters)
    data.setup("fit")
    np.testing.assert_allclose(levels(data.dataset("train")[0]["image"]), [[(5, 6, 7)] * 8] * 8, atol=1e-3)
    assert warnings.filters == before


def test_every_one_of_many_images_is_verified(tmp_path: Path) -> None:
    good = save(tmp_path / "000.png").read_bytes()
    for i in range(150):
        (tmp_path / f"{i:03d}.png").write_bytes(good if i % 50 == 0 else b"")
    data = open_module(tmp_path, val_root=tmp_path, max_bad_share=0.98)
    with pytest.warns(UserWarning, match=r"Left out 147 of 150 images"):
        data.setup("fit")
    assert names(data, "train") == ["000.png", "050.png", "100.png"]


@pytest.mark.skipif(os.name == "nt", reason="names that are not text exist on POSIX alone")
def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    try:
        os.rename(save(tmp_path / "x.png"), os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:
        pytest.skip("the file system takes no such names")
    save(tmp_path / "y.png")
    data = open_module(tmp_path, val_fraction=0.4)
    data.setup("fit")
    assert len(data.dataset("train")) == len(data.dataset("val")) == 1
