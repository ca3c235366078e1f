r"""Radially averaged power spectra of sets of images, and how those of generated images differ from real ones.

Of an image of N x N pixels with luminance y the Fourier coefficients and their average over rings are

.. math::
    c_k = \frac{1}{N^2} \sum_x y_x e^{-2 \pi i k \cdot x / N}, \qquad
    P_b = \frac{1}{n_b} \sum_{k: \, round(|k|) = b} |c_k|^2

with k in cycles per image, so that a ring is one cycle wide and b = 0 holds the mean alone. By Parseval's theorem
:math:`\sum_b n_b P_b = \frac{1}{N^2} \sum_x y_x^2` over all rings. Rings end at Nyquist, b = N // 2; the corners of the
square of frequencies, beyond it, are whole for no direction and are left out unless asked for. A band-limited image has
the same P at every resolution above its band; white noise of variance v has P = v / N^2.

Luminance is Rec. 601's, 0.299 R + 0.587 G + 0.114 B of the values as they are (gamma-encoded), as image files become
grey. All is float64, for which MPS devices have no arithmetic.

Berrada et al. (ICLR 2025) show the differences in log power (their Figure 4) and the error of the average power
spectrum (Figure 5), and do not say how either is normalized: ``Spectra`` says what is taken here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpl_lightning.arguments import at_least
from lpl_lightning.metrics.gaussian import DoubleMetric
from lpl_lightning.metrics.preparation import check_images
from lpl_lightning.metrics.two_sets import TwoSetsMetric

__all__ = ["PowerSpectrum", "Spectra", "check_size", "radial_counts", "radial_power"]

LUMINANCE = (0.299, 0.587, 0.114)

FLOOR = 1e-16
"""Least power that a logarithm is taken of: under a hundred thousandth of what rounding to 8 bits puts at any frequency
of 512 px images, (2 / 255)^2 / 12 / 512^2 = 2e-11. Flat images have less beside their mean."""

PAPER_BANDS = (75 / 256, 150 / 256)
"""Where the paper parts low from middle and middle from high frequencies, as fractions of Nyquist (256 at 512 px)."""


class Spectra(NamedTuple):
    """Spectra of the real and the generated set, (bins,) each, float64, by frequency; logarithms are natural.

    Attributes:
        frequency: 0 .. N // 2, in cycles per image.
        real_power: Mean over the real images of their power P.
        generated_power: Mean over the generated ones.
        real_log_power: Mean over the real images of log P, to which images of little contrast add as much as others.
        generated_log_power: Mean over the generated ones.
        log_difference: ``generated_log_power - real_log_power`` (Figure 4): above 0 where generated images have more.
        error: ``|generated_power - real_power| / real_power`` (Figure 5), relative, since P falls by many decades.
        mean_absolute_log_difference: Scalar: mean of ``|log_difference|`` over all frequencies but 0, whose power is
            the square of the mean luminance and vanishes for mid-grey.
    """

    frequency: Tensor
    real_power: Tensor
    generated_power: Tensor
    real_log_power: Tensor
    generated_log_power: Tensor
    log_difference: Tensor
    error: Tensor
    mean_absolute_log_difference: Tensor

    def band_errors(self, edges: Sequence[float] = PAPER_BANDS) -> Tensor:
        """Mean of ``error`` over bands of frequencies, lowest band first.

        Args:
            edges: Where bands part, rising, as fractions of Nyquist in (0, 1). A band holds its upper edge; the first
                begins above 0.

        Returns:
            (len(edges) + 1,); NaN for a band without a frequency in it.

        Raises:
            ValueError: Edges that do not rise within (0, 1).
        """
        bounds = (0.0, *edges, 1.0)
        if any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"`edges` must rise within (0, 1), as fractions of Nyquist, got {tuple(edges)}.")
        share = self.frequency / self.frequency[-1]
        return torch.stack([self.error[(share > low) & (share <= high)].mean() for low, high in pairwise(bounds)])


def check_size(images: Tensor, image_size: int) -> None:
    """Refuse images of another size than that of their set.

    Args:
        images: (B, C, H, W).
        image_size: H and W as they must be.

    Raises:
        ValueError: They are others.
    """
    if tuple(images.shape[2:]) != (image_size, image_size):
        raise ValueError(
            f"`images` must be of {image_size} x {image_size} pixels, as `image_size` says, got "
            f"{tuple(images.shape[2:])}. Resize or crop all images of both sets alike."
        )


def _rings(side: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Rings of the coefficients of a real transform, (side, side // 2 + 1), and how many each stands for, 1 or 2."""
    # Integers, which torch.fft.fftfreq(side, 1 / side) does not always give: 49.00000000000001 of side 98.
    columns = torch.arange(side // 2 + 1, device=device)
    rows = (torch.arange(side, device=device) + side // 2) % side - side // 2  # 0, 1, ..., -2, -1
    rings = torch.hypot(rows[:, None].double(), columns.double()).round().long()
    mirrored = (columns > 0) & (2 * columns != side)  # the conjugate is left out of a real transform
    return rings, (1 + mirrored.double()).expand(side, -1)


def _binned(values: Tensor, rings: Tensor, bins: int) -> Tensor:
    """Sums over rings: (B, H, W) to (B, bins)."""
    sums = values.new_zeros(len(values), int(rings.max()) + 1)
    return sums.index_add(1, rings.flatten(), values.flatten(1))[:, :bins]


def _bins(side: int, corners: bool) -> int:
    return (round((2 * (side // 2) ** 2) ** 0.5) if corners else side // 2) + 1


def radial_counts(side: int, corners: bool = False) -> Tensor:
    """How many frequencies :math:`n_b` are in each ring: (bins,), float64.

    Args:
        side: Side of the images in pixels.
        corners: Whether rings beyond Nyquist are among them.
    """
    at_least(2, side=side)
    rings, counts = _rings(side)
    return _binned(counts[None], rings, _bins(side, corners))[0]


def radial_power(images: Tensor, window: bool = False, corners: bool = False) -> Tensor:
    """Radially averaged power spectrum P of each image, as the module says.

    Args:
        images: (B, 3, N, N), or (B, 1, N, N) for luminance itself. In [-1, 1] by convention; P goes with the square of
            the values.
        window: Whether to take the mean off, multiply by a Hann window of unit mean square and put the mean back. It
            keeps the jump between opposite borders, whose power falls as slowly as 1 / b^2, from covering what high
            frequencies hold; the power of stationary images stays what it is, and Parseval's sum is that of the
            windowed luminance.
        corners: Whether to go on beyond Nyquist, so that the sum in Parseval's theorem is whole.

    Returns:
        (B, bins), float64: N // 2 + 1 bins, or those to the corner at N / sqrt(2).

    Raises:
        ValueError: Images that are not square, of another shape or not finite.
    """
    side = images.shape[-1]
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != side or side < 2:
        raise ValueError(
            f"`images` must be square, (B, 3 or 1, N, N) of 2 x 2 pixels or more, got {tuple(images.shape)}: rings of "
            "cycles per image are for squares. Crop them."
        )
    if not images.isfinite().all():
        bad = (~images.isfinite()).flatten(1).any(1)
        raise ValueError(f"`images` must be finite, got NaN or infinite values in {int(bad.sum())} of {len(images)}.")
    luminance = images.double()
    if images.shape[1] == 3:
        luminance = (luminance * luminance.new_tensor(LUMINANCE).view(3, 1, 1)).sum(1, keepdim=True)
    luminance = luminance[:, 0]  # (B, N, N)
    if window:
        hann = torch.hann_window(side, dtype=torch.float64, device=images.device)
        hann = hann / hann.square().mean().sqrt()
        mean = luminance.mean((1, 2), keepdim=True)
        luminance = mean + (luminance - mean) * hann * hann[:, None]
    rings, counts = _rings(side, images.device)
    power = torch.fft.rfft2(luminance, norm="forward").abs().square()  # (B, N, N // 2 + 1)
    bins = _bins(side, corners)
    return _binned(power * counts, rings, bins) / _binned(counts[None], rings, bins)


class PowerSpectrum(TwoSetsMetric, DoubleMetric):
    """Mean power spectra of real and generated images, and how they differ: ``compute`` gives ``Spectra``.

    States are sums in float64, of a size that depends on the images' side alone.

    Args:
        image_size: Side of the images, in pixels.
        window: Whether images are windowed, as in ``radial_power``.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, image_size: int, window: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(2, image_size=image_size)
        self.image_size = image_size
        self.window = window
        for kind in ("real", "generated"):
            for name in ("power", "log_power"):
                zeros = torch.zeros(image_size // 2 + 1, dtype=torch.float64)
                self.add_state(f"{kind}_{name}", zeros, dist_reduce_fx="sum")
            self.add_state(f"{kind}_count", torch.tensor(0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Add images to a set.

        Args:
            images: (B, 3, image_size, image_size) in [-1, 1].
            real: To which set: the real ones, or the generated ones.

        Raises:
            ValueError: Images of another shape, or not finite, or outside [-1, 1].
        """
        check_images(images)
        check_size(images, self.image_size)
        power = radial_power(images, self.window)
        kind = "real" if real else "generated"
        getattr(self, f"{kind}_power").add_(power.sum(0))
        getattr(self, f"{kind}_log_power").add_(power.clamp(min=FLOOR).log().sum(0))
        getattr(self, f"{kind}_count").add_(len(images))

    def compute(self) -> Spectra:
        """The spectra of all images so far.

        Raises:
            ValueError: One of the sets is empty.
        """
        means = {}
        for kind in ("real", "generated"):
            count = getattr(self, f"{kind}_count")
            if count == 0:
                raise ValueError(f"`PowerSpectrum` must have images of both sets, got no {kind} ones: call `update`.")
            for name in ("power", "log_power"):
                means[f"{kind}_{name}"] = getattr(self, f"{kind}_{name}") / count
        difference = means["generated_log_power"] - means["real_log_power"]
        off = (means["generated_power"] - means["real_power"]).abs()
        return Spectra(
            frequency=torch.arange(len(difference), dtype=torch.float64, device=difference.device),
            log_difference=difference,
            error=off / means["real_power"].clamp(min=FLOOR),
            mean_absolute_log_difference=difference[1:].abs().mean(),
            **means,
        )
