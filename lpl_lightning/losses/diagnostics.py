"""What can be seen of the Latent Perceptual Loss while it is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NOISE_LEVELS", "Diagnostics", "MapRecord"]

NOISE_LEVELS = 4
"""How many equal parts of (0, tau], counted in a flow's time nsr / (1 + nsr), losses are told apart by."""


@dataclass(frozen=True)
class MapRecord:
    """Of one compared feature map.

    Attributes:
        loss: Its part of each sample's loss (B,), with its weight.
        inliers: Mean of its mask, a scalar; 1 without one.
        variance_ratio: Variance over positions of the estimate's features over that of the clean ones, the geometric
            mean over samples and channels, a scalar. Above 1 the estimate has more contrast than the truth.
    """

    loss: Tensor
    inliers: Tensor
    variance_ratio: Tensor


@dataclass(frozen=True)
class Diagnostics:
    """Of one call of the loss, without gradients, on the latents' device.

    Attributes:
        maps: By the name of the stage.
        losses: (B,) of the samples that passed the gate.
        flow_time: (B,) nsr / (1 + nsr) of each of them over that of tau, in (0, 1]; None if no ratios were given.
    """

    maps: dict[str, MapRecord]
    losses: Tensor
    flow_time: Tensor | None

    def scalars(self) -> dict[str, Tensor]:
        """Everything as scalars to log; not a number where no sample passed.

        ``lpl_depth/STAGE`` is the stage's part of the loss (mean over samples that passed) and ``lpl_share/STAGE`` its
        share; ``lpl_masked/STAGE`` the share of positions masked as outliers; ``lpl_variance_ratio/STAGE``; and
        ``lpl_noise/1`` to ``lpl_noise/4`` the mean loss by noise level, from little to much.
        """
        found: dict[str, Tensor] = {}
        total = self.losses.mean()
        for name, record in self.maps.items():
            found[f"lpl_depth/{name}"] = record.loss.mean()
            found[f"lpl_share/{name}"] = record.loss.mean() / total
            found[f"lpl_masked/{name}"] = 1 - record.inliers
            found[f"lpl_variance_ratio/{name}"] = record.variance_ratio
        if self.flow_time is not None:
            level = (self.flow_time * NOISE_LEVELS).ceil().clamp(1, NOISE_LEVELS)
            for k in range(1, NOISE_LEVELS + 1):
                inside = (level == k).to(self.losses.dtype)
                found[f"lpl_noise/{k}"] = (self.losses * inside).sum() / inside.sum()
        return found


def variance_ratio(predicted: Tensor, target: Tensor, eps: float) -> Tensor:
    """Geometric mean of the ratio of two sets of variances, each (B, C)."""
    return torch.exp((torch.log(predicted + eps) - torch.log(target + eps)).mean())
