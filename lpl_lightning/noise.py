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
edm           :math:`\sigma_t z_0 / s - s \alpha_t \epsilon`  :math:`s^2 \alpha_t z_t + s \sigma_t p`
============  =====================  ================================================

with the data's standard deviation s for EDM (Karras et al., 2022). All of it is computed in float32, whatever the
precision of the denoiser, and finite at both ends: where nothing is noise, and where nothing is signal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lpl_lightning.arguments import above
from lpl_lightning.draws import Generators, normal
from lpl_lightning.times import ModeSampling, TimeDistribution, shifted

__all__ = ["DDPM", "EDM", "FlowMatching", "NoiseProcess", "NoisyLatents"]

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class NoisyLatents:
    """One draw of noise for a batch of latents.

    Attributes:
        z0: Clean latents (B, C, h, w), float32.
        noise: Standard normal noise (B, C, h, w).
        t: (B,) float32 time, as backbones take it and ``times`` makes it: larger for more noise.
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
    def times(self, u: Tensor) -> Tensor:
        """Training times (B,) float32 of numbers (B,) float64 that are uniform in (0, 1), on the CPU."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at times t; same shape as t, float32."""

    @abstractmethod
    def time_at(self, noise_to_signal: Tensor) -> Tensor:
        """Times (N,) float32 at which sigma / alpha is, or is nearest to, given ratios (N,) above 0."""

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

    def draw_t(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw training times (B,) float32 on the CPU."""
        return self.times(torch.rand(batch_size, generator=generator, dtype=torch.float64))

    def sample(self, z0: Tensor, generator: Generators | None = None, t: Tensor | None = None) -> NoisyLatents:
        """Noise a batch of clean latents.

        Args:
            z0: Clean latents (B, C, h, w).
            generator: Source of the noise, one or one a sample; one is on the CPU, and of the times too.
            t: Times (B,) to use instead of drawn ones.
        """
        z0 = z0.float()
        one = generator if isinstance(generator, torch.Generator) else None
        times = (self.draw_t(len(z0), one) if t is None else t.detach().cpu()).float()
        if times.shape != (len(z0),):
            raise ValueError(f"`t` must be one time for each of the {len(z0)} latents, got shape {tuple(times.shape)}.")
        return self.noised(z0, normal(z0.shape, generator, z0.device, z0.dtype), times)

    def noised(self, z0: Tensor, noise: Tensor, t: Tensor) -> NoisyLatents:
        """Add noise to a batch of clean latents.

        Args:
            z0: Clean latents (B, C, h, w), float32.
            noise: Standard normal noise (B, C, h, w).
            t: Times (B,) float32, on the CPU.
        """
        alpha, sigma = self.alpha_sigma(t)
        on_device = [x.to(z0.device, non_blocking=True) for x in (t, alpha, sigma)]
        alpha_z, sigma_z = (x.reshape(-1, *[1] * (z0.ndim - 1)) for x in on_device[1:])
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
        min_snr_gamma: Gamma of Min-SNR weighting (Hang et al., 2023): errors of the clean latent weigh
            min(SNR, gamma) instead of what the prediction makes of them. The authors' is 5; None weighs all
            predictions' errors alike, as the paper does.
    """

    def __init__(
        self,
        prediction_type: PredictionType = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear",
        rescale_betas_zero_snr: bool | None = None,
        min_snr_gamma: float | None = None,
    ) -> None:
        if min_snr_gamma is not None:
            above(0, min_snr_gamma=min_snr_gamma)
        self.min_snr_gamma = min_snr_gamma
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
        self.schedule: dict[str, Any] = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "prediction_type": prediction_type,
            "rescale_betas_zero_snr": zero_snr,
        }
        alphas_cumprod = DDPMScheduler(**self.schedule).alphas_cumprod.double()
        if zero_snr:
            # diffusers ends its rescaled chain a hair above zero; the last step is pure noise by definition.
            alphas_cumprod[-1] = 0.0
        self._alpha = alphas_cumprod.sqrt().float()
        self._sigma = (1 - alphas_cumprod).sqrt().float()

    def times(self, u: Tensor) -> Tensor:
        """Steps, each as likely, (B,) float32 holding whole numbers."""
        return (u * self.num_train_timesteps).floor().clamp_max(self.num_train_timesteps - 1).float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at steps t."""
        step = t.long().cpu()
        return self._alpha[step].to(t.device), self._sigma[step].to(t.device)

    def time_at(self, noise_to_signal: Tensor) -> Tensor:
        """The step whose ratio is nearest, in its logarithm."""
        ratios: Tensor = (self._sigma / self._alpha).log()
        off = (noise_to_signal.cpu().float().log()[:, None] - ratios).abs()
        return off.argmin(dim=1).float().to(noise_to_signal.device)

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

    def weight(self, noisy: NoisyLatents) -> Tensor:
        """Weight (B,) of each sample's diffusion loss: 1, or that of Min-SNR."""
        if self.min_snr_gamma is None:
            return super().weight(noisy)
        snr = (noisy.alpha / noisy.sigma).square().flatten()
        match self.prediction_type:
            case "epsilon":
                return (self.min_snr_gamma / snr).clamp_max(1)
            case "v_prediction":
                return snr.clamp_max(self.min_snr_gamma) / (snr + 1)
            case _:
                return snr.clamp_max(self.min_snr_gamma)

    def sampling_scheduler(self) -> DDIMScheduler:
        """Deterministic DDIM that starts at the last step, where training saw the most noise."""
        return DDIMScheduler(**self.schedule, clip_sample=False, timestep_spacing="trailing")


class FlowMatching(NoiseProcess):
    r"""Conditional flow matching on straight lines, :math:`\alpha = 1 - t, \sigma = t`, target :math:`\epsilon - z_0`.

    Backbones get ``1000 * t``, as diffusers' flow models and schedulers have it, and so do ``draw_t`` and
    ``alpha_sigma``.

    Args:
        time_distribution: Distribution of the training times; by default the paper's, ``ModeSampling(1.29)``.
        shift: Moves times towards the noise, both those of training and those of sampling, for latents of more
            positions than the distribution was made for; see ``shifted``. SD 3 has 3 for images of 1024 px.
    """

    prediction_type = "flow"

    def __init__(self, time_distribution: TimeDistribution | None = None, shift: float = 1.0) -> None:
        above(0, shift=shift)
        self.time_distribution = time_distribution if time_distribution is not None else ModeSampling()
        self.shift = shift

    def times(self, u: Tensor) -> Tensor:
        """Times in [0, 1000], (B,) float32."""
        times = self.time_distribution(u.clamp(1e-7, 1 - 1e-7)).clamp(0, 1)  # ndtri(0) is infinite
        return (self.num_train_timesteps * shifted(times, self.shift)).float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at times t in [0, 1000]."""
        sigma = t.float() / self.num_train_timesteps
        return 1 - sigma, sigma

    def time_at(self, noise_to_signal: Tensor) -> Tensor:
        """Times in (0, 1000)."""
        return self.num_train_timesteps * noise_to_signal.float() / (1 + noise_to_signal.float())

    def target(self, noisy: NoisyLatents) -> Tensor:
        """The velocity from the clean latent to the noise."""
        return noisy.noise - noisy.z0

    def estimate_z0(self, prediction: Tensor, noisy: NoisyLatents) -> Tensor:
        """The clean latent that a prediction implies (table 1)."""
        return noisy.z_t - noisy.sigma * prediction.float()

    def sampling_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The Euler method along the flow."""
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.num_train_timesteps, shift=self.shift)


class EDM(NoiseProcess):
    r"""Diffusion by noise levels, with inputs, outputs and times as EDM scales them (Karras et al., 2022).

    A latent with noise of the standard deviation :math:`\varsigma`, divided by :math:`\sqrt{\varsigma^2 + s^2}`, is
    :math:`z_t` with :math:`\alpha = 1 / \sqrt{\varsigma^2 + s^2}` and :math:`\sigma = \varsigma \alpha`. Backbones get
    :math:`t = \ln(\varsigma) / 4`. Training levels are log-normal.

    Args:
        sigma_data: s, the latents' standard deviation. Autoencoders scale them to about 1.
        mean: Mean of the logarithm of training levels. The default is EDM2's (Karras et al., 2024) for latents of
            standard deviation 1.
        std: Its standard deviation.
    """

    prediction_type = "edm"

    def __init__(self, sigma_data: float = 1.0, mean: float = 0.3, std: float = 1.0) -> None:
        above(0, sigma_data=sigma_data, std=std)
        self.sigma_data = sigma_data
        self.mean = mean
        self.std = std

    def times(self, u: Tensor) -> Tensor:
        """Times, (B,) float32."""
        logarithms: Tensor = self.mean + self.std * torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
        return (logarithms / 4).float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at times t."""
        level = torch.exp(4 * t.float())
        norm = torch.hypot(level, torch.full_like(level, self.sigma_data))
        return 1 / norm, level / norm

    def time_at(self, noise_to_signal: Tensor) -> Tensor:
        """Times, since the ratio is the level itself."""
        return noise_to_signal.float().log() / 4

    def target(self, noisy: NoisyLatents) -> Tensor:
        """The network's output F of which the clean latent is ``c_skip x + c_out F``."""
        return noisy.sigma / self.sigma_data * noisy.z0 - self.sigma_data * noisy.alpha * noisy.noise

    def estimate_z0(self, prediction: Tensor, noisy: NoisyLatents) -> Tensor:
        """The clean latent that a prediction implies."""
        skipped = self.sigma_data**2 * noisy.alpha * noisy.z_t
        return skipped + self.sigma_data * noisy.sigma * prediction.float()

    def sampling_scheduler(self) -> EDMEulerScheduler:
        """The Euler method over levels from 80 to 0.002 times the data's standard deviation."""
        levels = {"sigma_min": 0.002 * self.sigma_data, "sigma_max": 80.0 * self.sigma_data}
        return EDMEulerScheduler(**levels, sigma_data=self.sigma_data)
