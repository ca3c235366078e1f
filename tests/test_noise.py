from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from lpl_lightning.noise import (
    DDPM,
    FlowMatching,
    LogitNormal,
    ModeSampling,
    NoiseProcess,
    TimeDistribution,
    Uniform,
)

PROCESSES: list[NoiseProcess] = [DDPM("epsilon"), DDPM("v_prediction"), DDPM("sample"), FlowMatching()]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.prediction_type)
def test_true_prediction_gives_back_z0(process: NoiseProcess) -> None:
    """Table 1: from the exact target the clean latent follows, at every time."""
    z0 = torch.randn(200, 4, 8, 8)
    noisy = process.sample(z0)
    torch.testing.assert_close(process.estimate_z0(process.target(noisy), noisy), z0, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.prediction_type)
def test_prediction_error_scales_as_table_1_says(process: NoiseProcess) -> None:
    """An error e in the prediction moves z0_hat by -nsr e (epsilon), -sigma e (v, flow) or e (sample)."""
    noisy = process.sample(torch.randn(50, 4, 8, 8))
    error = torch.randn(50, 4, 8, 8)
    moved = process.estimate_z0(process.target(noisy) + error, noisy) - noisy.z0
    factor: dict[str, Tensor] = {
        "epsilon": -noisy.sigma / noisy.alpha,
        "v_prediction": -noisy.sigma,
        "flow": -noisy.sigma,
        "sample": torch.ones(()),
    }
    torch.testing.assert_close(moved, factor[process.prediction_type] * error, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddpm_agrees_with_diffusers(prediction_type: Literal["epsilon", "v_prediction"]) -> None:
    process = DDPM(prediction_type)
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=prediction_type == "v_prediction",
    )
    z0 = torch.randn(64, 4, 4, 4)
    t = torch.linspace(0, 999, 64).long()
    noisy = process.sample(z0, t=t)
    torch.testing.assert_close(noisy.z_t, scheduler.add_noise(z0, noisy.noise, t), atol=1e-3, rtol=1e-4)
    if prediction_type == "v_prediction":
        velocity = scheduler.get_velocity(z0, noisy.noise, t)
        torch.testing.assert_close(process.target(noisy), velocity, atol=1e-3, rtol=1e-4)


def test_scaled_linear_chain_in_closed_form() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    expected = np.cumprod(1 - betas)
    alpha, sigma = DDPM().alpha_sigma(torch.arange(1000).float())
    np.testing.assert_allclose(alpha.double().numpy() ** 2, expected, rtol=1e-4)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))


def test_v_ends_in_pure_noise_and_epsilon_cannot() -> None:
    noisy = DDPM("v_prediction").sample(torch.randn(2, 4, 2, 2), t=torch.tensor([999.0, 0.0]))
    assert noisy.alpha[0].item() == 0
    assert math.isinf(noisy.noise_to_signal[0].item())
    torch.testing.assert_close(noisy.z_t[0], noisy.noise[0])
    assert torch.isfinite(DDPM("v_prediction").estimate_z0(noisy.noise, noisy)).all()
    with pytest.raises(ValueError, match="'v_prediction' or 'sample'"):
        DDPM("epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="`prediction_type` must be"):
        DDPM("velocity")  # type: ignore[arg-type]


def test_flow_is_a_straight_line_with_time_in_thousandths() -> None:
    z0 = torch.randn(3, 4, 2, 2)
    noisy = FlowMatching().sample(z0, t=torch.tensor([0.0, 250.0, 1000.0]))
    torch.testing.assert_close(noisy.z_t[0], z0[0])
    torch.testing.assert_close(noisy.z_t[1], 0.75 * z0[1] + 0.25 * noisy.noise[1])
    torch.testing.assert_close(noisy.z_t[2], noisy.noise[2])
    torch.testing.assert_close(noisy.noise_to_signal, torch.tensor([0.0, 1 / 3, math.inf]))


@pytest.mark.parametrize(
    ("distribution", "cdf"),
    [
        (Uniform(), lambda t: t),
        (LogitNormal(0.3, 0.8), lambda t: torch.special.ndtr((torch.logit(t) - 0.3) / 0.8)),
        (ModeSampling(0.0), lambda t: t),
    ],
    ids=["uniform", "logit_normal", "mode_0"],
)
def test_times_follow_their_distribution(distribution: TimeDistribution, cdf: object) -> None:
    """Kolmogorov-Smirnov against the closed form; 1.63 / sqrt(n) is its 1% point."""
    n = 20_000
    t = FlowMatching(distribution).draw_t(n, torch.Generator().manual_seed(0)).double().sort().values / 1000
    assert callable(cdf)
    distance = (cdf(t.clamp(1e-9, 1 - 1e-9)) - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < 1.63 / math.sqrt(n)


def test_mode_sampling_favours_the_middle_and_keeps_the_ends() -> None:
    """With s = 1.29 the density at t = 1/2 is 1 / |f'(1/2)| = 1 / (1 + s - s pi / 2), 3.79 times uniform's."""
    t = FlowMatching().draw_t(200_000, torch.Generator().manual_seed(0)) / 1000
    width = 0.01
    density = ((t - 0.5).abs() < width).float().mean().item() / (2 * width)
    assert density == pytest.approx(1 / (1 + 1.29 - 1.29 * math.pi / 2), rel=0.05)
    assert t.min() < 1e-3
    assert t.max() > 1 - 1e-3
    with pytest.raises(ValueError, match="`scale` must lie in"):
        ModeSampling(2.0)


def test_draws_repeat_with_their_generator_and_do_not_touch_the_global_one() -> None:
    z0 = torch.randn(4, 4, 2, 2)
    state = torch.get_rng_state()
    draws = [FlowMatching().sample(z0, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(draws[0].z_t, draws[1].z_t)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_maths_runs_in_float32_whatever_comes() -> None:
    noisy = DDPM().sample(torch.randn(2, 4, 2, 2, dtype=torch.bfloat16))
    assert noisy.z_t.dtype == torch.float32
    assert DDPM().estimate_z0(torch.randn(2, 4, 2, 2, dtype=torch.bfloat16), noisy).dtype == torch.float32


def test_times_of_the_wrong_number_are_refused() -> None:
    with pytest.raises(ValueError, match="one time for each of the 3"):
        FlowMatching().sample(torch.randn(3, 4, 2, 2), t=torch.zeros(2))
