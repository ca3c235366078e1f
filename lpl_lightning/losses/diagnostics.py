"""What can be seen of the Latent Perceptual Loss while it is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_lightning.losses.comparison import Compared

__all__ = ["NOISE_LEVELS", "Diagnostics"]

NOISE_LEVELS = 4
"""How many equal parts of (0, tau], counted in a flow's time nsr / (1 + nsr), losses are told apart by."""


@dataclass(frozen=True)
class Diagnostics:
    """Of the B samples of one call of the loss that were decoded, without gradients, on the latents' device.

    Attributes:
        stages: Names of the compared stages.
        parts: (maps, B) each map's part of the losses, with its weight.
        seen: (maps, B) bool, which maps were computed; all but with a ``Subset``.
        inliers: (maps, B) mean of the outlier mask; 1 without one.
        variance_ratio: (maps, B) variance over positions of the estimate's features over that of the clean ones, the
            geometric mean over channels. Above 1 the estimate has more contrast than the truth.
        finite: (B,) bool, which samples are not left out as not finite.
        passed: (B,) bool, which samples passed the gate: all, but where ``Execution.static_shapes`` decodes others too.
        relative_time: (B,) 1 - 1 / (1 + nsr) of each of them over that of tau, from 0 to 1 and with a smooth gate
            beyond; None if no ratios were given.
    """

    stages: tuple[str, ...]
    parts: Tensor
    seen: Tensor
    inliers: Tensor
    variance_ratio: Tensor
    finite: Tensor
    passed: Tensor
    relative_time: Tensor | None

    @classmethod
    def of(
        cls,
        stages: tuple[str, ...],
        compared: Compared,
        finite: Tensor,
        passed: Tensor | None,
        relative_time: Tensor | None,
    ) -> Diagnostics:
        """Of what was found by a comparison."""
        found = (compared.parts.detach(), compared.seen, compared.inliers, compared.variance_ratio)
        return cls(stages, *found, finite, torch.ones_like(finite) if passed is None else passed, relative_time)

    def scalars(self) -> dict[str, Tensor]:
        """Everything as scalars to log, means over samples that passed; not a number where there was none.

        ``lpl_depth/STAGE`` is the stage's part of the loss and ``lpl_share/STAGE`` its share; ``lpl_masked/STAGE`` the
        share of positions masked as outliers; ``lpl_variance_ratio/STAGE``; ``lpl_noise/1`` to ``lpl_noise/4`` the loss
        by noise level, from little to much; ``lpl_nonfinite`` the share of samples left out as not finite.
        """
        counted = self.finite & self.passed
        kept, passed = counted.to(self.parts.dtype), self.passed.to(self.parts.dtype)
        parts = torch.where(counted, self.parts, torch.zeros_like(self.parts))
        of_maps = parts.sum(dim=1) / kept.sum()
        found: dict[str, Tensor] = {"lpl_nonfinite": 1 - kept.sum() / passed.sum()}
        for i, name in enumerate(self.stages):
            seen = self.seen[i] * passed
            both = seen * kept
            ratios = torch.where(both > 0, self.variance_ratio[i].log(), torch.zeros_like(kept))
            found[f"lpl_depth/{name}"] = of_maps[i]
            found[f"lpl_share/{name}"] = of_maps[i] / of_maps.sum()
            found[f"lpl_masked/{name}"] = 1 - (self.inliers[i] * seen).sum() / seen.sum()
            found[f"lpl_variance_ratio/{name}"] = torch.exp(ratios.sum() / both.sum())
        if self.relative_time is not None:
            level = (self.relative_time * NOISE_LEVELS).ceil().clamp(1, NOISE_LEVELS)
            for k in range(1, NOISE_LEVELS + 1):
                inside = (level == k) * kept
                found[f"lpl_noise/{k}"] = (parts.sum(dim=0) * inside).sum() / inside.sum()
        return found
