r"""Normalized distances between feature maps (B, C, *positions), of any number of spatial axes.

Everything here is a pure function of the two maps; gradients flow where nothing else is said.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "DepthWeights",
    "Distance",
    "Normalization",
    "Statistics",
    "channel_normalize",
    "depth_weight",
    "masked_distance",
    "standardize",
    "variance",
    "variance_ratio",
]

Statistics = Literal["predicted", "predicted_detached", "target", "separate", "none"]
Normalization = Literal["standardize", "channel_norm"]
Distance = Literal["mse", "l1", "huber"]
DepthWeights = Literal["inverse_upscale", "exponential", "uniform"]


def _positions(features: Tensor) -> tuple[int, ...]:
    return tuple(range(2, features.ndim))


def variance(features: Tensor) -> Tensor:
    """Variance of each sample and channel over positions, (B, C, *positions) to (B, C), without correction."""
    return torch.var(features, dim=_positions(features), correction=0)


def variance_ratio(predicted: Tensor, target: Tensor) -> Tensor:
    """Variance over positions of a map (B, C, *positions) over the other's, the geometric mean over channels: (B,)."""
    ratio = variance(predicted).add(1e-12).log() - variance(target).add(1e-12).log()
    return ratio.mean(dim=1).exp()


def standardize(
    predicted: Tensor,
    target: Tensor,
    statistics: Statistics = "predicted",
    eps: float = 1e-5,
    relative_eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Standardize two feature maps per sample and channel, :math:`\phi' = (\phi - \mu) / \sqrt{var + eps}`.

    Args:
        predicted: Features of the estimate (B, C, *positions).
        target: Features of the clean latent, likewise.
        statistics: Whose mean and variance over positions serve for both: the ``predicted`` map's (the paper's
            choice), the same without gradient through them, the ``target``'s; or each map's own (``separate``), or
            ``none``. Measured on photos (losses/README.md): with a floor for the variances, ``predicted`` brings
            samples nearest to real sharpness, and the estimates' contrast nearest to the truth's, at 2 % more diffusion
            loss; the others change both less. Without a floor, with a decoder some of whose channels hardly vary,
            ``predicted`` pulls four times as hard as the diffusion loss.
        eps: Added to the variance.
        relative_eps: Added likewise, times the mean of the map's variances over channels: a floor that follows the
            map's scale, for decoders some of whose channels hardly vary.

    Returns:
        Both maps, standardized, in the order of the arguments.
    """

    def moments(features: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(features, dim=_positions(features), correction=0, keepdim=True)
        floor = eps + relative_eps * var.mean(dim=1, keepdim=True) if relative_eps else eps
        return mean, (var + floor).rsqrt()

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


def channel_normalize(
    predicted: Tensor, target: Tensor, statistics: Statistics = "separate", eps: float = 1e-10
) -> tuple[Tensor, Tensor]:
    r"""Divide each position's vector of channels by its length, :math:`\phi' = \phi / (\|\phi\|_2 + eps)`.

    The normalization of LPIPS and of the public LPL example, whose ``default`` is ``separate``, whose ``shared`` is
    ``target`` and whose ``batch`` is ``none``, that is nothing at all.

    Args:
        predicted: Features of the estimate (B, C, *positions).
        target: Features of the clean latent, likewise.
        statistics: Whose lengths serve; see ``standardize``.
        eps: Added to the lengths.

    Returns:
        Both maps, in the order of the arguments.
    """

    def length(features: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        return norm + eps

    match statistics:
        case "none":
            return predicted, target
        case "separate":
            return predicted / length(predicted), target / length(target)
        case "predicted":
            both = length(predicted)
        case "predicted_detached":
            both = length(predicted.detach())
        case "target":
            both = length(target)
    return predicted / both, target / both


def masked_distance(
    predicted: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    distance: Distance = "mse",
    huber_delta: float = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Distance of each sample: over each channel's inliers, then averaged over channels.

    Args:
        predicted: (B, C, *positions).
        target: Likewise.
        mask: Likewise, of ones and zeros; a channel without any one contributes zero.
        distance: Of single values: ``mse`` the square of the difference, ``l1`` its absolute value, ``huber`` half
            its square up to ``huber_delta`` and linear beyond.
        huber_delta: Where ``huber`` becomes linear, in the units of the maps.
        reduction: Over a channel's inliers: their mean, or their sum, as the norm of eq. 3 is printed.

    Returns:
        (B,).
    """
    match distance:
        case "mse":
            errors = F.mse_loss(predicted, target, reduction="none")
        case "l1":
            errors = F.l1_loss(predicted, target, reduction="none")
        case "huber":
            errors = F.huber_loss(predicted, target, reduction="none", delta=huber_delta)
    positions = _positions(errors)
    if mask is not None:
        errors = errors * mask
    sums = errors.sum(dim=positions)
    if reduction == "sum":
        return sums.mean(dim=1)
    count = errors[0, 0].numel() if mask is None else mask.sum(dim=positions).clamp_min(1)
    return (sums / count).mean(dim=1)


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
