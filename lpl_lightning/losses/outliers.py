r"""The outlier mask :math:`\rho` of the Latent Perceptual Loss (Berrada et al., ICLR 2025, eq. 3).

Decoders of latent diffusion models grow a few activations so large that they would be most of a squared distance.
A position is an *inlier* of its channel where the value lies within the channel's 2% and 98% quantiles, widened by
twice the channel's standard deviation; the binary map of inliers is then dilated and eroded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["inlier_mask", "odd_kernel"]


def odd_kernel(size: int, scale: float) -> int:
    """The odd number nearest to ``size * scale``, at least 1: a kernel that covers the same share of a smaller map."""
    return max(1, 2 * round((size * scale - 1) / 2) + 1)


@torch.no_grad()
def inlier_mask(
    features: Tensor,
    quantile: float = 0.02,
    widening: float = 2.0,
    dilation: int = 3,
    erosion: int = 5,
) -> Tensor:
    """Mark the inliers of each channel of each sample.

    With y sorted over the n positions of a channel, :math:`q_{lo}` and :math:`q_{hi}` are its
    ``int(quantile * n)``-th and ``int((1 - quantile) * n)``-th smallest values (at least the first), and inliers
    are strictly between :math:`q_{lo} - w s` and :math:`q_{hi} + w s`, with s its standard deviation. A channel
    with a single value has no outliers.

    Args:
        features: (B, C, *positions), with one to three axes of positions.
        quantile: Share of positions below the lower and above the upper quantile.
        widening: w, in standard deviations.
        dilation: Side of the window that dilates the map of inliers, the same along every axis; odd.
        erosion: Side of the window that erodes it afterwards; odd.

    Returns:
        (B, C, *positions) in the features' dtype: 1 for inliers, 0 for outliers. No gradient flows through it.
    """
    flat = features.flatten(2)
    positions = flat.shape[-1]
    low = flat.kthvalue(max(1, int(quantile * positions)), dim=-1, keepdim=True).values
    high = flat.kthvalue(max(1, int((1 - quantile) * positions)), dim=-1, keepdim=True).values
    std = flat.std(dim=-1, keepdim=True) if positions > 1 else torch.zeros_like(low)
    inlier = (flat > low - widening * std) & (flat < high + widening * std) | (std == 0)
    mask = inlier.reshape(features.shape).to(features.dtype)
    max_pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[features.ndim - 2]
    if dilation > 1:
        mask = max_pool(mask, dilation, stride=1, padding=dilation // 2)
    if erosion > 1:
        mask = -max_pool(-mask, erosion, stride=1, padding=erosion // 2)
    return mask
