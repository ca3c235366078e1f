from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lpl_lightning.metrics.preparation import IMAGENET_MEAN, IMAGENET_STD, Filter, Preparation, check_images


def pixels(count: int = 3, height: int = 40, width: int = 40) -> Tensor:
    """Noise of 8 bits, (B, 3, H, W) uint8; of so little contrast that bicubic, which overshoots, is not clipped."""
    return torch.randint(80, 176, (count, 3, height, width), dtype=torch.uint8)


def images(eight: Tensor) -> Tensor:
    return eight.float() / 127.5 - 1


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(40, 40), (31, 57), (57, 31), (9, 9), (16, 16)])
def test_equal_to_torchvision_transforms(resize: Filter, height: int, width: int) -> None:
    eight = pixels(3, height, width)
    theirs = v2.Compose(
        [
            v2.Resize(16, interpolation=v2.InterpolationMode[resize.upper()], antialias=True),
            v2.CenterCrop(16),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    found = Preparation(16, resize)(images(eight))
    assert found.shape == (3, 3, 16, 16)
    # Theirs rounds to 8 bits after each of the two axes, by half a level, and ours does not.
    torch.testing.assert_close(found, theirs(eight), rtol=0, atol=1.3 / 255 / min(IMAGENET_STD))


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [7, 16, 64])
def test_antialiased_as_pil_does(resize: Filter, side: int) -> None:
    eight = pixels(1, 33, 49)
    picture = Image.fromarray(eight[0].movedim(0, 2).numpy())
    theirs = np.asarray(picture.resize((side, side), Image.Resampling[resize.upper()]))
    found = Preparation(side, resize, fit="stretch", pixels="uint8")(images(eight))[0].movedim(0, 2).numpy()
    assert np.abs(theirs.astype(int) - found.astype(int)).max() <= 1


def test_without_antialias_pixels_are_skipped() -> None:
    stripes = torch.tensor([-1.0, 1.0]).repeat(3).repeat_interleave(2)[None, None, None].expand(1, 3, 12, 12)
    plain = Preparation(3, antialias=False, pixels="uint8")(stripes)
    smooth = Preparation(3, antialias=True, pixels="uint8")(stripes)
    assert set(plain.unique().tolist()) == {128}  # midway between two pixels, whatever lies beyond them
    assert smooth.float().std() > plain.float().std()
    for antialias, found in ((False, plain), (True, smooth)):
        expected = torch.nn.functional.interpolate(
            (stripes + 1) * 127.5, (3, 3), mode="bilinear", antialias=antialias, align_corners=False
        )
        torch.testing.assert_close(found, expected.round().to(torch.uint8))


def test_a_set_is_the_same_from_memory_and_from_files() -> None:
    generated = torch.rand(2, 3, 8, 8) * 2 - 1
    written = images(((generated + 1) * 127.5).round().to(torch.uint8))
    assert not torch.equal(generated, written)
    for prepare in (Preparation(), Preparation(5), Preparation(pixels="uint8")):
        torch.testing.assert_close(prepare(generated), prepare(written), rtol=0, atol=0)
    eight = pixels()
    torch.testing.assert_close(Preparation(pixels="uint8")(images(eight)), eight, rtol=0, atol=0)


def test_crop_takes_the_middle_and_stretch_all() -> None:
    wide = torch.full((1, 3, 8, 24), -1.0)
    wide[..., 8:16] = 1.0
    assert Preparation(8, pixels="uint8")(wide).min() == 255
    stretched = Preparation(8, fit="stretch", pixels="uint8")(wide)
    assert (int(stretched.min()), int(stretched.max())) == (0, 255)
    assert Preparation(pixels="uint8")(wide).shape == (1, 3, 8, 24)


def test_bicubic_does_not_leave_the_range() -> None:
    edge = torch.full((1, 3, 16, 16), -1.0)
    edge[..., 8:] = 1.0
    found = Preparation(40, "bicubic", mean=(0, 0, 0), std=(1, 1, 1))(edge)
    assert (found.min().item(), found.max().item()) == (0, 1)


def test_settings_are_said() -> None:
    prepare = Preparation(16).given(resize="bicubic", antialias=None, mean=[0.5, 0.5, 0.5])
    assert prepare == Preparation(16, "bicubic", mean=(0.5, 0.5, 0.5))
    said = prepare.provenance()
    assert (said["input_size"], said["resize"], said["antialias"]) == (16, "bicubic, crop", True)
    assert "(0.5, 0.5, 0.5)" in str(said["normalization"])
    kinds: list[dict[str, Any]] = [
        {},
        {"size": 16},
        {"size": 16, "resize": "bicubic"},
        {"size": 16, "antialias": False},
        {"size": 16, "fit": "stretch"},
        {"mean": (0, 0, 0)},
        {"std": (1, 1, 1)},
        {"pixels": "uint8"},
    ]
    assert len({str(Preparation(**kind).provenance()) for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (torch.zeros(1, 1, 8, 8), r"got the shape \(1, 1, 8, 8\)\. Convert grey and RGBA"),
        (torch.zeros(1, 4, 8, 8), r"got the shape \(1, 4, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"got the shape \(3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"got the shape \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"got torch.uint8\. For 8 bits give"),
        ([1], "got list"),
        (torch.full((2, 3, 8, 8), 255.0), r"got \[255, 255\]"),
        (torch.full((2, 3, 8, 8), -1.1), r"got \[-1.1, -1.1\]"),
        (torch.zeros(2, 3, 8, 8).fill_(torch.nan), "got 2 of 2 images with values that are not finite"),
        (torch.zeros(2, 3, 8, 8).fill_(-torch.inf), "got 2 of 2 images with values that are not finite"),
    ],
)
def test_what_is_no_image_is_refused(wrong: Any, told: str) -> None:
    with pytest.raises(ValueError, match=r"`images` must be \(B, 3, H, W\) floating point in \[-1, 1\], " + told):
        check_images(wrong)
    check_images(torch.ones(1, 3, 8, 8, dtype=torch.bfloat16))


def test_settings_that_are_none_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"size": 0}, "`size` must be 1 or more"),
        ({"resize": "nearest"}, "`resize` must be one of bilinear, bicubic, got 'nearest'"),
        ({"fit": "pad"}, "`fit` must be one of crop, stretch"),
        ({"pixels": "bits"}, "`pixels` must be one of normalized, uint8"),
        ({"mean": (0.5,)}, "`mean` must be three numbers, one a channel"),
        ({"std": (1, 0, 1)}, "`std` must be three numbers above 0"),
    ]
    for settings, told in wrong:
        with pytest.raises(ValueError, match=told):
            Preparation(**settings)
