"""Distributions of the times that a flow is trained at."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lpl_lightning.arguments import above

__all__ = ["CosMap", "LogitNormal", "ModeSampling", "TimeDistribution", "Uniform", "shifted"]


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
        above(0, std=std)
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


class CosMap(TimeDistribution):
    r"""Times at which a flow is as noisy as the cosine schedule, :math:`t = 1 - 1 / (\tan(\pi u / 2) + 1)`.

    (Esser et al., 2024, section 3.1).
    """

    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform u to times."""
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


def shifted(t: Tensor, shift: float) -> Tensor:
    r"""Times at which latents of more positions are as noisy, :math:`s t / (1 + (s - 1) t)`.

    (Esser et al., 2024, eq. 23).

    Args:
        t: Times in [0, 1].
        shift: s, the square root of how many times as many positions there are.
    """
    return shift * t / (1 + (shift - 1) * t)
