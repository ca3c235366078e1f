"""What can be seen of the Latent Perceptual Loss while it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_lightning.losses.comparison import Compared

__all__ = ["NOISE_LEVELS", "Diagnostics", "count_of", "scalars_of"]

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

    def sums(self) -> Tensor:
        """Sums over samples that all scalars are ratios of, (n,); of several batches or processes they add up."""
        counted = self.finite & self.passed
        kept, passed = counted.to(self.parts.dtype), self.passed.to(self.parts.dtype)
        parts = torch.where(counted, self.parts, torch.zeros_like(self.parts))
        seen = self.seen * passed
        both = seen * kept
        ratios = torch.where(both > 0, self.variance_ratio.log(), torch.zeros_like(both))
        of_maps = torch.stack([parts, self.inliers * seen, seen, ratios, both]).sum(dim=2)
        inside = torch.zeros(NOISE_LEVELS, len(kept), dtype=kept.dtype, device=kept.device)
        if self.relative_time is not None:
            level = (self.relative_time * NOISE_LEVELS).ceil().clamp(1, NOISE_LEVELS)
            inside = torch.stack([(level == k) * kept for k in range(1, NOISE_LEVELS + 1)])
        of_levels = torch.stack([inside * parts.sum(dim=0), inside]).sum(dim=2)
        return torch.cat([torch.stack([passed.sum(), kept.sum()]), of_maps.flatten(), of_levels.flatten()])

    def scalars(self) -> dict[str, Tensor]:
        """Everything as scalars to log, see ``scalars_of``."""
        return scalars_of(self.stages, self.sums(), by_noise=self.relative_time is not None)


def count_of(stages: Sequence[str]) -> int:
    """How many ``Diagnostics.sums`` there are."""
    return 2 + 5 * len(stages) + 2 * NOISE_LEVELS


def scalars_of(stages: Sequence[str], sums: Tensor, by_noise: bool) -> dict[str, Tensor]:
    """Everything as scalars to log, means over samples that passed; not a number where there was none.

    ``lpl_depth/STAGE`` is the stage's part of the loss and ``lpl_share/STAGE`` its share; ``lpl_masked/STAGE`` the
    share of positions masked as outliers; ``lpl_variance_ratio/STAGE``; ``lpl_noise/1`` to ``lpl_noise/4`` the loss by
    noise level, from little to much; ``lpl_nonfinite`` the share of samples left out as not finite.

    Args:
        stages: Names of the compared stages.
        sums: ``Diagnostics.sums``, added up over batches or processes.
        by_noise: Whether ratios were given.
    """
    passed, kept = sums[:2]
    parts, inliers, seen, ratios, both = sums[2 : 2 + 5 * len(stages)].view(5, len(stages))
    of_levels, inside = sums[2 + 5 * len(stages) :].view(2, NOISE_LEVELS)
    found: dict[str, Tensor] = {"lpl_nonfinite": 1 - kept / passed}
    for i, name in enumerate(stages):
        found[f"lpl_depth/{name}"] = parts[i] / kept
        found[f"lpl_share/{name}"] = parts[i] / parts.sum()
        found[f"lpl_masked/{name}"] = 1 - inliers[i] / seen[i]
        found[f"lpl_variance_ratio/{name}"] = torch.exp(ratios[i] / both[i])
    if by_noise:
        found |= {f"lpl_noise/{k + 1}": of_levels[k] / inside[k] for k in range(NOISE_LEVELS)}
    return found
