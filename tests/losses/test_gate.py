from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from lpl_lightning import DDPM, estimate_z0
from lpl_lightning.losses.gate import Threshold, equivalents, gate_weight, latent_side


def diffusers_ratios() -> torch.Tensor:
    """sigma / alpha of each step of Stable Diffusion's chain, by diffusers, in float64."""
    chain = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alpha_squared = chain.alphas_cumprod.double()
    ratios: torch.Tensor = ((1 - alpha_squared) / alpha_squared).sqrt()
    return ratios


@given(st.floats(1e-3, 1e3))
def test_units_name_the_same_noise(nsr: float) -> None:
    units = equivalents(nsr)
    for unit in ("snr", "log_snr", "flow_t"):
        one: dict[str, Any] = {unit: units[unit]}
        assert Threshold(**one).to_nsr() == pytest.approx(nsr, rel=1e-9)
    # A signal of alpha with noise of sigma, whatever the scale of both.
    alpha = 0.3
    sigma = nsr * alpha
    assert units["snr"] == pytest.approx(alpha**2 / sigma**2)
    assert units["log_snr"] == pytest.approx(math.log(alpha**2 / sigma**2))
    t = units["flow_t"]
    assert t / (1 - t) == pytest.approx(nsr)


@pytest.mark.parametrize("step", [0, 199, 500, 999])
def test_a_timestep_is_the_ratio_of_diffusers_chain(step: int) -> None:
    assert Threshold(ddpm_timestep=step).to_nsr() == pytest.approx(diffusers_ratios()[step].item(), rel=1e-4)


def test_a_timestep_passes_itself_and_all_before_it() -> None:
    chain = DDPM()
    alpha, sigma = chain.alpha_sigma(torch.arange(1000.0))
    for step in (0, 3, 199, 731):
        passed = gate_weight(sigma / alpha, Threshold(ddpm_timestep=step).to_nsr()).nonzero().flatten()
        assert passed.tolist() == list(range(step + 1))
        assert equivalents(Threshold(ddpm_timestep=step).to_nsr())["ddpm_timestep"] == step


@pytest.mark.parametrize("softness", [1.0, 2.0])
def test_an_infinite_threshold_lets_pure_noise_pass(softness: float) -> None:
    ratios = torch.tensor([0.0, 3.0, math.inf, math.nan])
    assert gate_weight(ratios, math.inf, softness).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerDiscreteScheduler])
def test_a_timestep_passes_itself_in_any_loop(scheduler: Any) -> None:
    """Which may round the same ratio up."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    steps = torch.arange(1000)
    zeros = torch.zeros(1000, 1, 1, 1)
    _, single = estimate_z0(scheduler(**betas), zeros, zeros, steps)
    cumulative = DDPMScheduler(**betas).alphas_cumprod.double()
    for ratios in (single.double(), ((1 - cumulative) / cumulative).sqrt()):
        for step in range(1000):
            threshold = Threshold(ddpm_timestep=step).to_nsr()
            assert int((ratios <= threshold).sum()) == step + 1


def test_a_timestep_counts_in_the_chain_it_is_given() -> None:
    linear = DDPM(beta_schedule="linear")
    assert Threshold(ddpm_timestep=500).to_nsr(linear) != Threshold(ddpm_timestep=500).to_nsr()
    assert equivalents(Threshold(ddpm_timestep=500).to_nsr(linear), linear)["ddpm_timestep"] == 500


def test_a_flow_time_is_diffusers_sigma() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    sigma = scheduler.sigmas[250].item()
    assert Threshold(flow_t=sigma).to_nsr() == pytest.approx(sigma / (1 - sigma))


def test_the_papers_three_in_every_unit() -> None:
    """tau = 3 is three quarters of a flow's way and some 700 steps of the paper's chain."""
    units = equivalents(3.0)
    assert units["flow_t"] == 0.75
    assert units["snr"] == pytest.approx(1 / 9)
    ratios = diffusers_ratios()
    assert ratios[int(units["ddpm_timestep"])] <= 3 < ratios[int(units["ddpm_timestep"]) + 1]
    assert equivalents(math.inf)["flow_t"] == 1
    assert equivalents(math.inf)["ddpm_timestep"] == 999
    assert equivalents(1e-9)["ddpm_timestep"] == -1


def test_the_hard_gate_is_one_up_to_tau() -> None:
    nsr = torch.tensor([0.0, 1.0, 3.0, 3.0001, math.inf, math.nan])
    assert gate_weight(nsr, 3.0).tolist() == [1, 1, 1, 0, 0, 0]
    assert gate_weight(nsr[:5], math.inf).tolist() == [1] * 5


def test_the_smooth_gate_falls_around_tau() -> None:
    tau, s = 3.0, 2.0
    nsr = torch.tensor([0.0, 1.49, 1.5, 3.0, 6.0, 7.0, math.inf, math.nan], dtype=torch.float64)
    weights = gate_weight(nsr, tau, s)
    torch.testing.assert_close(weights, torch.tensor([1, 1, 1, 0.5, 0, 0, 0, 0], dtype=torch.float64))
    assert gate_weight(torch.tensor([-1.0]), tau, s).item() == 1, "never not a number"
    rising = torch.logspace(-1, 1.5, 200, dtype=torch.float64)
    assert (gate_weight(rising, tau, s).diff() <= 0).all()
    # The half cosine of ln nsr, a quarter of the way from tau to its end.
    quarter = torch.tensor([tau * s**0.5], dtype=torch.float64)
    assert gate_weight(quarter, tau, s).item() == pytest.approx((1 + math.cos(0.75 * math.pi)) / 2)


def test_softness_of_almost_one_is_the_hard_gate() -> None:
    nsr = torch.tensor([0.5, 2.99, 3.01, 9.0], dtype=torch.float64)
    torch.testing.assert_close(gate_weight(nsr, 3.0, 1.0001), gate_weight(nsr, 3.0))


@pytest.mark.parametrize(
    ("shape", "video", "side"),
    [
        ((2, 4, 32, 32), False, 32),
        ((2, 4, 16, 64), False, 32),
        ((2, 4, 8, 8, 8), False, 8),
        ((2, 4, 64, 4, 2), False, 8),
        ((2, 4, 9, 8, 8), True, 8),
        ((2, 4, 7), False, 7),
    ],
)
def test_side_of_a_latent(shape: tuple[int, ...], video: bool, side: float) -> None:
    assert latent_side(torch.zeros(shape), video) == pytest.approx(side)


@pytest.mark.parametrize(
    ("given_units", "message"),
    [
        ({}, "exactly one of the units nsr, snr, log_snr, ddpm_timestep, flow_t; got none"),
        ({"nsr": 3.0, "snr": 0.1}, r"exactly one .* got {'nsr': 3.0, 'snr': 0.1}"),
        ({"nsr": 0.0}, "in nsr must be a noise-to-signal ratio above 0, got 0.0"),
        ({"snr": -1.0}, "in snr must be"),
        ({"log_snr": math.inf}, "in log_snr must be a finite number"),
        ({"ddpm_timestep": -1}, "in ddpm_timestep must be a whole number from 0"),
        ({"ddpm_timestep": 1.5}, "in ddpm_timestep must be a whole number from 0"),
        ({"flow_t": 1.0}, "in flow_t must be a time between 0 and 1"),
    ],
)
def test_a_bad_threshold_is_named(given_units: dict[str, Any], message: str) -> None:
    for threshold in (Threshold(**given_units), given_units):
        with pytest.raises(ValueError, match=message):
            Threshold.of(threshold)
    with pytest.raises(ValueError, match=message):
        Threshold(**given_units).to_nsr()


def test_a_threshold_is_a_ratio_or_a_unit_by_name() -> None:
    assert Threshold.of(2) == Threshold.of({"nsr": 2}) == Threshold(nsr=2)
    assert Threshold.of({"flow_t": 0.5}).to_nsr() == 1
    wrong: list[Any] = ["3", True, {"sigma": 1.0}, None]
    for value in wrong:
        with pytest.raises(ValueError, match="must be a noise-to-signal ratio or one of nsr, snr"):
            Threshold.of(value)


def test_a_timestep_beyond_the_chain_is_named() -> None:
    with pytest.raises(ValueError, match="below the chain's 1000 steps, got 1000"):
        Threshold(ddpm_timestep=1000).to_nsr()
