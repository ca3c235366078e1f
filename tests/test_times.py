from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lpl_lightning.noise import FlowMatching
from lpl_lightning.times import CosMap, LogitNormal, ModeSampling, TimeDistribution, Uniform, shifted


def mode_cdf(t: Tensor, scale: float = 1.29) -> Tensor:
    """By bisection: mode sampling falls from 1 at u = 0 to 0 at u = 1, so that P(time < t) = 1 - u(t)."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        u = (low + high) / 2
        above = 1 - u - scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u) > t
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    return 1 - low


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("distribution", "cdf"),
    [
        (Uniform(), lambda t: t),
        (LogitNormal(0.3, 0.8), lambda t: torch.special.ndtr((torch.logit(t) - 0.3) / 0.8)),
        (ModeSampling(0.0), lambda t: t),
        (ModeSampling(), mode_cdf),
        (CosMap(), lambda t: 2 / math.pi * torch.atan(t / (1 - t))),
    ],
    ids=["uniform", "logit_normal", "mode_0", "mode_1.29", "cosmap"],
)
def test_times_follow_their_distribution(
    distribution: TimeDistribution, cdf: Callable[[Tensor], Tensor], shift: float
) -> None:
    """Kolmogorov-Smirnov against the closed form; 1.63 / sqrt(n) is its 1% point."""
    n = 20_000
    flow = FlowMatching(distribution, shift)
    t = flow.draw_t(n, torch.Generator().manual_seed(0)).double().sort().values / 1000
    unshifted = t / (shift - (shift - 1) * t)
    distance = (cdf(unshifted.clamp(1e-9, 1 - 1e-9)) - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < 1.63 / math.sqrt(n)


def test_mode_sampling_favours_the_middle_and_keeps_the_ends() -> None:
    """With s = 1.29 the density at t = 1/2 is 1 / |f'(1/2)| = 1 / (1 + s - s pi / 2), 3.79 times uniform's."""
    t = FlowMatching().draw_t(200_000, torch.Generator().manual_seed(0)) / 1000
    width = 0.01
    density = ((t - 0.5).abs() < width).float().mean().item() / (2 * width)
    assert density == pytest.approx(1 / (1 + 1.29 - 1.29 * math.pi / 2), rel=0.05)
    assert t.min() < 1e-3
    assert t.max() > 1 - 1e-3


def test_cosmap_is_the_cosine_schedule() -> None:
    """Uniform u on the cosine schedule has the ratio tan(pi u / 2), as a flow has at CosMap's time."""
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    t = CosMap()(u)
    torch.testing.assert_close(t / (1 - t), torch.tan(math.pi / 2 * u))


def test_a_shift_multiplies_the_noise_to_signal_ratio() -> None:
    t = torch.linspace(0.0, 0.99, 50, dtype=torch.float64)
    moved = shifted(t, 3.0)
    torch.testing.assert_close(moved / (1 - moved), 3 * t / (1 - t))
    assert shifted(torch.ones(1), 3.0).item() == 1


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="`scale` must lie in"):
        ModeSampling(2.0)
    with pytest.raises(ValueError, match="`std` must be above 0, got 0"):
        LogitNormal(std=0)
    with pytest.raises(ValueError, match="`shift` must be above 0, got -1"):
        FlowMatching(shift=-1)
