"""From noise to a clean latent, over diffusers' schedulers, with classifier-free guidance (Ho & Salimans, 2021)."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lpl_lightning.arguments import at_least
from lpl_lightning.conditioning import Condition
from lpl_lightning.noise import NoiseProcess
from lpl_lightning.schedulers import check_scheduler, knowing_ones

__all__ = ["Sampler", "initial_noise"]

MUCH_LEFT, TOO_MUCH_LEFT = 0.05, 0.2
"""Root mean squares of an error, warned of and refused. What Stable Diffusion's chain leaves of unit noise is 0.029."""

_BY_STRIDE = (DDIMScheduler, DDIMParallelScheduler, CogVideoXDDIMScheduler)
"""Schedulers that go on by ``num_train_timesteps // num_inference_steps``, wherever their next timestep is."""


def initial_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Draw each sample's noise from its own generator, so that a sample does not depend on its batch.

    Args:
        generators: B generators on the CPU.
        shape: (C, h, w).

    Returns:
        (B, C, h, w) float32, on the CPU.
    """
    return torch.stack([torch.randn(*shape, generator=generator, dtype=torch.float32) for generator in generators])


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Schedulers make numbers of PyTorch's default dtype, which a trainer's ``64-true`` and ``bf16-true`` change."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Sampler:
    """Samples latents with a diffusers scheduler.

    Args:
        num_steps: Number of sampling steps. DDIM takes any; in diffusers' own pipelines one that does not divide
            ``num_train_timesteps`` leaves noise behind, and nearly any with ``timestep_spacing`` linspace does.
        guidance_scale: lambda of classifier-free guidance, ``null + lambda * (conditional - null)``; 1 is none, and
            costs half.
        scheduler: A diffusers scheduler; by default the one that the noise process names (DDIM, or Euler for flow
            and EDM).
        guidance_interval: Least and largest noise-to-signal ratio sigma / alpha at which guidance is used
            (Kynkaanniemi et al., 2024); elsewhere the conditional prediction is taken as it is, which costs half.
            None: at all.
        precision: Precision that autocast runs the denoiser in, such as bfloat16; schedules and latents stay in
            float32. None leaves it to what is around, as the trainer's ``precision`` in ``lpl predict``.
    """

    def __init__(
        self,
        num_steps: int = 50,
        guidance_scale: float = 2.0,
        scheduler: SchedulerMixin | None = None,
        guidance_interval: tuple[float, float] | None = None,
        precision: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        at_least(1, num_steps=num_steps)
        if guidance_interval is not None and not 0 <= guidance_interval[0] <= guidance_interval[1]:
            raise ValueError(
                "`guidance_interval` must be the least and the largest noise-to-signal ratio that is guided, got "
                f"{guidance_interval}."
            )
        if scheduler is not None and not hasattr(scheduler, "set_timesteps"):
            raise ValueError(f"`scheduler` must be a diffusers scheduler, got {type(scheduler).__name__}.")
        self.num_steps = num_steps
        self.guidance_scale = guidance_scale
        self.scheduler = scheduler
        if precision not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"`precision` must be float32, bfloat16, float16 or None, got {precision!r}.")
        self.guidance_interval = guidance_interval
        self.precision = precision

    def check(self, noise: NoiseProcess) -> None:
        """Refuse a scheduler made for another prediction than the noise process's, or for pixels, and steps that fail.

        Raises:
            ValueError: They do not fit, there are fewer steps in the chain, the scheduler follows a flow in part only,
                goes from clean latents to noise, clips what it samples, asks for a shift of each image size, does
                not step from each of its timesteps to the next, cannot be set up for the steps or take them, or gives
                back something quite different from the latent that a denoiser knows.
        """
        scheduler, chain = self._set_up(noise, torch.device("cpu")), noise.num_train_timesteps
        asked = f"The scheduler {type(scheduler).__name__} with num_steps={self.num_steps}"
        remedy = "or leave `scheduler` out to have the matching one"
        timesteps = scheduler.timesteps
        goes_by_chain = "beta_schedule" in getattr(scheduler, "config", {}) and noise.prediction_type != "flow"
        if goes_by_chain and not (timesteps.min() >= 0 and timesteps.max() < chain):
            raise ValueError(
                f"{asked} has timesteps from {timesteps.max():g} to {timesteps.min():g}, and those of the chain are "
                f"{chain - 1} to 0: give fewer steps, set `steps_offset` to 0 if it is not, {remedy}."
            )
        z = initial_noise([torch.Generator().manual_seed(0)], (4, 8, 8))
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
                ones = self._sample(scheduler, knowing_ones(noise), noise, z, Condition(), None, [torch.Generator()])
        except Exception as error:  # Schedulers do not agree on a type.
            raise ValueError(f"{asked} cannot sample ({error!r}): give fewer steps, {remedy}.") from error
        missed = float((ones - 1).square().mean().sqrt())
        if not missed <= MUCH_LEFT:
            said = f"an error of {missed:.2g}" if math.isfinite(missed) else "NaN or infinity"
            message = (
                f"{asked} samples with {said} what a denoiser without any error would give, as one does that leaves "
                f"noise behind or goes by other noise levels than it names: take other settings or steps, {remedy}."
            )
            if not missed <= TOO_MUCH_LEFT:
                raise ValueError(message)
            rank_zero_warn(message)

    @_float32_by_default()
    def _set_up(self, noise: NoiseProcess, device: torch.device) -> Any:
        """The scheduler with its timesteps, if it fits."""
        if self.scheduler is not None:
            check_scheduler(self.scheduler, noise, self.num_steps)
        scheduler = copy.deepcopy(self.scheduler) if self.scheduler is not None else noise.sampling_scheduler()
        chain = noise.num_train_timesteps
        try:
            _set_timesteps(scheduler, self.num_steps, device)
        except Exception as error:  # Schedulers do not agree on a type.
            if self.num_steps > chain:
                said = f"`num_steps` must be {chain} or less, the steps of the chain, got {self.num_steps}."
                raise ValueError(said) from error
            raise ValueError(
                f"The scheduler {type(scheduler).__name__} with num_steps={self.num_steps} cannot be set up ({error}): "
                "give fewer steps, or leave `scheduler` out to have the matching one."
            ) from error
        return scheduler

    def __call__(
        self,
        predict: Callable[[Tensor, Tensor, Condition], Tensor],
        noise: NoiseProcess,
        z_start: Tensor,
        condition: Condition,
        null: Condition | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            predict: The denoiser, ``(z_t, t, condition) -> prediction``.
            noise: The process that it was trained with.
            z_start: Standard normal noise (B, C, h, w).
            condition: Condition of the B samples.
            null: Null condition of the B samples, for guidance; without it there is none.
            generators: B generators on the CPU, for schedulers that add noise on the way.

        Returns:
            z0: (B, C, h, w) float32.
        """
        scheduler = self._set_up(noise, z_start.device)
        return self._sample(scheduler, predict, noise, z_start, condition, null, generators)

    @torch.no_grad()
    def _sample(
        self,
        scheduler: Any,
        predict: Callable[[Tensor, Tensor, Condition], Tensor],
        noise: NoiseProcess,
        z_start: Tensor,
        condition: Condition,
        null: Condition | None,
        generators: Sequence[torch.Generator] | None,
    ) -> Tensor:
        """Sample by a scheduler that is set up; it is changed."""
        both = None if null is None or self.guidance_scale == 1 else condition.joined(null)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        noise_source = {"generator": list(generators)} if generators is not None and takes_generator else {}
        z = z_start.float() * getattr(scheduler, "init_noise_sigma", 1.0)
        timesteps = scheduler.timesteps
        following = [*timesteps[1:], -1]
        for step, after, inside in zip(timesteps, following, self._guided(noise, timesteps), strict=True):
            scaled = scheduler.scale_model_input(z, step) if hasattr(scheduler, "scale_model_input") else z
            guided = both if inside else None
            model_input = scaled if guided is None else torch.cat([scaled, scaled])
            t = step.to(z.device, torch.float32).expand(len(model_input))
            with self._autocast(z.device.type):
                prediction = predict(model_input, t, condition if guided is None else guided).float()
            if guided is not None:
                conditional, unconditional = prediction.chunk(2)
                prediction = unconditional + self.guidance_scale * (conditional - unconditional)
            _aim(scheduler, step, after)
            with _float32_by_default():
                z = cast(Tensor, scheduler.step(prediction, step, z, **noise_source).prev_sample)
        return z

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        if self.precision == "float32":
            return torch.autocast(device_type, enabled=False)
        return torch.autocast(device_type, dtype=getattr(torch, self.precision))

    def _guided(self, noise: NoiseProcess, timesteps: Tensor) -> list[bool]:
        """Which steps' noise levels are guided."""
        if self.guidance_interval is None:
            return [True] * len(timesteps)
        alpha, sigma = noise.alpha_sigma(timesteps.detach().cpu().float())
        return [self.guidance_interval[0] <= nsr <= self.guidance_interval[1] for nsr in (sigma / alpha).tolist()]


def _set_timesteps(scheduler: Any, num_steps: int, device: torch.device) -> None:
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # Evenly from 1 down to 1/n and then 0; left to itself the scheduler spends its last step on 1/1000.
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps).tolist(), device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)
        if isinstance(scheduler, (*_BY_STRIDE, DDPMScheduler, DDPMParallelScheduler)):
            # An error of rounding gives some numbers of steps one more, at -1, which is read as the noisiest of all.
            scheduler.timesteps = scheduler.timesteps[scheduler.timesteps >= 0]


def _aim(scheduler: Any, step: Tensor, following: Tensor | int) -> None:
    """Have a scheduler that goes by a stride step to the next of its timesteps; -1 is where there is no noise.

    Its own stride is as long only where the number of steps divides the chain.
    """
    if isinstance(scheduler, _BY_STRIDE):
        stride = int(step) - int(following)
        scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, stride)
