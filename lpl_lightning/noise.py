r"""Noise processes: how a latent is noised, what the denoiser predicts, and the clean latent that follows from it.

.. math:: z_t = \alpha_t z_0 + \sigma_t \epsilon

The *noise-to-signal ratio* is :math:`nsr = \sigma_t / \alpha_t`; the signal-to-noise ratio SNR is
:math:`1 / nsr^2`. From a prediction p the clean latent is (Berrada et al., ICLR 2025, table 1)

============  =====================  ================================================
prediction    target                 :math:`\hat z_0`
============  =====================  ================================================
epsilon       :math:`\epsilon`       :math:`(z_t - \sigma_t p) / \alpha_t`
v             :math:`\alpha_t \epsilon - \sigma_t z_0`  :math:`\alpha_t z_t - \sigma_t p`
sample        :math:`z_0`            :math:`p`
flow          :math:`\epsilon - z_0`  :math:`z_t - t p`, with :math:`\alpha = 1 - t, \sigma = t`
============  =====================  ================================================

All of it is computed in float32, whatever the precision of the denoiser.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

__all__ = [
    "DDPM",
    "FlowMatching",
    "LogitNormal",
    "ModeSampling",
    "NoiseProcess",
    "NoisyLatents",
    "TimeDistribution",
    "Uniform",
]

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class NoisyLatents:
    """One draw of noise for a batch of latents.

    Attributes:
        z0: Clean latents (B, C, h, w), float32.
        noise: Standard normal noise (B, C, h, w).
        t: (B,) float32 time, as backbones take it: from 0 (clean) to ``num_train_timesteps`` (noise).
        alpha: Signal scale (B, 1, 1, 1).
        sigma: Noise scale (B, 1, 1, 1).
        z_t: Noisy latents (B, C, h, w).
        noise_to_signal: (B,) sigma / alpha, infinite where alpha is 0. On the CPU wherever the latents are, so that
            code may branch on it without waiting for an accelerator.
    """

    z0: Tensor
    noise: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    z_t: Tensor
    noise_to_signal: Tensor


class NoiseProcess(ABC):
    """How latents are noised, and how predictions are read. Holds no weights."""

    prediction_type: str
    num_train_timesteps: int = 1000

    @abstractmethod
    def draw_t(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw training times (B,) float32 on the CPU."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at times t; same shape as t, float32."""

    @abstractmethod
    def target(self, noisy: NoisyLatents) -> Tensor:
        """What the denoiser should predict, (B, C, h, w)."""

    @abstractmethod
    def estimate_z0(self, prediction: Tensor, noisy: NoisyLatents) -> Tensor:
        """The clean latent that a prediction implies (table 1), (B, C, h, w) float32."""

    @abstractmethod
    def sampling_scheduler(self) -> Any:
        """A diffusers scheduler that samples from a denoiser trained with this process."""

    def weight(self, noisy: NoisyLatents) -> Tensor:
        """Weight (B,) of each sample's diffusion loss; 1 unless a process says otherwise."""
        return torch.ones_like(noisy.t)

    def sample(self, z0: Tensor, generator: torch.Generator | None = None, t: Tensor | None = None) -> NoisyLatents:
        """Noise a batch of clean latents.

        Args:
            z0: Clean latents (B, C, h, w).
            generator: Source of times and noise, on the CPU; by default torch's own, with the noise drawn where
                the latents are.
            t: Times (B,) to use instead of drawn ones.
        """
        z0 = z0.float()
        times = (self.draw_t(len(z0), generator) if t is None else t.detach().cpu()).float()
        if times.shape != (len(z0),):
            raise ValueError(
                f"`t` must hold one time for each of the {len(z0)} latents, got shape {tuple(times.shape)}."
            )
        drawn = torch.randn_like(z0) if generator is None else torch.randn(z0.shape, generator=generator)
        noise = drawn.to(z0.device)
        alpha, sigma = self.alpha_sigma(times)
        column = (-1, *[1] * (z0.ndim - 1))
        on_device = [x.to(z0.device, non_blocking=True) for x in (times, alpha, sigma)]
        alpha_z, sigma_z = on_device[1].reshape(column), on_device[2].reshape(column)
        return NoisyLatents(
            z0=z0,
            noise=noise,
            t=on_device[0],
            alpha=alpha_z,
            sigma=sigma_z,
            z_t=alpha_z * z0 + sigma_z * noise,
            noise_to_signal=sigma / alpha,
        )


class DDPM(NoiseProcess):
    r"""Variance-preserving diffusion in discrete time (Ho et al., 2020).

    :math:`\alpha_t = \sqrt{\bar\alpha_t}, \sigma_t = \sqrt{1 - \bar\alpha_t}` with t uniform over
    0 .. ``num_train_timesteps`` - 1. The defaults are the paper's: "quadratic" betas from 0.00085 to 0.012, which
    diffusers calls ``scaled_linear``.

    Args:
        prediction_type: What the denoiser predicts, by diffusers' names.
        num_train_timesteps: Number of steps of the chain.
        beta_start: First beta.
        beta_end: Last beta.
        beta_schedule: How betas lie between the two.
        rescale_betas_zero_snr: Whether the last step is pure noise (Lin et al., 2024). By default yes for
            ``v_prediction``, as in the paper, and no otherwise; not possible with ``epsilon``, from which no clean
            latent follows where alpha is 0.
    """

    def __init__(
        self,
        prediction_type: PredictionType = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear",
        rescale_betas_zero_snr: bool | None = None,
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"`prediction_type` must be 'epsilon', 'v_prediction' or 'sample', got {prediction_type!r}."
            )
        zero_snr = prediction_type == "v_prediction" if rescale_betas_zero_snr is None else rescale_betas_zero_snr
        if zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "`rescale_betas_zero_snr`=True cannot go with `prediction_type`='epsilon': the last step holds no "
                "signal, and the noise says nothing of the clean latent there. Use 'v_prediction' or 'sample'."
            )
        self.prediction_type = prediction_type
        self.num_train_timesteps = num_train_timesteps
        self._chain: dict[str, Any] = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "prediction_type": prediction_type,
            "rescale_betas_zero_snr": zero_snr,
        }
        alphas_cumprod = DDPMScheduler(**self._chain).alphas_cumprod.double()
        if zero_snr:
            # diffusers ends its rescaled chain a hair above zero; the last step is pure noise by definition.
            alphas_cumprod[-1] = 0.0
        self._alpha = alphas_cumprod.sqrt().float()
        self._sigma = (1 - alphas_cumprod).sqrt().float()

    def draw_t(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw steps uniformly, (B,) float32 holding whole numbers."""
        return torch.randint(self.num_train_timesteps, (batch_size,), generator=generator).float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at steps t."""
        step = t.long().cpu()
        return self._alpha[step].to(t.device), self._sigma[step].to(t.device)

    def target(self, noisy: NoisyLatents) -> Tensor:
        """The noise, the velocity or the clean latent."""
        match self.prediction_type:
            case "epsilon":
                return noisy.noise
            case "v_prediction":
                return noisy.alpha * noisy.noise - noisy.sigma * noisy.z0
            case _:
                return noisy.z0

    def estimate_z0(self, prediction: Tensor, noisy: NoisyLatents) -> Tensor:
        """The clean latent that a prediction implies (table 1)."""
        prediction = prediction.float()
        match self.prediction_type:
            case "epsilon":
                return (noisy.z_t - noisy.sigma * prediction) / noisy.alpha
            case "v_prediction":
                return noisy.alpha * noisy.z_t - noisy.sigma * prediction
            case _:
                return prediction

    def sampling_scheduler(self) -> DDIMScheduler:
        """Deterministic DDIM that starts at the last step, where training saw the most noise."""
        return DDIMScheduler(**self._chain, clip_sample=False, timestep_spacing="trailing")


class TimeDistribution(ABC):
    """Maps u uniform in (0, 1) to the times t in [0, 1] that a flow is trained at."""

    @abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform u to times of the same shape."""


class Uniform(TimeDistribution):
    """Times uniform in (0, 1)."""

    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform u to times."""
        return u


class LogitNormal(TimeDistribution):
    """Times whose logit is normal (Esser et al., 2024, section 3.1).

    Args:
        mean: Mean of the logit.
        std: Its standard deviation.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"`std` must be above 0, got {std}.")
        self.mean = mean
        self.std = std

    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform u to times."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class ModeSampling(TimeDistribution):
    r"""Mode sampling with heavy tails, :math:`t = 1 - u - s (\cos^2(\pi u / 2) - 1 + u)` (Esser et al., 2024).

    Args:
        scale: s, from -1 to :math:`2 / (\pi - 2)`; above 0 the middle times are drawn more often.
    """

    def __init__(self, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(f"`scale` must lie in -1 .. {2 / (math.pi - 2):.3f}, got {scale}.")
        self.scale = scale

    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform u to times."""
        return 1 - u - self.scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


class FlowMatching(NoiseProcess):
    r"""Conditional flow matching on straight lines, :math:`\alpha = 1 - t, \sigma = t`, target :math:`\epsilon - z_0`.

    Backbones get ``1000 * t``, as diffusers' flow models and schedulers have it, and so do ``draw_t`` and
    ``alpha_sigma``.

    Args:
        time_distribution: Distribution of the training times; by default the paper's, ``ModeSampling(1.29)``.
    """

    prediction_type = "flow"

    def __init__(self, time_distribution: TimeDistribution | None = None) -> None:
        self.time_distribution = time_distribution if time_distribution is not None else ModeSampling()

    def draw_t(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw times in [0, 1000], (B,) float32."""
        # The open interval: ndtri(0) is infinite.
        u = torch.rand(batch_size, generator=generator, dtype=torch.float64).clamp_(1e-7, 1 - 1e-7)
        return (self.num_train_timesteps * self.time_distribution(u)).clamp(0, self.num_train_timesteps).float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at times t in [0, 1000]."""
        sigma = t.float() / self.num_train_timesteps
        return 1 - sigma, sigma

    def target(self, noisy: NoisyLatents) -> Tensor:
        """The velocity from the clean latent to the noise."""
        return noisy.noise - noisy.z0

    def estimate_z0(self, prediction: Tensor, noisy: NoisyLatents) -> Tensor:
        """The clean latent that a prediction implies (table 1)."""
        return noisy.z_t - noisy.sigma * prediction.float()

    def sampling_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The Euler method along the flow."""
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.num_train_timesteps)
