from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import POOLED_DIM, TOKEN_DIM, denoiser
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KarrasVeScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from lpl_lightning import DDPM, FlowMatching, Sampler
from lpl_lightning.conditioning import Condition
from lpl_lightning.noise import EDM, NoiseProcess
from lpl_lightning.sampling import initial_noise

WEIGHTS, MEANS, STDS = torch.tensor([[0.3, 0.7], [-1.4, 0.6], [0.3, 0.2]], dtype=torch.float64)
"""A mixture of two normal distributions, of mean 0 and a standard deviation of about 1."""
NOTHING = Condition(class_labels=torch.zeros(4000, dtype=torch.long))
CHAIN: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def exact_denoiser(process: NoiseProcess) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """The best prediction where elements of z0 are independent draws of the mixture: in closed form."""

    def predict(z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (x.view(-1, 1, 1, 1, 1).double() for x in process.alpha_sigma(t))
        z = z_t.double().unsqueeze(-1)
        variance = (alpha * STDS) ** 2 + sigma**2
        responsible = (WEIGHTS.log() - variance.log() / 2 - (z - alpha * MEANS) ** 2 / (2 * variance)).softmax(dim=-1)
        z0 = (responsible * (MEANS + alpha * STDS**2 / variance * (z - alpha * MEANS))).sum(dim=-1)
        alpha, sigma, z = alpha.squeeze(-1), sigma.squeeze(-1), z.squeeze(-1)
        noise = (z - alpha * z0) / sigma
        found = {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * z0,
            "sample": z0,
            "flow": noise - z0,
            "edm": sigma * z0 - alpha * noise,
        }
        prediction: Tensor = found[process.prediction_type]
        return prediction.float()

    return predict


def distance_from_the_mixture(z0: Tensor) -> float:
    """Kolmogorov and Smirnov's; 0.013 is its 1% point for 16,000 draws."""
    values = z0.double().flatten().sort().values
    cdf = (WEIGHTS * torch.special.ndtr((values[:, None] - MEANS) / STDS)).sum(dim=1)
    n = len(values)
    return float((cdf - (torch.arange(n) + 0.5) / n).abs().max())


SAMPLED: dict[str, tuple[NoiseProcess, Any]] = {
    "epsilon": (DDPM("epsilon"), None),
    "v": (DDPM("v_prediction"), None),
    "sample": (DDPM("sample"), None),
    "flow": (FlowMatching(), None),
    "flow shifted": (FlowMatching(shift=2.0), None),
    "edm": (EDM(), None),
    "epsilon, ancestral": (DDPM("epsilon"), DDPMScheduler(**CHAIN, clip_sample=False, timestep_spacing="trailing")),
    "epsilon, Euler": (DDPM("epsilon"), EulerDiscreteScheduler(**CHAIN)),
    "epsilon, Euler ancestral": (DDPM("epsilon"), EulerAncestralDiscreteScheduler(**CHAIN)),
    "epsilon, Heun": (DDPM("epsilon"), HeunDiscreteScheduler(**CHAIN)),
    "epsilon, DPM++ 2M": (DDPM("epsilon"), DPMSolverMultistepScheduler(**CHAIN)),
    "epsilon, UniPC": (DDPM("epsilon"), UniPCMultistepScheduler(**CHAIN)),
    "v, Euler": (
        DDPM("v_prediction"),
        EulerDiscreteScheduler(
            **CHAIN, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    ),
    "flow, Heun": (FlowMatching(), FlowMatchHeunDiscreteScheduler()),
    "flow, UniPC": (
        FlowMatching(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ),
    "edm, DPM++ 2M": (EDM(), EDMDPMSolverMultistepScheduler(sigma_data=1.0)),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_the_exact_denoiser_of_a_mixture_gives_that_mixture(name: str) -> None:
    process, scheduler = SAMPLED[name]
    # Those that add noise on the way are of first order in the step.
    sampler = Sampler(num_steps=200 if "ancestral" in name else 100, guidance_scale=1.0, scheduler=scheduler)
    timesteps = None if scheduler is None else scheduler.timesteps.tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in range(500)]
    for _ in range(2):  # the scheduler's own state must not leak from one call into the next
        z_start = torch.randn(500, 1, 4, 8)
        z0 = sampler(exact_denoiser(process), process, z_start, NOTHING, generators=generators)
        found = distance_from_the_mixture(z0)
        assert found < 0.03
    if scheduler is None:  # deterministic samplers of independent numbers are monotone maps of the noise
        ranks = [x.flatten().argsort().argsort().double() for x in (z0, z_start)]
        assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.999
    else:
        assert scheduler.timesteps.tolist() == timesteps, "the one that was given stays as it was"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_takes_even_euler_steps(shift: float) -> None:
    """By hand: z <- z - v (t - t') at t = 1, 1 - 1/n, ..., 1/n, 0, or what they are shifted to."""
    process, z = FlowMatching(shift=shift), torch.randn(3, 1, 2, 2)
    predict = exact_denoiser(process)
    by_hand, n = z.clone(), 7
    times = [shift * t / (1 + (shift - 1) * t) for t in (1 - i / n for i in range(n + 1))]
    for t, following in itertools.pairwise(times):
        by_hand = by_hand - predict(by_hand, torch.full((3,), 1000 * t), NOTHING) * (t - following)
    torch.testing.assert_close(Sampler(n, 1.0)(predict, process, z, NOTHING), by_hand, atol=1e-4, rtol=1e-4)


DDIM: dict[str, Any] = {
    "default": None,
    "linspace": DDIMScheduler(**CHAIN, clip_sample=False, timestep_spacing="linspace"),
    "leading": DDIMScheduler(**CHAIN, clip_sample=False, steps_offset=1),
    "parallel": DDIMParallelScheduler(**CHAIN, clip_sample=False, timestep_spacing="trailing"),
    "CogVideoX": CogVideoXDDIMScheduler(
        **CHAIN, clip_sample=False, snr_shift_scale=1.0, timestep_spacing="trailing", rescale_betas_zero_snr=False
    ),
}


@pytest.mark.parametrize("n", [1, 28, 35, 60, 61, 150, 400, 600])
@pytest.mark.parametrize("name", DDIM)
def test_ddim_steps_from_each_timestep_to_the_next(name: str, n: int) -> None:
    """By hand: the clean estimate with the noise estimate at the level of the next timestep, and in the end without."""
    process, scheduler, z = DDPM("epsilon"), DDIM[name], torch.randn(3, 1, 4, 4)
    predict = exact_denoiser(process)
    found = Sampler(n, 1.0, scheduler)(predict, process, z, NOTHING)
    timesteps = {
        "linspace": torch.linspace(999, 0, n, dtype=torch.float64).round() if n > 1 else torch.zeros(1),
        "leading": torch.arange(n - 1, -1, -1) * (1000 // n) + 1,
    }.get(name, (1000 * (1 - torch.arange(n, dtype=torch.float64) / n)).round() - 1)
    by_hand = z.double()
    levels = [tuple(x.double().item() for x in process.alpha_sigma(t)) for t in timesteps.long()]
    for t, (alpha, sigma), (next_alpha, next_sigma) in zip(timesteps, levels, [*levels[1:], (1.0, 0.0)], strict=True):
        noise = predict(by_hand, t.float().expand(3), NOTHING).double()
        by_hand = next_alpha * (by_hand - sigma * noise) / alpha + next_sigma * noise
    torch.testing.assert_close(found, by_hand.float(), atol=2e-3, rtol=2e-3)
    if scheduler is not None:
        assert scheduler.num_inference_steps is None, "the one that was given stays as it was"


@pytest.mark.parametrize("n", [28, 35, 60, 150, 400])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_is_euler_at_any_number_of_steps(prediction_type: Any, n: int) -> None:
    process = DDPM(prediction_type)
    euler = EulerDiscreteScheduler(**process.schedule, timestep_spacing="trailing")
    z = torch.randn(500, 1, 4, 8)
    found, other = (
        Sampler(n, 1.0, scheduler)(exact_denoiser(process), process, z, NOTHING) for scheduler in (None, euler)
    )
    assert (found - other).abs().mean() < 2e-3
    if n >= 150:
        assert distance_from_the_mixture(found) < 0.03


@pytest.mark.parametrize("n", [10, 20, 50, 100, 250])
def test_ddim_of_a_number_of_steps_that_divides_the_chain_is_that_of_diffusers(n: int) -> None:
    """Bit for bit."""
    process, z = DDPM("v_prediction"), torch.randn(3, 1, 2, 2)
    predict, scheduler, expected = exact_denoiser(process), process.sampling_scheduler(), z
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps:
        expected = scheduler.step(predict(expected, t.float().expand(3), NOTHING), t, expected).prev_sample
    assert torch.equal(Sampler(n, 1.0)(predict, process, z, NOTHING), expected)


class Stochastic(DDIMScheduler):  # type: ignore[misc]
    """DDIM that adds as much noise on the way as the chain does."""

    def step(self, *args: Any, generator: Any = None) -> Any:
        return super().step(*args, eta=1.0, generator=generator)


@pytest.mark.parametrize("n", [50, 60, 61])
def test_ddim_with_noise_on_the_way_is_the_chain_at_any_number_of_steps(n: int) -> None:
    process, z = DDPM("epsilon"), torch.randn(3, 1, 2, 2)
    options: dict[str, Any] = CHAIN | {"clip_sample": False, "timestep_spacing": "trailing"}
    found, expected = (
        Sampler(n, 1.0, scheduler)(
            exact_denoiser(process),
            process,
            z,
            NOTHING,
            generators=[torch.Generator().manual_seed(seed) for seed in range(3)],
        )
        for scheduler in (Stochastic(**options), DDPMScheduler(**options))
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.abs().max() < 3


@pytest.mark.parametrize(
    ("spacing", "n", "taken"),
    [
        ("leading", 28, True),
        ("leading", 1500, False),
        ("trailing", 50, True),
        ("trailing", 28, False),
        ("trailing", 61, False),
        ("linspace", 50, False),
    ],
)
def test_pndm_is_taken_where_its_timesteps_are_a_stride_apart(spacing: str, n: int, taken: bool) -> None:
    scheduler = PNDMScheduler(**CHAIN, timestep_spacing=spacing, skip_prk_steps=True)
    scheduler.set_timesteps(n)
    timesteps = scheduler.timesteps.unique()
    assert taken == (len(timesteps) == n and set(timesteps.diff().tolist()) == {1000 // n})
    sampler = Sampler(n, scheduler=PNDMScheduler(**CHAIN, timestep_spacing=spacing))
    if taken:
        sampler.check(DDPM())
    else:
        with pytest.raises(ValueError, match=f"PNDMScheduler does not step from each of its .*num_steps={n} and"):
            sampler.check(DDPM())


def test_a_scheduler_that_steps_by_one_wherever_its_next_timestep_is_is_refused() -> None:
    scheduler, process = UnCLIPScheduler(clip_sample=False), DDPM(beta_schedule="squaredcos_cap_v2")
    Sampler(1000, scheduler=scheduler).check(process)
    with pytest.raises(ValueError, match="UnCLIPScheduler does not step from each of its timesteps to the next"):
        Sampler(50, scheduler=scheduler).check(process)


@pytest.mark.parametrize(
    ("process", "scheduler", "n", "said"),
    [
        (
            DDPM(),
            DDIMScheduler(**CHAIN, clip_sample=False, steps_offset=1),
            1000,
            r"with num_steps=1000 has timesteps from 1000 to 1, and those of the chain are 999 to 0: give fewer steps",
        ),
        (DDPM(), LCMScheduler(**CHAIN, clip_sample=False), 100, r"with num_steps=100 cannot be set up .*give fewer"),
        (
            DDPM(),
            CogVideoXDPMScheduler(**CHAIN, clip_sample=False, rescale_betas_zero_snr=False),
            50,
            r"cannot be called as `step\(prediction, timestep, z\)`, whatever num_steps is: take another",
        ),
        (
            DDPM(),
            DPMSolverMultistepScheduler(**CHAIN, timestep_spacing="leading"),
            1000,
            r"with num_steps=1000 cannot sample \(IndexError.*give fewer steps",
        ),
        (
            FlowMatching(),
            DDIMScheduler(clip_sample=False, prediction_type="flow_prediction"),
            10,
            r"with num_steps=10 cannot sample \(ValueError\('prediction_type given as.*leave `scheduler` out",
        ),
    ],
    ids=["DDIM", "LCM", "CogVideoX", "DPM++ 2M", "DDIM of a flow"],
)
def test_steps_that_would_fail_are_refused_beforehand(process: NoiseProcess, scheduler: Any, n: int, said: str) -> None:
    """What is refused is what fails in a plain loop over the scheduler."""
    with pytest.raises(ValueError, match=f"The scheduler {type(scheduler).__name__} {said}"):
        Sampler(n, scheduler=scheduler).check(process)

    def sample(z: Tensor) -> None:
        scheduler.set_timesteps(n)
        for t in scheduler.timesteps:
            z = scheduler.step(z, t, z).prev_sample

    with pytest.raises((IndexError, TypeError, ValueError)):
        sample(torch.zeros(1, 4, 2, 2))


def test_a_timestep_before_the_first_of_the_chain_is_refused() -> None:
    scheduler = EulerDiscreteScheduler(**CHAIN, timestep_spacing="trailing")
    for n, least in ((60, 16), (61, -1)):
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.min() == least
    Sampler(60, scheduler=scheduler).check(DDPM())
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler with num_steps=61 has timesteps from 999 to -1"):
        Sampler(61, scheduler=scheduler).check(DDPM())


FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")
@pytest.mark.parametrize(
    ("process", "scheduler", "n", "said"),
    [
        (DDPM(), UniPCMultistepScheduler(**CHAIN, solver_type="bh1"), 50, "NaN or infinity"),
        (DDPM(), UniPCMultistepScheduler(**CHAIN, predict_x0=False), 20, "NaN or infinity"),
        (FlowMatching(), DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True), 20, "NaN or infinity"),
        (DDPM(), EulerDiscreteScheduler(**CHAIN, interpolation_type="log_linear"), 50, "an error of 0"),
        (FlowMatching(shift=3.0), DEISMultistepScheduler(**FLOW, flow_shift=3.0), 10, "an error of 0"),
        (DDPM(), DDIMScheduler(**CHAIN, clip_sample=False, set_alpha_to_one=False, steps_offset=1), 1, "an error of 0"),
    ],
    ids=["UniPC bh1", "UniPC of noise", "DPM++ 2M Karras of a flow", "Euler log_linear", "DEIS of a flow", "DDIM"],
)
def test_what_samples_something_else_than_the_model_is_refused(
    process: NoiseProcess, scheduler: Any, n: int, said: str
) -> None:
    """By the mixture's exact denoiser such a scheduler gives another distribution than the mixture."""
    with pytest.raises(
        ValueError, match=f"The scheduler {type(scheduler).__name__} with num_steps={n} samples.*{said}"
    ):
        Sampler(n, scheduler=scheduler).check(process)
    z = initial_noise([torch.Generator().manual_seed(seed) for seed in range(4)], (1, 32, 32))
    found = Sampler(n, 1.0, scheduler=scheduler)(exact_denoiser(process), process, z, NOTHING)
    assert not distance_from_the_mixture(found) < 0.05  # nor is NaN


def test_what_leaves_a_little_noise_is_warned_of() -> None:
    scheduler = DEISMultistepScheduler(**FLOW)
    with pytest.warns(UserWarning, match="DEISMultistepScheduler with num_steps=20 samples with an error of 0.0"):
        Sampler(20, scheduler=scheduler).check(FlowMatching())
    scheduler.set_timesteps(20)
    assert scheduler.sigmas[-1] == pytest.approx(0.05, rel=0.01)
    Sampler(50, scheduler=scheduler).check(FlowMatching())  # no warning, which tests take for an error


@pytest.mark.parametrize("n", [2, 50, 333, 501, 999])
def test_ddim_as_stable_diffusion_has_it_is_taken_at_all_numbers_of_steps_below_the_chain_s(n: int) -> None:
    scheduler, random = DDIMScheduler(**CHAIN, clip_sample=False, set_alpha_to_one=False, steps_offset=1), torch.random
    state = random.get_rng_state()
    Sampler(n, scheduler=scheduler).check(DDPM())
    assert torch.equal(random.get_rng_state(), state)
    assert scheduler.num_inference_steps is None, "the one that was given stays as it was"


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


def test_guidance_is_used_inside_its_interval_alone() -> None:
    """At t = 3/4 and 1/2 of a flow, whose ratios are 3 and 1; null predictions are asked for there alone."""
    process, z = FlowMatching(), torch.randn(2, 1, 2, 2)
    sizes: list[int] = []

    def predict(z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.class_labels is not None
        assert len(condition.class_labels) == len(z_t) == len(t)
        sizes.append(len(z_t))
        return condition.class_labels.float().view(-1, 1, 1, 1).expand_as(z_t)

    conditional, null = Condition(class_labels=torch.tensor([3, 5])), Condition(class_labels=torch.tensor([1, 1]))
    found = Sampler(4, 2.0, guidance_interval=(0.9, 3.1))(predict, process, z, conditional, null)
    assert sizes == [2, 4, 4, 2]
    velocity = torch.tensor([(3.0 + 5 + 5 + 3) / 4, (5.0 + 9 + 9 + 5) / 4]).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, z - velocity, atol=1e-5, rtol=1e-5)
    for interval in ((3.0, 1.0), (-1.0, 2.0)):
        with pytest.raises(ValueError, match="`guidance_interval` must be the least and the largest"):
            Sampler(guidance_interval=interval)


def test_noise_belongs_to_its_seed() -> None:
    def noise_of(*seeds: int) -> Tensor:
        return initial_noise([torch.Generator().manual_seed(seed) for seed in seeds], (4, 2, 2))

    together = noise_of(5, 6, 7)
    torch.testing.assert_close(together[1:2], noise_of(6))
    assert not torch.equal(together[0], together[1])
    torch.set_default_dtype(torch.float64)  # as a trainer's 64-true has it
    try:
        assert torch.equal(noise_of(5, 6, 7), together)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_scheduler_of_another_prediction_is_refused() -> None:
    for silent in (IPNDMScheduler(), KarrasVeScheduler()):
        for process in (FlowMatching(), DDPM()):
            with pytest.raises(ValueError, match="does not say what the denoiser predicts"):
                Sampler(scheduler=silent).check(process)
    ddim = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"prediction_type='v_prediction', but .* DDPM trains 'epsilon'"):
        Sampler(scheduler=ddim).check(DDPM("epsilon"))
    with pytest.raises(ValueError, match="FlowMatching trains 'flow'"):
        Sampler(scheduler=ddim).check(FlowMatching())
    with pytest.raises(ValueError, match="prediction_type='flow'"):
        Sampler(scheduler=FlowMatching().sampling_scheduler()).check(DDPM())
    with pytest.raises(ValueError, match="beta_start=0.0001, but the noise process was trained with 0.00085"):
        Sampler(scheduler=ddim).check(DDPM("v_prediction"))
    with pytest.raises(ValueError, match="prediction_type='edm', but the noise process DDPM trains 'epsilon'"):
        Sampler(scheduler=EDMEulerScheduler()).check(DDPM())
    with pytest.raises(ValueError, match=r"sigma_data=0.5, but the noise process was trained with 1.0"):
        Sampler(scheduler=EDMEulerScheduler()).check(EDM())
    Sampler(scheduler=DDPM("v_prediction").sampling_scheduler()).check(DDPM("v_prediction"))
    with pytest.raises(ValueError, match="`num_steps` must be"):
        Sampler(num_steps=0)
    with pytest.raises(ValueError, match="must be a diffusers scheduler"):
        Sampler(scheduler="ddim")


@pytest.mark.parametrize("family", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_a_scheduler_that_reads_edm_with_another_sign_is_refused(family: Any) -> None:
    """What is refused is what does not find the clean latent in what EDM trains."""
    process, z0 = EDM(), torch.randn(2, 1, 4, 4)
    noisy = process.sample(z0)
    level = noisy.noise_to_signal.view(-1, 1, 1, 1)
    for kind, right in (("epsilon", True), ("v_prediction", False)):
        scheduler = family(sigma_data=1.0, prediction_type=kind)
        read = scheduler.precondition_outputs(noisy.z_t / noisy.alpha, process.target(noisy), level)
        assert torch.allclose(read, z0, atol=1e-4) == right
        if right:
            Sampler(scheduler=scheduler).check(process)
        else:
            with pytest.raises(ValueError, match=f"{family.__name__} with prediction_type='v_prediction' reads what"):
                Sampler(scheduler=scheduler).check(process)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("process", "scheduler"),
    [
        (EDM(), EDMDPMSolverMultistepScheduler(sigma_data=1.0)),
        (FlowMatching(), UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")),
        (DDPM(), TCDScheduler(**CHAIN, clip_sample=False)),
    ],
)
def test_samples_do_not_depend_on_the_default_precision(
    process: NoiseProcess, scheduler: Any, dtype: torch.dtype
) -> None:
    """Which a trainer's bf16-true and 64-true change."""
    sampler, noise = Sampler(num_steps=5, guidance_scale=1.0, scheduler=scheduler), torch.randn(4000, 1, 1, 1)

    def sample() -> Tensor:
        sampler.check(process)
        generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
        return sampler(exact_denoiser(process), process, noise, NOTHING, generators=generators)

    expected = sample()
    torch.set_default_dtype(dtype)
    try:
        found = sample()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_what_has_a_standard_deviation_of_the_data_and_is_not_edm_is_refused() -> None:
    with pytest.raises(ValueError, match="CMStochasticIterativeScheduler with prediction_type=None reads what"):
        Sampler(scheduler=CMStochasticIterativeScheduler(sigma_data=1.0)).check(EDM())

    class Cosine(EDMEulerScheduler):  # type: ignore[misc]
        """With the times of CosineDPMSolverMultistepScheduler, which needs a package that we do without."""

        def precondition_noise(self, sigma: Tensor) -> Tensor:
            return sigma.atan() / torch.pi * 2

    with pytest.raises(ValueError, match=r"Cosine with prediction_type='epsilon' .* or gives it other times"):
        Sampler(scheduler=Cosine(sigma_data=1.0)).check(EDM())


@pytest.mark.parametrize(
    ("process", "scheduler"),
    [
        (DDPM(), DDIMInverseScheduler(**CHAIN, clip_sample=False)),
        (DDPM(), DPMSolverMultistepInverseScheduler(**CHAIN)),
        (FlowMatching(), FlowMatchEulerDiscreteScheduler(invert_sigmas=True)),
        (FlowMatching(), FlowMatchLCMScheduler(invert_sigmas=True)),
    ],
    ids=lambda given: type(given).__name__,
)
def test_a_scheduler_that_goes_to_noise_is_refused(process: NoiseProcess, scheduler: Any) -> None:
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__} goes from clean latents to noise"):
        Sampler(scheduler=scheduler).check(process)
    scheduler.set_timesteps(10)
    _, sigma = process.alpha_sigma(scheduler.timesteps)
    assert sigma[0] < sigma[-1]


@pytest.mark.parametrize("family", [HeunDiscreteScheduler, PNDMScheduler, LMSDiscreteScheduler, DEISMultistepScheduler])
def test_a_scheduler_that_cannot_end_in_pure_noise_samples_no_chain_that_does(family: Any) -> None:
    """What is refused is what leaves some signal at its last step."""
    scheduler = family(**CHAIN, prediction_type="v_prediction")
    ends_in_noise, ends_with_signal = DDPM("v_prediction"), DDPM("v_prediction", rescale_betas_zero_snr=False)
    last = torch.tensor([999.0])
    assert scheduler.alphas_cumprod[-1].sqrt() == pytest.approx(ends_with_signal.alpha_sigma(last)[0].item(), rel=1e-4)
    assert ends_in_noise.alpha_sigma(last)[0] == 0
    with pytest.raises(ValueError, match=f"{family.__name__} knows no rescale_betas_zero_snr, .*trained with True"):
        Sampler(scheduler=scheduler).check(ends_in_noise)
    Sampler(scheduler=scheduler).check(ends_with_signal)


def test_a_schedule_given_beta_by_beta_must_be_the_one_trained_with() -> None:
    betas = (torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).tolist()
    for process in (DDPM("sample"), DDPM("v_prediction")):
        options = {
            "prediction_type": process.prediction_type,
            "rescale_betas_zero_snr": process.schedule["rescale_betas_zero_snr"],
            "clip_sample": False,
        }
        Sampler(scheduler=DDIMScheduler(trained_betas=betas, **options)).check(process)
        for others in (betas[::2], [2 * beta for beta in betas]):
            with pytest.raises(ValueError, match="DDIMScheduler has `trained_betas` that are not those"):
                Sampler(scheduler=DDIMScheduler(**CHAIN, trained_betas=others, **options)).check(process)


def test_a_scheduler_that_shifts_the_noise_levels_is_refused() -> None:
    _, sigma = DDPM("epsilon").alpha_sigma(torch.arange(1000.0))
    for shift, same in ((1.0, True), (3.0, False)):
        scheduler = CogVideoXDDIMScheduler(**CHAIN, clip_sample=False, snr_shift_scale=shift)
        assert torch.allclose((1 - scheduler.alphas_cumprod).sqrt().float(), sigma, atol=1e-4) == same
        if same:
            Sampler(scheduler=scheduler).check(DDPM("epsilon"))
        else:
            with pytest.raises(ValueError, match=r"CogVideoXDDIMScheduler has snr_shift_scale=3.0, .*set it to 1.0"):
                Sampler(scheduler=scheduler).check(DDPM("epsilon"))


@pytest.mark.parametrize("family", [UniPCMultistepScheduler, DPMSolverMultistepScheduler, DEISMultistepScheduler])
def test_a_scheduler_that_follows_a_flow_in_part_only_is_refused(family: Any) -> None:
    """By its noise levels and not by what it takes the prediction for, or the other way round."""
    for options in ({"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}):
        sampler = Sampler(scheduler=family(**options))
        for process in (FlowMatching(), DDPM("epsilon")):
            with pytest.raises(ValueError, match="set prediction_type='flow_prediction' and use_flow_sigmas=True"):
                sampler.check(process)
    both = Sampler(scheduler=family(prediction_type="flow_prediction", use_flow_sigmas=True))
    both.check(FlowMatching())
    with pytest.raises(ValueError, match=r"prediction_type='flow_prediction', but .* DDPM trains 'epsilon'"):
        both.check(DDPM("epsilon"))


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        (DDIMScheduler, {}, "DDIMScheduler has clip_sample=True"),
        (DDPMScheduler, {}, "DDPMScheduler has clip_sample=True"),
        (DDPMScheduler, {"clip_sample": False, "thresholding": True}, "DDPMScheduler has thresholding=True"),
        (DPMSolverMultistepScheduler, {"thresholding": True}, "DPMSolverMultistepScheduler has thresholding=True"),
    ],
    ids=["ddim", "ddpm", "ddpm thresholding", "dpm thresholding"],
)
def test_a_scheduler_that_confines_latents_to_the_range_of_pixels_is_refused(
    family: Any, options: dict[str, Any], said: str
) -> None:
    """What is refused by its settings is what loses large latents in the scheduler's own last step."""
    z0 = torch.tensor([0.5, 3.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4).clone()
    plain = {name: False for name in ("clip_sample", "thresholding") if name in family().config}
    kept = []
    for settings in (options, plain):
        scheduler = family(**CHAIN, prediction_type="sample", **settings)
        scheduler.set_timesteps(1)
        last = scheduler.step(z0, scheduler.timesteps[0], z0, generator=torch.Generator().manual_seed(0))
        kept.append(torch.allclose(getattr(last, "pred_original_sample", last.prev_sample), z0))
    assert kept == [False, True]
    with pytest.raises(ValueError, match=f"{said}, .*Set `clip_sample` and `thresholding` to False"):
        Sampler(scheduler=family(**CHAIN, prediction_type="sample", **options)).check(DDPM("sample"))
    Sampler(scheduler=family(**CHAIN, prediction_type="sample", **plain)).check(DDPM("sample"))


def test_a_scheduler_that_asks_for_a_shift_of_each_size_is_refused() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="`mu` must be passed"):
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"has use_dynamic_shifting=True.*Set it to False, with a fixed shift"):
        Sampler(scheduler=scheduler).check(FlowMatching())
    Sampler(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)).check(FlowMatching(shift=3.0))


@pytest.mark.parametrize("around", [False, True], ids=["alone", "inside_autocast"])
def test_the_denoiser_alone_runs_in_a_lower_precision(around: bool) -> None:
    model, process = denoiser("SD3"), FlowMatching()
    seen: set[torch.dtype] = set()
    model.backbone.proj_out.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    z_start = initial_noise([torch.Generator().manual_seed(i) for i in range(2)], (4, 8, 8))
    conditions = (
        Condition(tokens=torch.randn(2, 3, TOKEN_DIM), pooled=torch.randn(2, POOLED_DIM)),
        Condition(tokens=torch.zeros(2, 3, TOKEN_DIM), pooled=torch.zeros(2, POOLED_DIM)),
    )
    found = {}
    for precision in ("float32", "bfloat16"):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            found[precision] = Sampler(num_steps=4, precision=precision)(model, process, z_start, *conditions)
        assert seen == {getattr(torch, precision)}
        assert found[precision].dtype == torch.float32
    exact = Sampler(num_steps=4)(model, process, z_start, *conditions)
    torch.testing.assert_close(found["float32"], exact)
    error = (found["bfloat16"] - exact).abs().max()
    assert 0 < error < 0.05
    with pytest.raises(ValueError, match="`precision` must be"):
        Sampler(precision="half")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_compiled_backbone_samples_the_same() -> None:
    z_start = initial_noise([torch.Generator().manual_seed(i) for i in range(2)], (4, 8, 8))
    condition = Condition(tokens=torch.randn(2, 3, TOKEN_DIM), pooled=torch.randn(2, POOLED_DIM))
    plain, compiled = (
        Sampler(num_steps=3)(denoiser("SD3", compile=compile), FlowMatching(), z_start, condition)
        for compile in (False, True)
    )
    torch.testing.assert_close(plain, compiled, atol=1e-4, rtol=1e-4)
