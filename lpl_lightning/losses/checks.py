"""What the Latent Perceptual Loss refuses, and what it remarks on."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lpl_lightning.losses.distance import variance

__all__ = ["check_latents", "note_constant_channels"]

CONSTANT = 1e-3
"""A channel hardly varies whose variance is below so many times the mean of its map's."""


def check_latents(z0_hat: Tensor, z0: Tensor, noise_to_signal: Tensor | None) -> None:
    """Refuse latents that do not belong together.

    Raises:
        ValueError: Shapes, dtypes or devices that differ, or are none of a batch of latents.
    """
    if z0_hat.shape != z0.shape or z0_hat.ndim < 3 or 0 in z0.shape[1:]:
        raise ValueError(
            "`z0_hat` and `z0` must both be (B, C, *positions), such as (B, C, h, w), and alike; "
            f"got {tuple(z0_hat.shape)} and {tuple(z0.shape)}."
        )
    for what, other in (("dtype", z0_hat.dtype), ("device", z0_hat.device)):
        if other != getattr(z0, what):
            raise ValueError(
                f"`z0_hat` and `z0` must have the same {what}, got {other} and {getattr(z0, what)}. "
                f"Cast one of them, best the estimate: z0_hat.to(z0.{what})."
            )
    if not z0.is_floating_point():
        raise ValueError(f"`z0_hat` and `z0` must be of floating point, got {z0.dtype}.")
    if noise_to_signal is not None and noise_to_signal.shape != z0.shape[:1]:
        raise ValueError(
            f"`noise_to_signal` must hold one ratio for each of the {len(z0)} samples, "
            f"got shape {tuple(noise_to_signal.shape)}."
        )


def note_constant_channels(name: str, features: Tensor, eps: float, relative_eps: float) -> None:
    """Log if channels that hardly vary would be most of a standardized distance.

    Dividing by a standard deviation of almost nothing makes a small difference there as large as any. Decoders with
    normalization layers have no such channels; those with rectifiers alone, as AutoencoderTiny, do.

    Args:
        name: The stage.
        features: Its map of clean latents (B, C, *positions).
        eps: As in ``standardize``.
        relative_eps: As in ``standardize``.
    """
    variances = variance(features)
    mean = variances.mean(dim=1, keepdim=True)
    share = ((variances < CONSTANT * mean) & (eps + relative_eps * mean < CONSTANT * mean)).float().mean().item()
    if share > 0.01:
        rank_zero_info(
            f"LPL: {share:.0%} of the channels of the decoder's stage {name!r} hardly vary, and standardized they "
            "count as much as any. If the loss is spiky, or lpl_gradient_ratio far above 1, set `relative_eps` to 0.1."
        )
