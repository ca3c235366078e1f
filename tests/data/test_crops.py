import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from lpl_lightning.data.crops import CoveringCrop, SquareCrop, covering

SIZE = 12
# Wide, upright, square, enlarged, with an even and an odd number of pixels to cut off.
SHAPES = [(24, 62), (24, 60), (61, 24), (30, 30), (7, 11), (12, 40)]


def noise(height: int, width: int) -> Image.Image:
    """No part of it is like another, or like itself mirrored."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def levels(image: Tensor) -> Any:
    """(H, W, 3) uint8, as Pillow has it."""
    return ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def resized(image: Image.Image) -> Image.Image:
    scale = SIZE / min(image.size)
    return image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_record_says_where_the_square_is(shape: tuple[int, int], flip: bool, crop: Any) -> None:
    """Pillow alone, given the record, cuts out the same pixels: of the mirrored image where it is mirrored."""
    image = noise(*shape)
    plain = resized(image)
    mirrored = ImageOps.mirror(plain)
    square = SquareCrop(SIZE, crop, flip)
    flips, places = [], set()
    for _ in range(60):
        item = square(image)
        assert item["original_size"].tolist() == list(shape)
        top, left = item["crop_top_left"].tolist()
        assert item["crop_top_left"].dtype == item["original_size"].dtype == torch.int64
        box = (left, top, left + SIZE, top + SIZE)
        assert min(top, left) >= 0
        assert box[2] <= plain.width
        assert box[3] <= plain.height
        found = levels(item["image"])
        as_it_is, as_mirrored = (np.array_equal(found, np.asarray(i.crop(box))) for i in (plain, mirrored))
        assert as_it_is != as_mirrored
        flips.append(as_mirrored)
        places.add((top, left))
    assert set(flips) == ({False, True} if flip else {False})
    if crop == "random" and plain.width != plain.height:
        assert len(places) > 3
    if crop == "center":
        # To the nearest pixel, from either side.
        assert all(abs(2 * top + SIZE - plain.height) <= 1 for top, _ in places)
        assert all(abs(2 * left + SIZE - plain.width) <= 1 for _, left in places)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_seed_draws_what_torchvision_draws(shape: tuple[int, int], flip: bool, crop: Any) -> None:
    chain = v2.Compose(
        [
            v2.Resize(SIZE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomCrop(SIZE) if crop == "random" else v2.CenterCrop(SIZE),
            v2.RandomHorizontalFlip(0.5 if flip else 0.0),
            v2.PILToTensor(),
        ]
    )
    image, square = noise(*shape), SquareCrop(SIZE, crop, flip)
    torch.manual_seed(3)
    expected = [chain(image).permute(1, 2, 0).numpy() for _ in range(10)]
    torch.manual_seed(3)
    for pixels in expected:
        np.testing.assert_array_equal(levels(square(image)["image"]), pixels)


def test_mirroring_leaves_the_crops_of_a_seed_as_they_are() -> None:
    image, records = noise(24, 62), []
    for flip in (False, True):
        torch.manual_seed(5)
        square = SquareCrop(SIZE, "random", flip)
        records.append([square(image)["crop_top_left"].tolist() for _ in range(20)])
    # The resized image is 31 wide: a crop at `left` begins at 31 - 12 - left of the mirrored one.
    assert all(right in (left, [left[0], 19 - left[1]]) for left, right in zip(*records, strict=True))
    assert records[0] != records[1]


sides = st.integers(1, 4000)


@given(sides, sides, st.tuples(sides, sides))
def test_it_is_the_smallest_of_its_shape_that_covers(height: int, width: int, size: tuple[int, int]) -> None:
    """In whole pixels: a side fits exactly, and the other is what the scale makes it, rounded down."""
    found = covering(height, width, size)
    scale = max(Fraction(size[0], height), Fraction(size[1], width))
    assert found == (math.floor(height * scale), math.floor(width * scale))
    assert found[0] >= size[0]
    assert found[1] >= size[1]
    assert size[0] == found[0] or size[1] == found[1]


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(8, 20), (20, 8), (11, 13)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_record_says_where_a_rectangle_is(
    shape: tuple[int, int], size: tuple[int, int], flip: bool, crop: Any
) -> None:
    """Pillow alone, given the record, cuts out the same pixels, as of squares."""
    image = noise(*shape)
    height, width = covering(*shape, size)
    plain = image.resize((width, height), Image.Resampling.BICUBIC)
    rectangle, places = CoveringCrop(crop, flip), set()
    for _ in range(20):
        item = rectangle(image, size)
        assert item["original_size"].tolist() == list(shape)
        top, left = item["crop_top_left"].tolist()
        assert 0 <= top <= height - size[0]
        assert 0 <= left <= width - size[1]
        box = (left, top, left + size[1], top + size[0])
        found = levels(item["image"])
        seen = [np.array_equal(found, np.asarray(i.crop(box))) for i in (plain, ImageOps.mirror(plain))]
        assert seen in ([True, False], [False, True] if flip else [])
        places.add((top, left))
    if crop == "random" and max(height - size[0], width - size[1]) > 4:
        assert len(places) > 2
    if crop == "center":
        assert all(
            abs(2 * top + size[0] - height) <= 1 and abs(2 * left + size[1] - width) <= 1 for top, left in places
        )
