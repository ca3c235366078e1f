"""The memorization-informed Frechet distance, MiFID on FID's network.

By Bai et al. (2021), "On training sample memorization: Lessons from benchmarking generative modeling with a large-scale
competition", eq. 2 and 3: a Frechet distance over the mean distance m of generated images to their nearest real one,

    d^2 / m  where m < 0.1,  else d^2;     m = mean_x min_y (1 - |cos(x, y)|).

torchmetrics takes the mean over real images, of each to its nearest generated one: what is here it gives for exchanged
sets. It holds the cosines of all pairs at once: 20 GB for 50,000 images a set, three times over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_lightning.metrics.frechet import frechet_distance
from lpl_lightning.metrics.pair_distances import slices

__all__ = ["memorization_distance", "nearest_cosine_distance"]

FAR = 0.1
"""A mean distance of this or more is no memorization."""

PAIRS = 2**24
"""Cosines that are held at once: 128 MB."""


def nearest_cosine_distance(generated: Tensor, real: Tensor) -> Tensor:
    """The mean distance m of generated images to their nearest real one.

    Args:
        generated: Features (N, D).
        real: (M, D)

    Returns:
        Scalar, float64, from 0 to 1.
    """
    x, y = (torch.nn.functional.normalize(features.double()) for features in (generated, real))
    nearest = [(x[rows] @ y.T).abs_().amax(dim=1) for rows in slices(len(x), max(1, PAIRS // len(y)))]
    return (1 - torch.cat(nearest)).clamp(min=0).mean()


def memorization_distance(generated: Tensor, real: Tensor) -> Tensor:
    """The Frechet distance of two sets of features, larger where the one repeats the other.

    Args:
        generated: Features (N, D), N of 2 or more.
        real: (M, D), likewise.

    Returns:
        Scalar, float64.
    """
    moments = [
        part
        for rows in (generated.double(), real.double())
        for part in (rows.mean(dim=0), torch.cov(rows.T, correction=1))
    ]
    distance, nearest = frechet_distance(*moments), nearest_cosine_distance(generated, real)
    return distance / (nearest + 1e-14) if nearest < FAR else distance
