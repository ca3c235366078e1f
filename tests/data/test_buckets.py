from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lpl_lightning.data.buckets import AspectBuckets, Size

divisors = st.integers(1, 64)
aspects = st.floats(1.0, 6.0)


@given(divisors, st.integers(1, 12), aspects)
def test_sizes_preserve_the_area(divisor: int, multiple: int, max_aspect: float) -> None:
    side = divisor * multiple
    sizes = AspectBuckets(divisor, max_aspect).sizes(side)
    assert (side, side) in sizes
    assert len(set(sizes)) == len(sizes)
    assert {(width, height) for height, width in sizes} == set(sizes)
    ratios = [width / height for height, width in sizes]
    assert ratios == sorted(ratios)
    for height, width in sizes:
        assert height % divisor == 0 == width % divisor
        assert side**2 - side * divisor < height * width <= side**2
        assert max(height, width) <= max_aspect * min(height, width)


@given(divisors, st.integers(1, 12), aspects)
def test_no_size_is_forgotten(divisor: int, multiple: int, max_aspect: float) -> None:
    """Against a search of all rectangles: of each short side the longest one that fits."""
    side = divisor * multiple
    longest: dict[int, int] = {}
    for short in range(divisor, side + 1, divisor):
        for long in range(short, side**2 // short + 1, divisor):
            longest[short] = long
    wanted = {(short, long) for short, long in longest.items() if long <= max_aspect * short}
    found = AspectBuckets(divisor, max_aspect).sizes(side)
    assert {size for size in found if size[0] <= size[1]} == wanted


def test_sizes_of_a_known_case() -> None:
    """256 px in steps of 64: as many pixels as 256 x 256 are 192 x 341, of which 320 can be divided, and so on."""
    assert AspectBuckets().sizes(256) == ((320, 192), (256, 256), (192, 320))
    assert AspectBuckets(64, 4.0).sizes(256) == ((512, 128), (320, 192), (256, 256), (192, 320), (128, 512))
    assert AspectBuckets(8, 1.2).sizes(64) == ((64, 64),)
    assert AspectBuckets(8, 1.3).sizes(64) == ((72, 56), (64, 64), (56, 72))


def distance(image: Size, size: Size) -> float:
    """Between aspect ratios, in the logarithm."""
    return abs(math.log(image[1] / image[0]) - math.log(size[1] / size[0]))


shapes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(st.lists(shapes, min_size=1, max_size=60), st.sampled_from([8, 16, 32]), aspects, st.integers(1, 20))
@example([(1, 3000), (3000, 1)], 8, 2.0, 1)
@example([(10, 10)] * 3 + [(10, 14)] * 3 + [(10, 18)] * 3, 8, 2.0, 5)
def test_every_image_goes_to_the_nearest_size_that_fills_a_batch(
    images: list[Size], divisor: int, max_aspect: float, least: int
) -> None:
    buckets = AspectBuckets(divisor, max_aspect)
    found = buckets.assign(images, 128, least)
    assert len(found.bucket_of) == len(images)
    for index, image in enumerate(images):
        size = found.size_of(index)
        assert distance(image, size) <= min(distance(image, other) for other in found.sizes) + 1e-12
    counts = [len(members) for members in found.members]
    assert sum(counts) == len(images)
    assert min(counts) >= min(least, len(images))
    assert min(counts) >= least or len(counts) == 1
    order = [buckets.sizes(128).index(size) for size in found.sizes]
    assert order == sorted(order)
    for bucket, members in enumerate(found.members):
        assert members.tolist() == [index for index, own in enumerate(found.bucket_of) if own == bucket]


@given(st.lists(shapes, min_size=1, max_size=40), st.integers(1, 12))
def test_dropping_sizes_one_by_one_as_by_hand(images: list[Size], least: int) -> None:
    """The rule in words, slowly: nearest of all; then, while one is too small, the smallest goes."""
    buckets = AspectBuckets(16, 3.0)
    left = list(buckets.sizes(128))
    assume(all(_untied(image, left) for image in images))

    def nearest() -> dict[Size, list[int]]:
        members: dict[Size, list[int]] = {size: [] for size in left}
        for index, image in enumerate(images):
            members[min(left, key=lambda size: distance(image, size))].append(index)
        return members

    first = {index: size for size, indices in nearest().items() for index in indices}
    while len(left) > 1 and min(len(indices) for indices in nearest().values()) < least:
        left.remove(min(left, key=lambda size: len(nearest()[size])))
    last = {index: size for size, indices in nearest().items() for index in indices}
    found = buckets.assign(images, 128, least)
    assert list(found.sizes) == left
    assert [found.size_of(index) for index in range(len(images))] == [last[index] for index in range(len(images))]
    assert found.moved == sum(first[index] != last[index] for index in first)


def _untied(image: Size, sizes: list[Size]) -> bool:
    """Whether no two sizes are equally far, where rounding would decide."""
    distances = np.sort([distance(image, size) for size in sizes])
    return bool((np.diff(distances) > 1e-9).all())


@pytest.mark.parametrize(
    ("settings", "side", "message"),
    [
        ({"divisor": 0}, 64, "`divisor` of `buckets` must be 1 or more, got 0"),
        ({"max_aspect": 0.5}, 64, "`max_aspect` of `buckets` must be 1 or more and finite, got 0.5"),
        ({"max_aspect": math.inf}, 64, "must be 1 or more and finite, got inf"),
        ({"divisor": 24}, 64, r"`image_size`=64 must be a multiple of `divisor`=24 of `buckets`.*\(48, 72\)"),
        ({"divisor": 64}, 32, r"`image_size`=32 must be a multiple of `divisor`=64 of `buckets`.*\(64, 128\)"),
        ({}, 64, "`buckets` leave one size, 64 x 64.*Lower `divisor`"),
        ({"divisor": 16, "max_aspect": 1.0}, 256, "leave one size, 256 x 256.*raise `max_aspect`"),
    ],
)
def test_settings_that_make_no_buckets_are_refused(settings: dict[str, Any], side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AspectBuckets(**settings).check(side)


def test_the_defaults_make_buckets_at_the_usual_sizes() -> None:
    for side, count in ((256, 3), (512, 5), (1024, 9)):
        AspectBuckets().check(side)
        assert len(AspectBuckets().sizes(side)) == count


def test_at_1024_px_they_are_those_of_sdxl() -> None:
    """The longest of each short side in the table of Podell et al., 2023, appendix I."""
    table = {512: 2048, 576: 1792, 640: 1600, 704: 1472, 768: 1344, 832: 1216, 896: 1152, 960: 1088, 1024: 1024}
    assert {size for size in AspectBuckets(max_aspect=4.0).sizes(1024) if size[0] <= size[1]} == set(table.items())
