"""What the Latent Perceptual Loss refuses, and what it remarks on."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lpl_lightning.losses.distance import variance
from lpl_lightning.losses.options import LossOptions

__all__ = ["check_latents", "check_lists", "normalizes", "note_constant_channels"]

CONSTANT = 1e-3
"""A channel hardly varies whose variance is below so many times the mean of its map's."""


def check_latents(z0_hat: Tensor, z0: Tensor, noise_to_signal: Tensor | None) -> None:
    """Refuse latents that do not belong together. Their precisions may differ, as they do in mixed precision.

    Raises:
        ValueError: Shapes or devices that differ, or are none of a batch of latents.
    """
    for name, value in (("z0_hat", z0_hat), ("z0", z0), ("noise_to_signal", noise_to_signal)):
        if not isinstance(value, Tensor) and not (value is None and name == "noise_to_signal"):
            raise ValueError(
                f"`{name}` must be a tensor, got {type(value).__name__}. Make it one: torch.as_tensor(...)."
            )
    if z0_hat.shape != z0.shape or z0_hat.ndim < 3 or 0 in z0.shape[1:]:
        raise ValueError(
            "`z0_hat` and `z0` must both be (B, C, *positions), such as (B, C, h, w), and alike; "
            f"got {tuple(z0_hat.shape)} and {tuple(z0.shape)}. Give the latents as the autoencoder's `encode` has them."
        )
    if z0_hat.device != z0.device:
        raise ValueError(
            f"`z0_hat` and `z0` must be on the same device, got {z0_hat.device} and {z0.device}. Move one of them, "
            "best the clean latent: z0.to(z0_hat.device)."
        )
    for name, z in (("z0_hat", z0_hat), ("z0", z0)):
        if not z.is_floating_point():
            raise ValueError(f"`{name}` must be of floating point, got {z.dtype}. Cast it with .float().")
    if noise_to_signal is not None and noise_to_signal.shape != z0.shape[:1]:
        raise ValueError(
            f"`noise_to_signal` must hold one ratio for each of the {len(z0)} samples, "
            f"got shape {tuple(noise_to_signal.shape)}. Flatten it, or give one for each."
        )
    # Where looking costs no wait: a logarithm given for a ratio would pass the gate unseen.
    if noise_to_signal is not None and noise_to_signal.device.type == "cpu" and bool((noise_to_signal < 0).any()):
        raise ValueError(
            f"`noise_to_signal` must be sigma / alpha, 0 or more, got {noise_to_signal.min().item():.4g}. "
            "If it is a logarithm of the SNR, give torch.exp(-log_snr / 2)."
        )


def check_lists(options: LossOptions, compared: Sequence[str]) -> None:
    """Refuse options whose entries are too few for the compared maps, or could be taken for another map's.

    Args:
        options: The loss's.
        compared: Names of the stages that are compared, in the order they run.

    Raises:
        ValueError: A list that is too short, or stages given in another order than they run beside a list.
    """
    given = compared if isinstance(options.depth, int) else options.depth
    for name in ("depth_weights", *(("dilation", "erosion") if options.mask_outliers else ())):
        options.of_map(name, 0, len(compared))
        if isinstance(getattr(options, name), tuple) and list(given) != list(compared):
            raise ValueError(
                f"`depth` must name stages in the order they run where `{name}` is a list with an entry for each: give "
                f"{list(compared)}, got {list(given)}, and order `{name}` likewise."
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


def normalizes(autoencoder: nn.Module) -> bool:
    """Whether any part of a model but its encoder is a normalization layer, by the name of its class.

    The features of decoders that have some are of about one scale in all channels. In others, such as those of
    AutoencoderTiny, channels may hardly vary, and standardizing divides their differences by almost nothing.
    """
    return any(
        "norm" in type(module).__name__.lower() and not type(module).__module__.startswith("torch.nn.utils")
        for name, module in autoencoder.named_modules()
        if name.split(".")[0] != "encoder" and not any(module.children())
    )
