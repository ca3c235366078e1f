r"""The gate :math:`\delta`: which samples the Latent Perceptual Loss is computed for.

The paper applies the loss where :math:`\sigma_t \le \tau_\sigma` (eq. 3), finds 3 to 6 best and scales
:math:`\tau` with the resolution (section 4.1): that is the noise of an unscaled signal, the noise-to-signal ratio
:math:`nsr = \sigma_t / \alpha_t`. One threshold has many names:

.. math::
    SNR = nsr^{-2}, \quad \log SNR = -2 \ln nsr, \quad t_{flow} = \frac{nsr}{1 + nsr},
    \quad t_{DDPM} = \max \{ t : \sigma_t / \alpha_t \le nsr \}
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_lightning.noise import DDPM

__all__ = ["Threshold", "equivalents", "gate_weight", "latent_side"]


_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "nsr": ("a noise-to-signal ratio above 0", lambda value: value > 0),
    "snr": ("a signal-to-noise ratio above 0", lambda value: value > 0),
    "log_snr": ("a finite number", math.isfinite),
    "ddpm_timestep": ("a whole number from 0", lambda value: value >= 0 and value == int(value)),
    "flow_t": ("a time between 0 and 1", lambda value: 0 < value < 1),
}


@dataclass(frozen=True)
class Threshold:
    """A noise level in any one unit; samples at it or with less noise pass.

    It is that of latents of the loss's ``reference_side``, and scaled for others, in whatever unit it was given.

    Attributes:
        nsr: Noise-to-signal ratio sigma / alpha, above 0; an EDM sigma.
        snr: Signal-to-noise ratio 1 / nsr ** 2, above 0: samples with this or more pass.
        log_snr: Its natural logarithm.
        ddpm_timestep: Step of a DDPM chain, from 0: this and all earlier ones pass.
        flow_t: Time of a flow z_t = (1 - t) z0 + t noise, in (0, 1). Whether a sample at it passes hangs on rounding.
    """

    nsr: float | None = None
    snr: float | None = None
    log_snr: float | None = None
    ddpm_timestep: int | None = None
    flow_t: float | None = None

    @classmethod
    def of(cls, value: object) -> Threshold:
        """Read a threshold: a noise-to-signal ratio, or units by name.

        Raises:
            ValueError: None, more than one unit, or a value out of its range.
        """
        if isinstance(value, Mapping) and set(value) <= set(_RANGES):
            value = cls(**value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            value = cls(nsr=value)
        if not isinstance(value, Threshold):
            raise ValueError(
                f"`threshold` must be a noise-to-signal ratio or one of {', '.join(_RANGES)} by name, got {value!r}."
            )
        value.check()
        return value

    # Not in __post_init__: a config's parser would take the error for another type's and say something else.
    def check(self) -> None:
        """Refuse no unit, more than one, or a value out of its range."""
        given = {unit: value for unit in _RANGES if (value := getattr(self, unit)) is not None}
        if len(given) != 1:
            raise ValueError(
                f"`threshold` must be given in exactly one of the units {', '.join(_RANGES)}; got {given or 'none'}. "
                "Keep one: they all name the same noise level."
            )
        ((unit, value),) = given.items()
        expected, fits = _RANGES[unit]
        if not fits(value):
            raise ValueError(f"`threshold` in {unit} must be {expected}, got {value}.")

    def to_nsr(self, ddpm: DDPM | None = None) -> float:
        """The noise-to-signal ratio.

        Args:
            ddpm: The chain that a timestep counts in; by default the paper's, ``DDPM()``.
        """
        self.check()
        if self.nsr is not None:
            return float(self.nsr)
        if self.snr is not None:
            return 1 / math.sqrt(self.snr)
        if self.log_snr is not None:
            return math.exp(-0.5 * self.log_snr)
        if self.flow_t is not None:
            return self.flow_t / (1 - self.flow_t)
        ratios = _ratios(ddpm)
        step = int(self.ddpm_timestep or 0)
        if step >= len(ratios):
            raise ValueError(f"`threshold` in ddpm_timestep must be below the chain's {len(ratios)} steps, got {step}.")
        # A hair above the ratio, so that the step itself passes however a loop has rounded its own; neighbouring steps
        # are hundreds of times as far apart.
        return ratios[step].item() * (1 + 1e-5)


@functools.lru_cache(maxsize=8)
def _ratios(ddpm: DDPM | None) -> Tensor:
    """Noise-to-signal ratio of each step of a chain, float32; by default the paper's."""
    chain = ddpm if ddpm is not None else DDPM()
    alpha, sigma = chain.alpha_sigma(torch.arange(chain.num_train_timesteps, dtype=torch.float32))
    return sigma / alpha


def equivalents(nsr: float, ddpm: DDPM | None = None) -> dict[str, float]:
    """A noise-to-signal ratio in every unit of ``Threshold``.

    Args:
        nsr: The ratio.
        ddpm: The chain that timesteps count in; by default the paper's, ``DDPM()``.

    Returns:
        Values by unit. ``ddpm_timestep`` is the last step that passes, -1 if none does.
    """
    return {
        "nsr": nsr,
        "snr": nsr**-2,
        "log_snr": -2 * math.log(nsr),
        "ddpm_timestep": int((_ratios(ddpm) <= nsr).sum()) - 1,
        "flow_t": 1.0 if math.isinf(nsr) else nsr / (1 + nsr),
    }


def described(nsr: float, z: Tensor, video: bool, reference_side: int, ddpm: DDPM | None = None) -> str:
    """What a threshold is for latents such as ``z``, in every unit.

    Args:
        nsr: The threshold for them, a noise-to-signal ratio.
        z: Latents (B, C, *positions).
        video: Whether the first of the positions are frames.
        reference_side: The side that the threshold was given for; 0 for any.
        ddpm: The chain that timesteps count in; by default the paper's, ``DDPM()``.
    """
    side, relative = latent_side(z, video), relative_side(z, video, reference_side)
    units = ", ".join(f"{name} {value:.4g}" for name, value in equivalents(nsr, ddpm).items())
    scaled = f" ({relative:.4g} times that of side {reference_side})" if relative != 1 else ""
    return f"on latents of side {side:.4g} its threshold is {units}{scaled}"


def gate_weight(noise_to_signal: Tensor, threshold: float, softness: float = 1.0) -> Tensor:
    r"""Weight of each sample: 1 with little noise, 0 with much.

    Args:
        noise_to_signal: (B,) ratios, from 0 to infinity.
        threshold: tau.
        softness: s, 1 or more. 1 is the paper's hard gate, :math:`[nsr \le \tau]`. Above, the weight falls from 1 at
            :math:`\tau / s` to 0 at :math:`\tau s`, as a half cosine of :math:`\ln nsr`, and is 1/2 at tau.

    Returns:
        (B,) weights in the dtype of ``noise_to_signal``; a ratio that is not a number gets 0.
    """
    if softness == 1 or math.isinf(threshold):
        return (noise_to_signal <= threshold).to(noise_to_signal.dtype)
    phase = ((noise_to_signal.clamp_min(0) / threshold).log() / math.log(softness)).clamp(-1, 1)
    weight = 0.5 * (1 - torch.sin(0.5 * math.pi * phase))
    return torch.where(noise_to_signal < threshold * softness, weight, torch.zeros_like(weight))


def relative_side(z: Tensor, video: bool, reference_side: int) -> float:
    """Side of a latent over another side; 1 where that is 0."""
    return latent_side(z, video) / reference_side if reference_side else 1.0


def latent_side(z: Tensor, video: bool = False) -> float:
    """Side of a latent (B, C, *positions): the geometric mean of its sides, those of a frame if it is ``video``."""
    sides = z.shape[3 if video else 2 :]
    return float(math.prod(sides) ** (1 / len(sides)))
