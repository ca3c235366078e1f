"""What can be seen of the Latent Perceptual Loss while it is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_lightning.losses.distance import variance

__all__ = ["NOISE_LEVELS", "Diagnostics", "MapRecord", "record"]

NOISE_LEVELS = 4
"""How many equal parts of (0, tau], counted in a flow's time nsr / (1 + nsr), losses are told apart by."""


@dataclass(frozen=True)
class MapRecord:
    """Of one compared feature map.

    Attributes:
        inliers: Mean of its mask, a scalar; 1 without one.
        variance_ratio: Variance over positions of the estimate's features over that of the clean ones, the geometric
            mean over channels, (B,). Above 1 the estimate has more contrast than the truth.
    """

    inliers: Tensor
    variance_ratio: Tensor


@dataclass(frozen=True)
class Diagnostics:
    """Of one call of the loss, without gradients, on the latents' device.

    Attributes:
        maps: By the name of the stage.
        parts: Each map's part (maps, B) of the losses of the samples that passed the gate, with its weight.
        finite: (B,) bool, which of them counted: not those left out as not finite.
        relative_time: (B,) 1 - 1 / (1 + nsr) of each of them over that of tau, from 0 to 1 and with a smooth gate
            beyond; None if no ratios were given.
    """

    maps: dict[str, MapRecord]
    parts: Tensor
    finite: Tensor
    relative_time: Tensor | None

    def scalars(self) -> dict[str, Tensor]:
        """Everything as scalars to log, means over samples that passed; not a number where there was none.

        ``lpl_depth/STAGE`` is the stage's part of the loss and ``lpl_share/STAGE`` its share; ``lpl_masked/STAGE`` the
        share of positions masked as outliers; ``lpl_variance_ratio/STAGE``; ``lpl_noise/1`` to ``lpl_noise/4`` the loss
        by noise level, from little to much; ``lpl_nonfinite`` the share of samples left out as not finite.
        """
        kept = self.finite.to(self.parts.dtype)
        parts = torch.where(self.finite, self.parts, torch.zeros_like(self.parts))
        of_maps = parts.sum(dim=1) / kept.sum()
        found: dict[str, Tensor] = {"lpl_nonfinite": 1 - kept.mean()}
        for (name, seen), part in zip(self.maps.items(), of_maps, strict=True):
            ratios = torch.where(self.finite, seen.variance_ratio.log(), torch.zeros_like(kept))
            found[f"lpl_depth/{name}"] = part
            found[f"lpl_share/{name}"] = part / of_maps.sum()
            found[f"lpl_masked/{name}"] = 1 - seen.inliers
            found[f"lpl_variance_ratio/{name}"] = torch.exp(ratios.sum() / kept.sum())
        if self.relative_time is not None:
            level = (self.relative_time * NOISE_LEVELS).ceil().clamp(1, NOISE_LEVELS)
            for k in range(1, NOISE_LEVELS + 1):
                inside = (level == k) * kept
                found[f"lpl_noise/{k}"] = (parts.sum(dim=0) * inside).sum() / inside.sum()
        return found


@torch.no_grad()
def record(predicted: Tensor, target: Tensor, mask: Tensor | None) -> MapRecord:
    """Look at one map (B, C, *positions) of the estimate and of the clean latent, and the mask that was used."""
    ratio = variance(predicted).add(1e-12).log() - variance(target).add(1e-12).log()
    return MapRecord(
        inliers=predicted.new_ones(()) if mask is None else mask.mean(), variance_ratio=ratio.mean(dim=1).exp()
    )
