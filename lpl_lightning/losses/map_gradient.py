r"""A feature map's distance together with its gradient at the estimate's map.

With the statistics of one map for both, standardization drops out of the difference but for its scale,

.. math::
    D = \frac{1}{C} \sum_c \frac{S_c}{N_c (v_c + \epsilon)}, \quad S_c = \sum_i \rho_{c,i} (\hat\phi - \phi)_{c,i}^2,

with the variance :math:`v_c` of that map, and :math:`N_c` inliers. So

.. math::
    \frac{\partial D}{\partial \hat\phi} = 2 \frac{\partial D}{\partial S} \rho (\hat\phi - \phi)
        + \frac{2}{n} \frac{\partial D}{\partial v} (\hat\phi - \mu),

the last part where the statistics are the estimate's and attached. That takes two maps, where a graph of the same
operations holds every map on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lpl_lightning.losses.distance import Statistics

__all__ = ["distance_gradient", "standardized_squares_gradient"]


def distance_gradient(distance: Callable[[Tensor], Tensor], predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Any distance and its gradient, by a graph.

    Args:
        distance: From the estimate's features (B, C, *positions) to (B,), of each sample by itself.
        predicted: Those features.

    Returns:
        (B,) and (B, C, *positions), without a graph.
    """
    leaf = predicted.detach().requires_grad_()
    with torch.enable_grad():
        found = distance(leaf)
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
    return found.detach(), gradient


@torch.no_grad()
def standardized_squares_gradient(
    predicted: Tensor,
    target: Tensor,
    outliers: Tensor | None,
    statistics: Statistics,
    eps: float,
    relative_eps: float,
    reduction: Literal["mean", "sum"],
    inner: Sequence[slice] = (),
) -> tuple[Tensor, Tensor]:
    """Mean squared distance of standardized maps, in closed form.

    Args:
        predicted: Features of the estimate (B, C, *positions).
        target: Features of the clean latent, likewise.
        outliers: (B, C, *positions) bool, what is left out.
        statistics: As in ``standardize``, but not ``separate``.
        eps: As in ``standardize``.
        relative_eps: As in ``standardize``.
        reduction: As in ``masked_distance``.
        inner: Positions, by axis, that are compared; all by default. Statistics are of all.

    Returns:
        The distance (B,) and its gradient (B, C, *positions).
    """
    axes = tuple(range(2, predicted.ndim))
    positions = predicted[0, 0].numel()
    region = (slice(None), slice(None), *inner)
    # Sums of products rather than `var`, a norm, `square` or a count of bools: those are
    # much slower on a CPU where channels lie last in memory.
    centered = variance = None
    if statistics != "none":
        reference = target if statistics == "target" else predicted
        centered = reference - reference.mean(axes, keepdim=True)
        variance = ((centered * centered).sum(axes) / positions).requires_grad_()
    difference = predicted[region] - target[region]
    count: Tensor | int = difference[0, 0].numel()
    if outliers is not None:
        difference.masked_fill_(outliers[region], 0)
        count = (count - outliers[region].to(difference.dtype).sum(axes)).clamp_min(1)
    squares = (difference * difference).sum(axes).requires_grad_()
    with torch.enable_grad():
        found = squares if reduction == "sum" else squares / count
        if variance is not None:
            floor = eps + relative_eps * variance.mean(dim=1, keepdim=True) if relative_eps else eps
            found = found / (variance + floor)
        found = found.mean(dim=1)
        by_squares, *by_variance = torch.autograd.grad(
            found.sum(), [squares] if variance is None else [squares, variance]
        )
    shape = (*predicted.shape[:2], *[1] * len(axes))
    difference.mul_(2 * by_squares.view(shape))
    if statistics != "predicted" or centered is None:
        if not inner:
            return found.detach(), difference
        gradient = torch.zeros_like(predicted)
        gradient[region] = difference
        return found.detach(), gradient
    gradient = centered.mul_(by_variance[0].view(shape) * (2 / positions))
    gradient[region] += difference
    return found.detach(), gradient
