r"""The Latent Perceptual Loss (Berrada et al., "Boosting Latent Diffusion with Perceptual Objectives", ICLR 2025).

Equation 3, for one sample with decoder features :math:`\phi_l` of the clean latent :math:`z_0` and
:math:`\hat\phi_l` of its estimate :math:`\hat z_0`, both standardized (primed):

.. math::
    L = \delta_{nsr \le \tau} \sum_l \omega_l \frac{1}{C_l} \sum_c
        \frac{\| \rho_{l,c} \odot (\phi'_{l,c} - \hat\phi'_{l,c}) \|_2^2}{\| \rho_{l,c} \|_1}

with the outlier mask :math:`\rho` of ``outliers.py`` and :math:`nsr = \sigma_t / \alpha_t`. The paper prints the norm
without the division by the number of inliers; with it, as in the public code, a layer's share does not grow with its
area. The training loss is its mean over the *whole* batch, gated samples counting as zero, since the gate stands inside
the expectation.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lpl_lightning.arguments import at_least
from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.losses.outliers import inlier_mask, odd_kernel

__all__ = [
    "DepthWeights",
    "LatentPerceptualLoss",
    "Statistics",
    "depth_weight",
    "masked_distance",
    "standardize",
]

Statistics = Literal["predicted", "predicted_detached", "target", "separate", "none"]
DepthWeights = Literal["inverse_upscale", "exponential", "uniform"]


def standardize(
    predicted: Tensor, target: Tensor, statistics: Statistics = "predicted", eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    r"""Standardize two feature maps per sample and channel, :math:`\phi' = (\phi - \mu) / \sqrt{var + eps}`.

    Args:
        predicted: Features of the estimate (B, C, H, W).
        target: Features of the clean latent, likewise.
        statistics: Whose mean and variance over positions serve for both: the ``predicted`` map's (the paper's
            choice), the same without gradient through them, the ``target``'s; or each map's own (``separate``), or
            ``none``.
        eps: Added to the variance.

    Returns:
        Both maps, standardized, in the order of the arguments.
    """

    def moments(features: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(features, dim=(-2, -1), correction=0, keepdim=True)
        return mean, (variance + eps).rsqrt()

    match statistics:
        case "none":
            return predicted, target
        case "separate":
            (mean_p, scale_p), (mean_t, scale_t) = moments(predicted), moments(target)
            return (predicted - mean_p) * scale_p, (target - mean_t) * scale_t
        case "predicted":
            mean, scale = moments(predicted)
        case "predicted_detached":
            mean, scale = moments(predicted.detach())
        case "target":
            mean, scale = moments(target)
    return (predicted - mean) * scale, (target - mean) * scale


def masked_distance(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared difference, averaged over each channel's inliers and then over channels.

    Args:
        predicted: (B, C, H, W).
        target: (B, C, H, W).
        mask: (B, C, H, W) of ones and zeros; a channel without any one contributes zero.

    Returns:
        (B,).
    """
    squares = (predicted - target).square()
    if mask is None:
        return squares.mean(dim=(1, 2, 3))
    return ((squares * mask).sum(dim=(2, 3)) / mask.sum(dim=(2, 3)).clamp_min(1)).mean(dim=1)


def depth_weight(upscale: float, kind: DepthWeights = "inverse_upscale") -> float:
    r"""Weight :math:`\omega_l` of a layer whose resolution is ``upscale`` :math:`= r_l / r_1` times the first's.

    ``inverse_upscale`` is :math:`r_1 / r_l`, as the paper's prose and the public code have it; ``exponential`` is
    :math:`2^{-r_l / r_1}`, as the paper's formula is printed; ``uniform`` is 1.
    """
    match kind:
        case "inverse_upscale":
            return 1.0 / upscale
        case "exponential":
            return float(2.0**-upscale)
        case "uniform":
            return 1.0


class LatentPerceptualLoss(nn.Module):
    """Distance between a clean latent and its estimate, seen by the autoencoder's decoder (eq. 3).

    It can serve any loop: ``loss + 3.0 * lpl(z0_hat, z0, noise_to_signal).mean()``. The decoder runs only for the
    samples that pass the gate, and only as deep as asked.

    Args:
        autoencoder: The frozen autoencoder whose decoder looks at the latents.
        depth: How many of the decoder's feature maps are compared, shallow to deep; at most all there are. The
            paper's 5 are all those of its decoders (a middle block and four others).
        threshold: tau: samples with sigma / alpha above it are gated. About 3 for latents of 32 x 32 (256 px, f = 8)
            and 6 for 64 x 64: in proportion to the latents' side.
        statistics: See ``standardize``.
        depth_weights: See ``depth_weight``.
        mask_outliers: Whether outliers are left out of maps finer than twice the first.
        dilation: Window that dilates the map of inliers, in positions of a map as large as the image; coarser maps
            have smaller ones, to the nearest odd number.
        erosion: Window that erodes it afterwards, likewise.
        eps: Added to the variances.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        depth: int = 5,
        threshold: float = 3.0,
        statistics: Statistics = "predicted",
        depth_weights: DepthWeights = "inverse_upscale",
        mask_outliers: bool = True,
        dilation: int = 3,
        erosion: int = 5,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        at_least(1, depth=depth)
        if threshold <= 0:
            raise ValueError(f"`threshold` must be a noise-to-signal ratio above 0, got {threshold}.")
        for name, value, choices in (
            ("statistics", statistics, get_args(Statistics)),
            ("depth_weights", depth_weights, get_args(DepthWeights)),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        for name, size in (("dilation", dilation), ("erosion", erosion)):
            if size < 1 or size % 2 == 0:
                raise ValueError(f"`{name}` must be an odd number of positions, got {size}.")
        self.autoencoder = autoencoder
        self.depth = min(depth, len(autoencoder.feature_names))
        self.threshold = threshold
        self.statistics: Statistics = statistics
        self.depth_weights: DepthWeights = depth_weights
        self.mask_outliers = mask_outliers
        self.dilation = dilation
        self.erosion = erosion
        self.eps = eps

    def passes(self, noise_to_signal: Tensor) -> Tensor:
        """Which samples pass the gate: (B,) bool, on the device of ``noise_to_signal`` (B,)."""
        return noise_to_signal <= self.threshold

    def forward(self, z0_hat: Tensor, z0: Tensor, noise_to_signal: Tensor | None = None) -> Tensor:
        """Compute the loss of each sample.

        Args:
            z0_hat: Estimates of the clean latents (B, C, h, w), scaled as the autoencoder's ``encode`` gives them.
            z0: Clean latents, likewise; no gradient flows to them.
            noise_to_signal: (B,) sigma / alpha of each sample; without it all pass the gate. On the CPU it costs no
                wait for an accelerator.

        Returns:
            (B,) float32, zero where gated, always connected to ``z0_hat``.
        """
        if z0_hat.shape != z0.shape or z0_hat.ndim != 4:
            raise ValueError(
                f"`z0_hat` and `z0` must both be (B, C, h, w), got {tuple(z0_hat.shape)} and {tuple(z0.shape)}."
            )
        if noise_to_signal is not None and noise_to_signal.shape != z0.shape[:1]:
            raise ValueError(
                f"`noise_to_signal` must hold one ratio for each of the {len(z0)} samples, "
                f"got shape {tuple(noise_to_signal.shape)}."
            )
        # An empty sum: zero, connected to the graph, and with a zero gradient even where z0_hat is not finite.
        losses = z0_hat.float().flatten(1)[:, :0].sum(dim=1)
        if noise_to_signal is None:
            return losses + self._ungated(z0_hat, z0)
        kept = self.passes(noise_to_signal.detach()).nonzero().squeeze(1).to(z0.device, non_blocking=True)
        if len(kept) == 0:
            return losses
        return losses.index_add(0, kept, self._ungated(z0_hat[kept], z0[kept]))

    def _ungated(self, z0_hat: Tensor, z0: Tensor) -> Tensor:
        """Loss (B,) of samples that have passed the gate."""
        with torch.no_grad():
            targets = self.autoencoder.features(z0, self.depth)
        predictions = self.autoencoder.features(z0_hat, self.depth)
        first, image_side = predictions[0].shape[-1], z0.shape[-1] * self.autoencoder.downscale
        total = z0_hat.new_zeros(len(z0), dtype=torch.float32)
        with torch.autocast(z0.device.type, enabled=False):
            for predicted, target in zip(predictions, targets, strict=True):
                side = predicted.shape[-1]
                mask = None
                if self.mask_outliers and side > 2 * first:
                    mask = inlier_mask(
                        predicted.detach().float(),
                        dilation=odd_kernel(self.dilation, side / image_side),
                        erosion=odd_kernel(self.erosion, side / image_side),
                    )
                distance = masked_distance(
                    *standardize(predicted.float(), target.float(), self.statistics, self.eps), mask
                )
                total = total + depth_weight(side / first, self.depth_weights) * distance
        return total
