r"""The outlier mask :math:`\rho` of the Latent Perceptual Loss (Berrada et al., ICLR 2025, eq. 3).

Decoders of latent diffusion models grow a few activations so large that they would be most of a squared distance.
A position is an *inlier* of its channel where the value lies within the channel's 2% and 98% quantiles, widened by
twice the channel's standard deviation; the binary map of inliers is then dilated and eroded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["inlier_mask", "odd_kernel", "outliers"]

LARGE, PART = 2**24, 2**20
"""From how many bytes on a sample's map is sorted in parts, and theirs."""


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
    return (~outliers(features, quantile, widening, dilation, erosion)).to(features.dtype)


@torch.no_grad()
def outliers(features: Tensor, quantile: float, widening: float, dilation: int, erosion: int) -> Tensor:
    """The complement of ``inlier_mask``: (B, C, *positions), bool."""
    positions = features[0, 0].numel()
    if positions == 1:
        return torch.zeros_like(features, dtype=torch.bool)
    low, high = (max(1, int(share * positions)) for share in (quantile, 1 - quantile))
    lower, upper, std = (
        found.reshape(*features.shape[:2], *[1] * (features.ndim - 2)) for found in _statistics(features, low, high)
    )
    inlier = (features > lower - widening * std) & (features < upper + widening * std)
    # Where there is no spread, and where it is no number: what is not finite must not leave itself out.
    inlier |= ~(std > 0)
    return _dilate(_dilate(inlier, dilation).logical_not_(), erosion)


def _statistics(features: Tensor, low: int, high: int) -> Tensor:
    """The ``low``-th and ``high``-th smallest value and the standard deviation of each channel, (3, B, C)."""
    flat = features.detach().flatten(2)
    if features.device.type != "cpu" or features.dtype not in (torch.float32, torch.float64):
        return torch.stack([*(flat.kthvalue(k, dim=-1).values for k in (low, high)), _std(flat, -1)])
    # NumPy's partition, which uses vector instructions, is several times as fast as kthvalue on a CPU. Sample by
    # sample, because a matrix is transposed faster than a stack of them; large maps in parts that fit in a cache.
    bytes_of_row = flat.shape[2] * flat.element_size()
    whole = flat.shape[1] * bytes_of_row < LARGE
    found = flat.new_empty(3, *flat.shape[:2])
    for sample, results in zip(flat, found.unbind(1), strict=True):
        count = len(sample) if whole else max(1, PART // bytes_of_row)
        for part, result in zip(sample.split(count), results.split(count, dim=1), strict=True):
            rows = part.clone(memory_format=torch.contiguous_format)
            values = rows.numpy()
            values.partition(low - 1, axis=-1)
            result[0] = rows[:, low - 1]
            values[:, low - 1 :].partition(high - low, axis=-1)
            result[1] = rows[:, high - 1]
            if not whole:
                rows -= rows.mean(1, keepdim=True)
                result[2] = (torch.linalg.vecdot(rows, rows) / (rows.shape[1] - 1)).sqrt()
    if whole:
        found[2] = _std(flat, -1)
    return found


def _std(values: Tensor, axis: int) -> Tensor:
    """Not by ``std``, which is much slower where channels lie last in memory."""
    centered = values - values.mean(axis, keepdim=True)
    return (centered.mul_(centered).sum(axis) / (values.shape[axis] - 1)).sqrt()


def _dilate(marked: Tensor, size: int) -> Tensor:
    """Mark what lies within a window of this side, odd, around something marked, (B, C, *positions) bool.

    An axis at a time, and a window out of two of half its side: a few operations on bytes, and none on numbers.
    """
    for axis in range(2, marked.ndim):
        length, count = marked.shape[axis], 1
        # Windows that begin at a position.
        windows = F.pad(marked, [0, 0] * (marked.ndim - 1 - axis) + [size // 2] * 2)
        while 2 * count <= size:
            windows = windows.narrow(axis, 0, windows.shape[axis] - count) | windows.narrow(
                axis, count, windows.shape[axis] - count
            )
            count *= 2
        if count < size:
            windows = windows.narrow(axis, 0, length) | windows.narrow(axis, size - count, length)
        marked = windows
    return marked
