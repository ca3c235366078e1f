r"""A distance between sets of images that needs no weights: the Frechet Wavelet Distance.

.. math::
    FWD = \frac{1}{P} \sum_p \|\mu_p - \mu'_p\|^2
    + tr\left(\Sigma_p + \Sigma'_p - 2 (\Sigma_p \Sigma'_p)^{1/2}\right)

over the P = 4^n packets of a wavelet packet transform of level n (Veeramacheneni et al., ICLR 2025), where the mean and
the covariance (over N - 1) of a packet are those of its D = 3 h w coefficients, (h, w) = (H, W) / 2^n, over a set.

Why this one, out of the two distances without weights at hand: it compares what a radial spectrum does, band by band,
and also where in the image and in which colour the power is, and how these go together; a radial spectrum is the same
for an image and for noise of its power. It is published, with values to compare with; the other would be ours alone.
It sees texture, colour and layout, and no objects: it stands beside FID, and does not replace it.

Wavelets are Haar's: orthonormal, without borders to choose for. The transform is then a Walsh-Hadamard transform of
blocks of 2^n x 2^n pixels. The authors' code (pytorchfwd) takes level 4 and, unless told otherwise, sym5, whose
values are others. Its images lie in [0, 1], so that values here are those of (x + 1) / 2 for images x in [-1, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lpl_lightning.arguments import at_least
from lpl_lightning.metrics.frechet import frechet_distance
from lpl_lightning.metrics.gaussian import DoubleMetric
from lpl_lightning.metrics.preparation import check_images
from lpl_lightning.metrics.spectrum import check_size
from lpl_lightning.metrics.two_sets import TwoSetsMetric

__all__ = ["FrechetWaveletDistance", "WaveletFeatures"]


class WaveletFeatures(nn.Module):
    """Haar wavelet packets of images.

    Packet p = p_y 2^n + p_x holds what the low (0) or high (1) pass gave at each level down the columns, by the bits
    of p_y, and along the rows, by those of p_x; the first level is the lowest bit. Packet 0 is the image, smaller.

    Args:
        level: How often images are split, n.
    """

    filters: Tensor

    def __init__(self, level: int = 4) -> None:
        super().__init__()
        at_least(1, level=level)
        self.level = level
        filters = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(level):
            filters = torch.kron(filters, filters.new_tensor([[1.0, 1.0], [1.0, -1.0]]))
        self.register_buffer("filters", filters, persistent=False)  # 1 and -1: exact in any precision

    def forward(self, images: Tensor) -> Tensor:
        """Transform images; the sum of squares stays what it is.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W divisible by 2^n.

        Returns:
            (B, P, D), float64, the coefficients of a packet in the order of (3, h, w).

        Raises:
            ValueError: Images of another shape, not finite, or outside [-1, 1].
        """
        check_images(images)
        side = 2**self.level
        if images.shape[2] % side or images.shape[3] % side:
            raise ValueError(
                f"`images` must have sides divisible by {side} for `level`={self.level}, got "
                f"{tuple(images.shape[2:])}. Crop or resize them, or take a lower level."
            )
        filters = self.filters.double()
        blocks = images.double().unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, 3, h, y, w, x)
        packets: Tensor = torch.einsum("bchywx,qx->bchywq", blocks, filters)
        packets = torch.einsum("bchywq,py->bpqchw", packets, filters) / side
        return packets.flatten(3).flatten(1, 2)


class FrechetWaveletDistance(TwoSetsMetric, DoubleMetric):
    """Frechet Wavelet Distance of generated from real images, as the module says: 0 for equal sets, unbounded.

    States are sums in float64: for either set P D + P D^2 = 4^n (D + D^2) numbers, whatever the number of images. A
    level more divides D, the number of images it takes, by 4, and the states nearly so:

    ======== ===== === ============
    side, px level D   states, both
    ======== ===== === ============
    64       4     48  10 MB
    128      4     192 150 MB
    256      4     768 2.4 GB
    256      6     48  150 MB
    512      7     48  620 MB
    ======== ===== === ============

    torchmetrics keeps as much again to reset them to, and ranks gather each other's. Values of different levels or
    sides are not comparable.

    Args:
        image_size: Side of the images, in pixels.
        level: Level n of the packets.
        allow_few: Allow fewer images in a set than a packet has coefficients. The distance is then biased by their
            number, and compares with none of another number.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: 2^n does not divide the side.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(self, image_size: int, level: int = 4, allow_few: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features = WaveletFeatures(level)
        at_least(1, image_size=image_size)
        if image_size % 2**level:
            deepest = (image_size & -image_size).bit_length() - 1  # how often 2 divides it
            remedy = f"`level` may be {deepest} at most" if deepest else "no level will do: crop to an even side"
            raise ValueError(
                f"`image_size` must be divisible by {2**level} for `level`={level}, got {image_size}: {remedy}."
            )
        self.image_size, self.allow_few = image_size, allow_few
        packets, dim = 4**level, 3 * (image_size // 2**level) ** 2
        for kind in ("real", "generated"):
            self.add_state(f"{kind}_sum", torch.zeros(packets, dim, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_outer", torch.zeros(packets, dim, dim, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_count", torch.tensor(0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Add images to a set.

        Args:
            images: (B, 3, image_size, image_size) in [-1, 1].
            real: To which set: the real ones, or the generated ones.

        Raises:
            ValueError: Images of another shape, not finite, or outside [-1, 1].
        """
        check_images(images)
        check_size(images, self.image_size)
        packets = self.features(images).transpose(0, 1)  # (P, B, D)
        kind = "real" if real else "generated"
        # In place: the states may be the largest tensors around.
        getattr(self, f"{kind}_sum").add_(packets.sum(1))
        getattr(self, f"{kind}_outer").baddbmm_(packets.mT, packets)
        getattr(self, f"{kind}_count").add_(len(images))

    def _check_count(self, kind: str) -> None:
        count, dim = int(getattr(self, f"{kind}_count")), getattr(self, f"{kind}_sum").shape[1]
        least = 2 if self.allow_few else max(2, dim)
        if count < least:
            raise ValueError(
                f"`FrechetWaveletDistance` must have {least} {kind} images or more for packets of {dim} coefficients, "
                f"got {count}. Give more, or a higher `level`, each of which divides the coefficients by 4, or set "
                "`allow_few`, which makes the distance depend on the number of images."
            )

    def _statistics(self, kind: str, packet: int) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of a packet of a set: one at a time, since all are as large as the states."""
        count = getattr(self, f"{kind}_count")
        mean = getattr(self, f"{kind}_sum")[packet] / count
        scatter = getattr(self, f"{kind}_outer")[packet] - count * torch.outer(mean, mean)
        return mean, scatter / (count - 1)

    def compute(self) -> Tensor:
        """The distance of all images so far, a scalar in float64.

        Raises:
            ValueError: A set has fewer images than a packet has coefficients, and ``allow_few`` is not set.
        """
        self._check_count("real")
        self._check_count("generated")
        distances = [
            frechet_distance(*self._statistics("real", packet), *self._statistics("generated", packet))
            for packet in range(4**self.features.level)
        ]
        return torch.stack(distances).mean() / 4  # of images in [0, 1]
