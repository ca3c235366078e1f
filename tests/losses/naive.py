"""Equation 3 written out in loops over samples, maps, channels and positions, with every option."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from test_outliers import naive_mask
from torch import Tensor

PAPER: dict[str, Any] = {
    "normalization": "standardize",
    "statistics": "predicted",
    "eps": 1e-5,
    "relative_eps": 0.0,
    "distance": "mse",
    "huber_delta": 1.0,
    "depth_weights": "inverse_upscale",
    "mask_outliers": True,
    "mask_source": "predicted",
    "mask_upscale": 2.0,
    "quantile": 0.02,
    "widening": 2.0,
    "kernels": {},
    "mask_before_normalization": False,
    "position_reduction": "mean",
    "depth_reduction": "sum",
}
"""The paper's choices. ``kernels`` gives (dilation, erosion) by a map's upscaling over the first."""


def naive_loss(predictions: list[Tensor], targets: list[Tensor], first_side: int, **options: Any) -> Tensor:
    """Loss (B,) of feature maps (B, C, *positions), differentiable in ``predictions``."""
    o = PAPER | options
    losses = []
    for b in range(len(predictions[0])):
        total = torch.zeros((), dtype=predictions[0].dtype)
        for index, (of_hat, of_z0) in enumerate(zip(predictions, targets, strict=True)):
            phi_hat, phi = of_hat[b], of_z0[b]
            ratio = phi.shape[-1] / first_side
            weights = o["depth_weights"]
            if isinstance(weights, str):
                omega = {"inverse_upscale": 1 / ratio, "exponential": 2**-ratio, "uniform": 1.0}[weights]
            else:
                omega = weights[index]
            rho = torch.ones_like(phi)
            if o["mask_outliers"] and ratio > o["mask_upscale"]:
                source = phi_hat.detach() if o["mask_source"] == "predicted" else phi
                rho = naive_mask(source[None], o["quantile"], o["widening"], *o["kernels"][int(ratio)])[0]
            if o["mask_before_normalization"]:
                phi = phi * rho
            total = total + omega * _of_map(phi_hat, phi, rho, o)
        losses.append(total / len(predictions) if o["depth_reduction"] == "mean" else total)
    return torch.stack(losses)


def _of_map(phi_hat: Tensor, phi: Tensor, rho: Tensor, o: dict[str, Any]) -> Tensor:
    """(C, *positions) each."""
    of_channels = []
    for c in range(len(phi)):
        kept, summed = 0, torch.zeros((), dtype=phi.dtype)
        floors = [o["eps"] + o["relative_eps"] * _mean_variance(features) for features in (phi_hat, phi)]
        moments = _moments(phi_hat[c], floors[0]), _moments(phi[c], floors[1])
        for position in itertools.product(*(range(n) for n in phi.shape[1:])):
            if rho[(c, *position)] == 0:
                continue
            kept += 1
            if o["normalization"] == "channel_norm":
                whose = _length(phi_hat, position, o["eps"]), _length(phi, position, o["eps"])
            else:
                whose = moments
            of_a, of_b = _chosen(whose, o["statistics"])
            at = (c, *position)
            difference = (phi_hat[at] - of_a[0]) / of_a[1] - (phi[at] - of_b[0]) / of_b[1]
            size = difference.abs()
            match o["distance"]:
                case "mse":
                    summed = summed + difference**2
                case "l1":
                    summed = summed + size
                case _:
                    delta = o["huber_delta"]
                    summed = summed + (difference**2 / 2 if size <= delta else delta * (size - delta / 2))
        of_channels.append(summed if o["position_reduction"] == "sum" else summed / max(kept, 1))
    return torch.stack(of_channels).sum() / len(phi)


Pair = tuple[Tensor, Tensor]


def _mean_variance(features: Tensor) -> Tensor:
    """Mean over channels of their variances."""
    variances = [((channel - channel.mean()) ** 2).mean() for channel in features]
    return torch.stack(variances).sum() / len(variances)


def _moments(channel: Tensor, eps: Tensor) -> Pair:
    """Mean and standard deviation of one channel."""
    values = list(channel.flatten())
    mean = torch.stack(values).sum() / len(values)
    return mean, (torch.stack([(v - mean) ** 2 for v in values]).sum() / len(values) + eps) ** 0.5


def _length(features: Tensor, position: tuple[int, ...], eps: float) -> Pair:
    """Zero, and the length of the vector of channels at one position."""
    squares = torch.stack([features[(k, *position)] ** 2 for k in range(len(features))])
    return torch.zeros((), dtype=features.dtype), squares.sum() ** 0.5 + eps


def _chosen(whose: tuple[Pair, Pair], statistics: str) -> tuple[Pair, Pair]:
    """What is taken off and divided by, for the predicted and for the target map."""
    predicted, target = whose
    match statistics:
        case "none":
            nothing = (torch.zeros_like(target[0]), torch.ones_like(target[0]))
            return nothing, nothing
        case "separate":
            return predicted, target
        case "target":
            return target, target
        case "predicted":
            return predicted, predicted
        case _:
            detached = (predicted[0].detach(), predicted[1].detach())
            return detached, detached
