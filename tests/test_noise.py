from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lpl_lightning.noise import DDPM, EDM, FlowMatching, NoiseProcess

PROCESSES: list[NoiseProcess] = [
    DDPM("epsilon"),
    DDPM("v_prediction"),
    DDPM("sample"),
    FlowMatching(),
    EDM(),
    EDM(sigma_data=0.5, mean=-0.4),
]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.prediction_type)
def test_true_prediction_gives_back_z0(process: NoiseProcess) -> None:
    """Table 1: from the exact target the clean latent follows, at every time."""
    z0 = torch.randn(200, 4, 8, 8)
    noisy = process.sample(z0)
    torch.testing.assert_close(process.estimate_z0(process.target(noisy), noisy), z0, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.prediction_type)
def test_prediction_error_scales_as_table_1_says(process: NoiseProcess) -> None:
    """An error e of the prediction moves z0_hat: -nsr e (epsilon), -sigma e (v, flow), e (sample), s sigma e (EDM)."""
    noisy = process.sample(torch.randn(50, 4, 8, 8))
    error = torch.randn(50, 4, 8, 8)
    moved = process.estimate_z0(process.target(noisy) + error, noisy) - noisy.z0
    factor: dict[str, Tensor] = {
        "epsilon": -noisy.sigma / noisy.alpha,
        "v_prediction": -noisy.sigma,
        "flow": -noisy.sigma,
        "sample": torch.ones(()),
        "edm": noisy.sigma * getattr(process, "sigma_data", 1.0),
    }
    torch.testing.assert_close(moved, factor[process.prediction_type] * error, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddpm_agrees_with_diffusers(
    prediction_type: Literal["epsilon", "v_prediction"],
    schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"],
) -> None:
    process = DDPM(prediction_type, beta_schedule=schedule)
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=schedule,
        rescale_betas_zero_snr=prediction_type == "v_prediction",
    )
    z0 = torch.randn(64, 4, 4, 4)
    t = torch.linspace(0, 999, 64).long()
    noisy = process.sample(z0, t=t)
    torch.testing.assert_close(noisy.z_t, scheduler.add_noise(z0, noisy.noise, t), atol=1e-3, rtol=1e-4)
    if prediction_type == "v_prediction":
        velocity = scheduler.get_velocity(z0, noisy.noise, t)
        torch.testing.assert_close(process.target(noisy), velocity, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.prediction_type)
def test_nothing_but_numbers_at_both_ends(process: NoiseProcess) -> None:
    """Where all is signal, and where all is noise."""
    ends = {"flow": [0.0, 1000.0], "edm": [-30.0, 20.0]}.get(process.prediction_type, [0.0, 999.0])
    noisy = process.sample(torch.randn(2, 4, 4, 4), t=torch.tensor(ends))
    target = process.target(noisy)
    for values in (noisy.z_t, target, process.estimate_z0(target, noisy), process.weight(noisy)):
        assert values.isfinite().all()
    assert not noisy.noise_to_signal.isnan().any()
    if process.prediction_type not in ("epsilon", "edm"):  # whose last steps keep a little signal
        torch.testing.assert_close(process.estimate_z0(target, noisy), noisy.z0, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_agrees_with_diffusers(shift: float) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    z0 = torch.randn(10, 4, 2, 2)
    t = scheduler.timesteps[::100]
    noisy = FlowMatching(shift=shift).sample(z0, t=t)
    expected = [scheduler.scale_noise(z0[i : i + 1], t[i : i + 1], noisy.noise[i : i + 1]) for i in range(10)]
    torch.testing.assert_close(noisy.z_t, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(noisy.sigma.flatten(), scheduler.sigmas[:1000:100])


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_agrees_with_diffusers(sigma_data: float) -> None:
    """Inputs, times and the clean latent of a prediction."""
    scheduler: Any = EDMEulerScheduler(sigma_data=sigma_data)
    process = EDM(sigma_data)
    levels = torch.tensor([0.01, 0.5, 3.0, 50.0])
    noisy = process.sample(torch.randn(4, 4, 2, 2), t=scheduler.precondition_noise(levels))
    torch.testing.assert_close(noisy.noise_to_signal, levels)
    x = noisy.z0 + levels.view(-1, 1, 1, 1) * noisy.noise
    prediction = torch.randn_like(x)
    column = levels.view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy.z_t, scheduler.precondition_inputs(x, column))
    estimate = process.estimate_z0(prediction, noisy)
    torch.testing.assert_close(estimate, scheduler.precondition_outputs(x, prediction, column), atol=1e-5, rtol=1e-4)


def test_edm_targets_have_unit_variance_and_levels_are_log_normal() -> None:
    process = EDM(sigma_data=0.5, mean=-0.4, std=0.9)
    z0 = 0.5 * torch.randn(4_000, 4, 4, 4)
    noisy = process.sample(z0, torch.Generator().manual_seed(0))
    target = process.target(noisy)
    assert target.std().item() == pytest.approx(1.0, abs=0.01)
    for part in target.flatten(1)[noisy.noise_to_signal.argsort()].chunk(4):
        assert part.std().item() == pytest.approx(1.0, abs=0.03)
    logs = noisy.noise_to_signal.log().double().sort().values
    distance = (torch.special.ndtr((logs + 0.4) / 0.9) - (torch.arange(4_000) + 0.5) / 4_000).abs().max().item()
    assert distance < 1.63 / math.sqrt(4_000)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_errors_of_the_clean_latent_by_min_snr(
    prediction_type: Literal["epsilon", "v_prediction", "sample"],
) -> None:
    """However it is predicted, the weighted error is min(SNR, 5) times that of the clean latent."""
    process = DDPM(prediction_type, min_snr_gamma=5.0, rescale_betas_zero_snr=False)
    noisy = process.sample(torch.randn(40, 4, 2, 2), t=torch.linspace(0, 999, 40).round())
    error = torch.randn(40, 4, 2, 2)
    prediction = process.target(noisy) + error
    weighted = process.weight(noisy) * error.square().flatten(1).mean(dim=1)
    of_z0 = (process.estimate_z0(prediction, noisy) - noisy.z0).square().flatten(1).mean(dim=1)
    snr = noisy.noise_to_signal**-2
    expected = snr.clamp_max(5) * of_z0
    if prediction_type == "v_prediction":  # (SNR + 1) is what an error of v weighs: alpha^2 + sigma^2 = 1
        assert torch.allclose(1 / (snr + 1), noisy.sigma.flatten() ** 2, rtol=1e-3)
    torch.testing.assert_close(weighted, expected, rtol=2e-2, atol=1e-4)
    assert DDPM(prediction_type).weight(noisy).tolist() == [1.0] * 40
    with pytest.raises(ValueError, match="`min_snr_gamma` must be above 0"):
        DDPM(prediction_type, min_snr_gamma=0.0)


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
