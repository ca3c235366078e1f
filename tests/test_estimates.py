"""Clean latents by diffusers' schedulers, against what their own sampling steps say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_kl
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_snr
from torch import Tensor

from lpl_lightning import DDPM, Autoencoder, LatentPerceptualLoss, estimate_z0

SHAPE = (3, 4, 5, 5)


def one_step(scheduler: Any, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """The clean latents that the scheduler's own sampling step goes by, a sample at a time."""
    found = []
    for p, z, time in zip(prediction, z_t, t, strict=True):
        scheduler._step_index = None
        found.append(scheduler.step(p[None], time, z[None]).pred_original_sample)
    return torch.cat(found)


@pytest.mark.filterwarnings("ignore:The `scale_model_input` function should be called")
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("family", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, EDMEulerScheduler])
def test_the_schedulers_own_step_has_the_same_estimate(family: Any, kind: str) -> None:
    if family in (EulerDiscreteScheduler, EDMEulerScheduler) and kind == "sample":
        return  # which these cannot sample by
    scheduler = family(prediction_type=kind)
    if family is not EDMEulerScheduler:
        scheduler = family(prediction_type=kind, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    if "clip_sample" in scheduler.config:
        scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(1000)
    t = scheduler.timesteps[[100, 600, 990]]
    z0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    z_t, prediction = scheduler.add_noise(z0, noise, t), torch.randn(SHAPE)
    estimate, noise_to_signal = estimate_z0(scheduler, prediction, z_t, t)
    torch.testing.assert_close(estimate, one_step(scheduler, prediction, z_t, t), rtol=1e-4, atol=1e-4)
    # The ratio is that of what was added: of z_t less the noise's share, nothing but alpha z0 is left.
    share = torch.linalg.vector_norm(z_t.flatten(1), dim=1) / torch.linalg.vector_norm(
        (z0 + noise_to_signal.view(-1, 1, 1, 1) * noise).flatten(1), dim=1
    )
    alpha = share.view(-1, 1, 1, 1)
    torch.testing.assert_close(z_t, alpha * (z0 + noise_to_signal.view(-1, 1, 1, 1) * noise), rtol=1e-4, atol=1e-4)


def test_the_ratio_is_that_of_diffusers_snr_and_of_our_chain() -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.tensor([0, 200, 999])
    prediction, z_t = torch.randn(SHAPE), torch.randn(SHAPE)
    estimate, noise_to_signal = estimate_z0(scheduler, prediction, z_t, t)
    torch.testing.assert_close(noise_to_signal**-2, compute_snr(scheduler, t), rtol=1e-4, atol=1e-8)
    ours = DDPM()
    noisy = ours.noised(torch.zeros(SHAPE), prediction, t.float())
    torch.testing.assert_close(noise_to_signal, noisy.noise_to_signal)
    z_t = noisy.z_t + noisy.alpha * torch.randn(SHAPE)
    estimate, _ = estimate_z0(scheduler, prediction, z_t, t)
    torch.testing.assert_close(estimate, (z_t - noisy.z_t) / noisy.alpha, rtol=1e-3, atol=1e-3)


def test_flows_noised_as_their_training_scripts_do() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    z0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    index = torch.tensor([10, 500, 990])
    t, sigma = scheduler.timesteps[index], scheduler.sigmas[index]
    z_t = scheduler.scale_noise(z0, t, noise)
    estimate, noise_to_signal = estimate_z0(scheduler, noise - z0, z_t, t)
    torch.testing.assert_close(estimate, z0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noise_to_signal, sigma / (1 - sigma), rtol=1e-4, atol=0.0)


def test_a_scheduler_that_says_flow_prediction() -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(1000)
    t = scheduler.timesteps[[100, 500, 900]]
    z0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    estimate, _ = estimate_z0(scheduler, noise - z0, scheduler.add_noise(z0, noise, t), t)
    torch.testing.assert_close(estimate, z0, rtol=1e-3, atol=1e-3)


def test_it_is_computed_in_float32_and_has_the_gradient_of_the_formula() -> None:
    scheduler, t = DDPMScheduler(), torch.tensor([0, 500, 999])
    prediction = torch.randn(SHAPE, dtype=torch.bfloat16, requires_grad=True)
    z_t = torch.randn(SHAPE, dtype=torch.bfloat16)
    estimate, noise_to_signal = estimate_z0(scheduler, prediction, z_t, t)
    exact, _ = estimate_z0(scheduler, prediction.detach().double(), z_t.double(), t)
    assert estimate.dtype == noise_to_signal.dtype == torch.float32
    assert exact.dtype == torch.float64
    torch.testing.assert_close(estimate.double(), exact, rtol=1e-4, atol=1e-3)
    of_itself, _ = estimate_z0(DDPMScheduler(prediction_type="sample"), prediction, z_t, t)
    assert of_itself.dtype == torch.float32
    estimate.sum().backward()
    assert prediction.grad is not None
    torch.testing.assert_close(prediction.grad[:, 0, 0, 0].float(), -noise_to_signal, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_a_true_half_or_double_changes_nothing(default: torch.dtype) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    prediction, z_t, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([3, 199, 999])
    expected = estimate_z0(scheduler, prediction, z_t, t)
    torch.set_default_dtype(default)
    try:
        found = estimate_z0(scheduler, prediction, z_t, t)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_noise_predicted_of_no_signal_at_all_trains_nothing() -> None:
    """With a terminal SNR of zero alpha is 0 there, and dividing by it would make all gradients not a number."""
    scheduler = DDPMScheduler(prediction_type="epsilon", rescale_betas_zero_snr=True)
    z_t, t = torch.randn(SHAPE), torch.tensor([10, 999, 500])
    prediction = torch.randn(SHAPE, requires_grad=True)
    z0_hat, noise_to_signal = estimate_z0(scheduler, prediction, z_t, t)
    assert noise_to_signal[1] == float("inf")
    assert z0_hat[1].isinf().all()
    lpl = LatentPerceptualLoss(Autoencoder(tiny_kl()), threshold=3.0, reference_side=0)
    losses = lpl(z0_hat, torch.randn(SHAPE), noise_to_signal)
    assert losses[1] == 0
    losses.mean().backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    assert prediction.grad[0].any()
    assert not prediction.grad[1].any()


def test_what_it_cannot_read_is_named() -> None:
    scheduler, z, t = DDPMScheduler(), torch.randn(SHAPE), torch.tensor([1, 2, 3])
    twice = torch.randn(3, 8, 5, 5)
    odd = DDPMScheduler()
    odd.register_to_config(prediction_type="score")
    calls: list[tuple[tuple[Any, ...], str]] = [
        ((scheduler, twice, z, t), r"got \(3, 8, 5, 5\) and \(3, 4, 5, 5\).*prediction.chunk\(2, dim=1\)\[0\]"),
        ((scheduler, z, z, t[:1]), r"one timestep for each of the 3 samples, got shape \(1,\)"),
        ((IPNDMScheduler(), z, z, t), "one of diffusers with add_noise or scale_noise, got IPNDMScheduler"),
        ((odd, z, z, t), "prediction_type 'score'; known are 'epsilon'"),
        ((DDPMWuerstchenScheduler(), z, z, t / 10), "prediction_type None; known are 'epsilon'"),
    ]
    for arguments, message in calls:
        with pytest.raises(ValueError, match=message):
            estimate_z0(*arguments)
