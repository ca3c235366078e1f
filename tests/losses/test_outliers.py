from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpl_lightning.losses.outliers import _statistics, inlier_mask, odd_kernel


def naive_mask(features: Tensor, quantile: float, widening: float, dilation: int, erosion: int) -> Tensor:
    """Position by position, in plain Python numbers, of any number of spatial axes."""
    result = torch.zeros_like(features)
    sides = features.shape[2:]
    positions = list(itertools.product(*(range(n) for n in sides)))

    def window(grid: dict[tuple[int, ...], bool], center: tuple[int, ...], size: int) -> list[bool]:
        half = size // 2
        ranges = [range(max(0, x - half), min(n, x + half + 1)) for x, n in zip(center, sides, strict=True)]
        return [grid[near] for near in itertools.product(*ranges)]

    for b, c in itertools.product(*(range(n) for n in features.shape[:2])):
        values = sorted(features[b, c].flatten().tolist())
        n = len(values)
        low = values[max(1, int(quantile * n)) - 1]
        high = values[max(1, int((1 - quantile) * n)) - 1]
        mean = sum(values) / n
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else 0.0
        inlier = {
            at: std == 0 or low - widening * std < features[(b, c, *at)].item() < high + widening * std
            for at in positions
        }
        dilated = {at: any(window(inlier, at, dilation)) for at in positions}
        for at in positions:
            result[(b, c, *at)] = float(all(window(dilated, at, erosion)))
    return result


@pytest.mark.parametrize(("dilation", "erosion"), [(1, 1), (3, 5), (3, 3), (1, 3)])
def test_mask_equals_a_naive_loop(dilation: int, erosion: int) -> None:
    features = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    features[0, 0, 3, 3:5] = 40.0
    features[1, 2, 0, 0] = -60.0
    features[1, 1] = 2.5
    # Within two standard deviations beyond the quantiles, but not within one.
    features[0, 1, 5, 5] = features[0, 1].min() - 1.5 * features[0, 1].std()
    features[0, 2, 5, 5] = features[0, 2].flatten().sort().values[-3] + 1.5 * features[0, 2].std()
    expected = naive_mask(features, 0.02, 2.0, dilation, erosion)
    assert torch.equal(inlier_mask(features, dilation=dilation, erosion=erosion), expected)
    if dilation == 1:
        assert expected[0, 0].min() == expected[1, 2].min() == 0, "what is planted is found"
    assert expected[1, 1].min() == 1, "a constant channel has no outliers"


@settings(deadline=None, max_examples=40)
@given(side=st.integers(1, 9), seed=st.integers(0, 10**6), spike=st.floats(0, 1e3))
def test_any_size_down_to_one_position(side: int, seed: int, spike: float) -> None:
    features = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features[0, 0, 0, 0] += spike
    assert torch.equal(inlier_mask(features), naive_mask(features, 0.02, 2.0, 3, 5))


def test_a_planted_spike_is_masked_and_nothing_else() -> None:
    features = torch.randn(1, 1, 32, 32)
    features[0, 0, 10, 20] = 1e3
    mask = inlier_mask(features, dilation=1, erosion=1)
    assert mask[0, 0, 10, 20] == 0
    assert mask.sum() == 32 * 32 - 1


def test_no_gradient_flows_through() -> None:
    assert not inlier_mask(torch.randn(1, 1, 8, 8, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("size", "scale", "expected"), [(3, 1.0, 3), (5, 1.0, 5), (3, 0.5, 1), (5, 0.5, 3), (5, 0.25, 1)]
)
def test_kernels_scale_to_odd_sizes(size: int, scale: float, expected: int) -> None:
    kernel = odd_kernel(size, scale)
    assert kernel % 2 == 1
    assert abs(kernel - size * scale) <= 1
    assert kernel == expected


@pytest.mark.parametrize("shape", [(1, 2, 20), (1, 2, 5, 4, 6)], ids=str)
def test_lines_and_volumes(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, dtype=torch.float64)
    mask = inlier_mask(features, 0.2, 0.3, 3, 5)
    assert torch.equal(mask, naive_mask(features, 0.2, 0.3, 3, 5))
    assert torch.equal(inlier_mask(features, 0.2, 0.3, 1, 3), naive_mask(features, 0.2, 0.3, 1, 3))


@pytest.mark.parametrize("channels_last", [True, False])
def test_large_maps_are_sorted_in_parts(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against PyTorch's own order statistics; seven channels in parts of two, too long to be sorted whole."""
    features = torch.randn(3, 7, 80, 100).exp()
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    whole = inlier_mask(features, 0.1, 0.5, 3, 3)
    monkeypatch.setattr("lpl_lightning.losses.outliers.LARGE", 0)
    monkeypatch.setattr("lpl_lightning.losses.outliers.PART", 2 * 8000 * 4)
    kept = features.clone()
    torch.testing.assert_close(inlier_mask(features, 0.1, 0.5, 3, 3), whole)
    torch.testing.assert_close(features, kept)
    lower, upper, std = _statistics(features, 800, 7200)
    flat = features.flatten(2)
    torch.testing.assert_close(lower, flat.kthvalue(800).values)
    torch.testing.assert_close(upper, flat.kthvalue(7200).values)
    torch.testing.assert_close(std, flat.std(dim=2))
