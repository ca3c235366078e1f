"""The Frechet distance between two sets of feature vectors.

Each is summed up as a Gaussian (Heusel et al., 2017, "GANs trained by a two time-scale update rule converge to a local
Nash equilibrium", eq. 6):

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^{1/2}).

On features of FID's Inception network it is FID. Its square is what everyone prints, and what is given here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lpl_lightning.arguments import at_least
from lpl_lightning.metrics.gaussian import DoubleMetric, Gaussian, add_features, empty_moments, gaussian, merge_moments
from lpl_lightning.metrics.reference import ReferenceStatistics
from lpl_lightning.metrics.two_sets import TwoSetsMetric

__all__ = ["FrechetDistance", "frechet_distance"]


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """The squared Frechet distance of two Gaussians.

    C_1 C_2 is similar to the symmetric A^T C_2 A with C_1 = A A^T, and with C_2 = B B^T the roots of the eigenvalues of
    that are the singular values of A^T B. These are exact to rounding where the covariances have low rank, as with
    fewer images than features, while the square root of C_1 C_2 itself is not.

    Args:
        mean1: (D,) finite.
        cov1: (D, D) symmetric, positive semidefinite.
        mean2: (D,)
        cov2: (D, D)

    Returns:
        Scalar, float64, 0 or more.

    Raises:
        ValueError: The shapes do not fit, or a value is not finite.
    """
    dim = len(mean1)
    for name, tensor, shape in (
        ("mean1", mean1, (dim,)),
        ("cov1", cov1, (dim, dim)),
        ("mean2", mean2, (dim,)),
        ("cov2", cov2, (dim, dim)),
    ):
        if tensor.shape != shape or not tensor.isfinite().all():
            problem = f"the shape {tuple(tensor.shape)}" if tensor.shape != shape else "values that are not finite"
            raise ValueError(f"`{name}` must be {shape}, finite, like `mean1` of {dim} features, got {problem}.")
    m1, c1, m2, c2 = (tensor.double() for tensor in (mean1, cov1, mean2, cov2))
    singular = torch.linalg.svdvals(_root(c1).T @ _root(c2))
    distance: Tensor = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * singular.sum()
    return distance.clamp(min=0)  # rounding may leave a little less than 0 of two that are equal


def _root(covariance: Tensor) -> Tensor:
    """A (D, R) with A A^T = C, R the rank: rounding noise has a root that is far larger than itself."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


class FrechetDistance(TwoSetsMetric, DoubleMetric):
    """The squared Frechet distance of features of generated images to those of real ones.

    Args:
        dim: Number D of features.
        reference: Statistics of the real images, in place of ``update(features, real=True)``.
        provenance: What the extractor of the features says of itself; ``reference`` must say the same.
        allow_few: Allow fewer images on a side than features. The covariance has no full rank then, and the value is
            biased by the number of images (Chong & Forsyth, 2020): it compares with none of another number.
        kwargs: Those of ``torchmetrics.Metric``.

    Raises:
        ValueError: The reference was made with another extractor.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    plot_lower_bound = 0.0
    real: Tensor
    generated: Tensor

    def __init__(
        self,
        dim: int,
        reference: ReferenceStatistics | None = None,
        provenance: Mapping[str, str | int | bool] | None = None,
        allow_few: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(1, dim=dim)
        if reference is not None:
            if provenance is None:
                raise ValueError("`provenance` must be given with `reference`: that of the extractor in use.")
            reference.check(provenance)
            if len(reference.mean) != dim:
                raise ValueError(f"`reference` must be of `dim`={dim} features, got {len(reference.mean)}.")
        self.dim, self.reference, self.allow_few = dim, reference, allow_few
        self.add_state("real", empty_moments(dim), dist_reduce_fx=merge_moments)
        self.add_state("generated", empty_moments(dim), dist_reduce_fx=merge_moments)

    def update(self, features: Tensor, real: bool) -> None:
        """Take a batch.

        Args:
            features: (B, ``dim``) floating point.
            real: Whether they are of real images.
        """
        if real and self.reference is not None:
            raise ValueError("`real` must be False: the real images are those of `reference`. Leave one of them out.")
        add_features(self.real if real else self.generated, features)

    def compute(self) -> Tensor:
        """The distance, float64.

        Raises:
            ValueError: A side has fewer images than features, and ``allow_few`` is not set, or fewer than two.
        """
        least = 2 if self.allow_few else max(2, self.dim)
        generated = gaussian(self.generated, "`generated`", least)
        real = self._real(least)
        mean, covariance = (tensor.to(self.generated) for tensor in (real.mean, real.covariance))
        return frechet_distance(mean, covariance, generated.mean, generated.covariance)

    def _real(self, least: int) -> Gaussian:
        if self.reference is None:
            return gaussian(self.real, "`real`", least)
        if self.reference.count < least:
            raise ValueError(
                f"`reference`: a covariance of {self.dim} features needs {least} images or more, got "
                f"{self.reference.count}. Make one of more images, or set `allow_few`."
            )
        return Gaussian(self.reference.mean, self.reference.covariance, self.reference.count)
