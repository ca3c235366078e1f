from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from lpl_lightning import DDPM, FlowMatching, Sampler
from lpl_lightning.conditioning import Condition
from lpl_lightning.noise import NoiseProcess
from lpl_lightning.sampling import initial_noise

MEAN, STD = 1.5, 0.4
NOTHING = Condition(class_labels=torch.zeros(4000, dtype=torch.long))


def exact_denoiser(process: NoiseProcess) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """The best prediction where every element of z0 is normal with MEAN and STD: in closed form."""

    def predict(z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (x.view(-1, 1, 1, 1).double() for x in process.alpha_sigma(t))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        z0 = MEAN + gain * (z_t.double() - alpha * MEAN)
        noise = (z_t.double() - alpha * z0) / sigma
        return {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * z0,
            "sample": z0,
            "flow": noise - z0,
        }[process.prediction_type].float()

    return predict


@pytest.mark.parametrize(
    "process", [DDPM("epsilon"), DDPM("v_prediction"), DDPM("sample"), FlowMatching()], ids=lambda p: p.prediction_type
)
def test_the_exact_denoiser_of_a_gaussian_gives_that_gaussian(process: NoiseProcess) -> None:
    # From the true distribution of the last step, which without zero terminal SNR is not quite standard normal.
    last = torch.tensor(1000.0 if process.prediction_type == "flow" else 999.0)
    alpha, sigma = process.alpha_sigma(last)
    z_start = alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * torch.randn(4000, 1, 2, 2)
    z0 = Sampler(num_steps=100, guidance_scale=1.0)(exact_denoiser(process), process, z_start, NOTHING)
    assert z0.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert z0.std().item() == pytest.approx(STD, rel=0.05)
    # Deterministic samplers of a Gaussian are monotone maps of the noise.
    correlation = torch.corrcoef(torch.stack([z0.flatten(), z_start.flatten()]))[0, 1]
    assert correlation > 0.999


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_any_diffusers_scheduler_serves(scheduler: Any) -> None:
    process = DDPM("epsilon")
    sampler = Sampler(num_steps=50, guidance_scale=1.0, scheduler=scheduler)
    for _ in range(2):  # the scheduler's own state must not leak from one call into the next
        z0 = sampler(exact_denoiser(process), process, torch.randn(4000, 1, 2, 2), NOTHING)
        assert z0.mean().item() == pytest.approx(MEAN, abs=0.05)
        assert z0.std().item() == pytest.approx(STD, rel=0.1)
    assert scheduler.num_inference_steps is None, "the scheduler that was given stays as it was"


def test_flow_takes_even_euler_steps() -> None:
    """By hand: z <- z - v / n at t = 1, 1 - 1/n, ..., 1/n."""
    process, z = FlowMatching(), torch.randn(3, 1, 2, 2)
    predict = exact_denoiser(process)
    by_hand, n = z.clone(), 7
    for i in range(n):
        by_hand = by_hand - predict(by_hand, torch.full((3,), 1000 * (1 - i / n)), NOTHING) / n
    torch.testing.assert_close(Sampler(n, 1.0)(predict, process, z, NOTHING), by_hand, atol=1e-4, rtol=1e-4)


def test_guidance_extrapolates_from_the_null_condition() -> None:
    process, z = FlowMatching(), torch.randn(2, 1, 2, 2)

    def predict(z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.class_labels is not None
        return condition.class_labels.float().view(-1, 1, 1, 1).expand_as(z_t)

    conditional = Condition(class_labels=torch.tensor([3, 5]))
    null = Condition(class_labels=torch.tensor([1, 1]))
    guided = Sampler(4, 2.0)(predict, process, z, conditional, null)
    # A constant velocity v moves z by -v over the unit of time; guided v = 1 + 2 (v - 1).
    torch.testing.assert_close(guided, z - torch.tensor([5.0, 9.0]).view(-1, 1, 1, 1), atol=1e-5, rtol=1e-5)
    plain = Sampler(4, 1.0)(predict, process, z, conditional, null)
    torch.testing.assert_close(plain, z - torch.tensor([3.0, 5.0]).view(-1, 1, 1, 1), atol=1e-5, rtol=1e-5)


def test_noise_belongs_to_its_seed() -> None:
    def noise_of(*seeds: int) -> Tensor:
        return initial_noise([torch.Generator().manual_seed(seed) for seed in seeds], (4, 2, 2))

    together = noise_of(5, 6, 7)
    torch.testing.assert_close(together[1:2], noise_of(6))
    assert not torch.equal(together[0], together[1])


def test_a_scheduler_of_another_prediction_is_refused() -> None:
    ddim = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"prediction_type='v_prediction', but .* DDPM trains 'epsilon'"):
        Sampler(scheduler=ddim).check(DDPM("epsilon"))
    with pytest.raises(ValueError, match="FlowMatching trains 'flow'"):
        Sampler(scheduler=ddim).check(FlowMatching())
    with pytest.raises(ValueError, match="prediction_type='flow'"):
        Sampler(scheduler=FlowMatching().sampling_scheduler()).check(DDPM())
    with pytest.raises(ValueError, match="beta_start=0.0001, but the noise process was trained with 0.00085"):
        Sampler(scheduler=ddim).check(DDPM("v_prediction"))
    Sampler(scheduler=DDPM("v_prediction").sampling_scheduler()).check(DDPM("v_prediction"))
    with pytest.raises(ValueError, match="`num_steps` must be"):
        Sampler(num_steps=0)
    with pytest.raises(ValueError, match="must be a diffusers scheduler"):
        Sampler(scheduler="ddim")
