r"""Feature maps of an estimate against those of the clean latent: the sum over l in eq. 3, of samples past the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lpl_lightning.losses.checks import note_constant_channels
from lpl_lightning.losses.distance import (
    DepthWeights,
    channel_normalize,
    depth_weight,
    masked_distance,
    standardize,
    variance_ratio,
)
from lpl_lightning.losses.gate import latent_side
from lpl_lightning.losses.map_gradient import distance_gradient, standardized_squares_gradient
from lpl_lightning.losses.options import LossOptions
from lpl_lightning.losses.outliers import odd_kernel, outliers
from lpl_lightning.losses.subset import Crop

__all__ = ["Compared", "Comparison", "Part"]

FINEST = 8
"""The windows of the outlier mask are meant for maps so many times as fine as the latent, as the paper's finest are."""


@dataclass(frozen=True)
class Part:
    """What is compared of some samples.

    Attributes:
        samples: Which of those past the gate, (n,) int64 on the CPU; None is all.
        names: Stages whose maps are looked at, shallow to deep.
        probabilities: With which each compared map is computed at all.
        crop: Part of the latents; None is all of them.
    """

    samples: Tensor | None
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    crop: Crop | None = None


@dataclass(frozen=True)
class Compared:
    """Of n samples, by compared map or place; maps that were not computed count as zero and as finite.

    Attributes:
        parts: (maps, n) each map's part of the loss, with its weight.
        finite: (places, n) bool, by ``Comparison.places``.
        seen: (maps, n) bool, which maps were computed.
        inliers: (maps, n) mean of the mask; 1 without one.
        variance_ratio: (maps, n) see ``Diagnostics``.
    """

    parts: Tensor
    finite: Tensor
    seen: Tensor
    inliers: Tensor
    variance_ratio: Tensor

    def of(self, count: int) -> Compared:
        """The first samples."""
        return Compared(*(getattr(self, field.name)[:, :count] for field in fields(self)))

    def put(self, rows: Tensor, found: Compared) -> None:
        """Write what was found of other samples (m,) in their place."""
        for field in fields(self):
            getattr(self, field.name)[:, rows] = getattr(found, field.name)


class Comparison:
    """Compares lists of feature maps.

    Args:
        options: How.
        compared: Names of the stages whose maps are compared.
        stages: Names of all the decoder's stages.
        video: Whether latents have frames first.
        dtype: Of what is found, at least float32.
    """

    def __init__(
        self,
        options: LossOptions,
        compared: Sequence[str],
        stages: Sequence[str],
        video: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.options = options
        self.compared = tuple(compared)
        self.stages = tuple(stages)
        self.video = video
        self.dtype = dtype
        # The first map too, whose side the others' are measured by.
        self.names = tuple(dict.fromkeys((self.stages[0], *self.compared)))
        self._noted: set[str] = set()

    @property
    def places(self) -> tuple[str, ...]:
        """Where a value that is not finite may arise, in the order that values pass them."""
        found = ["the estimate z0_hat", "the clean latent z0"]
        for name in self.names:
            before = self.stages[max(0, self.stages.index(name) - 1)]
            if before in self.names:
                found.append(f"the decoder's stage {name!r}")
            else:
                after = self.names[self.names.index(name) - 1]
                found.append(f"the decoder's stages after {after!r}, up to {name!r}")
        return (*found, "the gradient of the decoder")

    def __call__(
        self,
        part: Part,
        latents: tuple[Tensor, Tensor],
        predictions: list[Tensor],
        targets: list[Tensor],
        diagnose: bool = False,
        with_gradients: bool = False,
    ) -> tuple[Compared, list[Tensor | None]]:
        """Compare the maps of some samples.

        Args:
            part: What they are of.
            latents: The estimates and the clean latents (n, C, *positions) that the maps were made from.
            predictions: Maps of the estimates by ``part.names``.
            targets: Maps of the clean latents, likewise. The list is emptied.
            diagnose: Whether to look at masks and variances.
            with_gradients: Whether to give the maps' gradients; else parts are connected to ``predictions``.

        Returns:
            What was found, and by map the gradient of the sum of ``parts``; None where it is not compared.
        """
        first = self._side(predictions[0], latents[0].ndim)
        places = [_finite(latent) for latent in latents]
        parts: list[Tensor] = []
        seen: list[tuple[Tensor, Tensor]] = []
        gradients: list[Tensor | None] = []
        for name, predicted in zip(part.names, predictions, strict=True):
            target = targets.pop(0)
            if name not in self.compared:
                places.append(_finite(predicted))
                gradients.append(None)
                continue
            predicted, target = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (predicted, target))
            index, side = len(parts), self._side(predicted, latents[0].ndim)
            if (
                name not in self._noted
                and self.options.normalization == "standardize"
                and self.options.statistics != "none"
            ):
                note_constant_channels(name, target, self.options.eps, self.options.relative_eps)
            self._noted.add(name)
            left_out = self._outliers(index, predicted, target, side, first, part.crop)
            inner = () if part.crop is None else part.crop.inner_of(predicted.shape[2:])
            factor = self._weight(index, side / first) / part.probabilities[index]
            if part.crop is not None:
                factor *= part.crop.weight(self.options.position_reduction)
            if with_gradients:
                found, gradient = self._distance_gradient(predicted.detach(), target, left_out, inner)
                gradients.append(gradient.mul_(factor))
            else:
                found = self._distance(predicted, target, left_out, inner)
            parts.append(factor * found)
            places.append(_finite(parts[-1]))
            if diagnose:
                seen.append((_inliers(predicted, left_out), variance_ratio(predicted.detach(), target)))
        count = len(latents[0])
        total = self.nothing(count, parts[0])
        finite, diagnosed = total.finite, len(seen)
        finite[: len(places)] = torch.stack(places)
        total.seen[: len(parts)] = True
        if diagnose:
            for i in range(diagnosed):
                total.inliers[i], total.variance_ratio[i] = seen[i]
        rest = [torch.zeros_like(parts[0])] * (len(self.compared) - len(parts))
        return replace(total, parts=torch.stack([*parts, *rest])), gradients

    def nothing(self, count: int, like: Tensor) -> Compared:
        """Of samples none of whose maps were computed.

        Args:
            count: How many.
            like: Of the device they are on.
        """
        maps, device = (len(self.compared), count), like.device
        return Compared(
            parts=torch.zeros(maps, dtype=self.dtype, device=device),
            finite=torch.ones(len(self.places), count, dtype=torch.bool, device=device),
            seen=torch.zeros(maps, dtype=torch.bool, device=device),
            inliers=torch.ones(maps, dtype=self.dtype, device=device),
            variance_ratio=torch.ones(maps, dtype=self.dtype, device=device),
        )

    def _distance(self, predicted: Tensor, target: Tensor, left_out: Tensor | None, inner: tuple[slice, ...]) -> Tensor:
        options = self.options
        mask = None if left_out is None else (~left_out).to(predicted.dtype)
        if mask is not None and options.mask_before_normalization:
            target = target * mask
        if options.normalization == "standardize":
            predicted, target = standardize(predicted, target, options.statistics, options.eps, options.relative_eps)
        else:
            predicted, target = channel_normalize(predicted, target, options.statistics, options.eps)
        region = (slice(None), slice(None), *inner)
        mask = None if mask is None else mask[region]
        kind = (options.distance, options.huber_delta, options.position_reduction)
        return masked_distance(predicted[region], target[region], mask, *kind)

    def _distance_gradient(
        self, predicted: Tensor, target: Tensor, left_out: Tensor | None, inner: tuple[slice, ...]
    ) -> tuple[Tensor, Tensor]:
        options = self.options
        closed = options.distance == "mse" and options.normalization == "standardize"
        if closed and options.statistics != "separate" and not options.mask_before_normalization:
            of_statistics = (options.statistics, options.eps, options.relative_eps)
            return standardized_squares_gradient(
                predicted, target, left_out, *of_statistics, options.position_reduction, inner
            )
        return distance_gradient(lambda leaf: self._distance(leaf, target, left_out, inner), predicted)

    def _outliers(
        self, index: int, predicted: Tensor, target: Tensor, side: float, first: float, crop: Crop | None
    ) -> Tensor | None:
        options = self.options
        if not options.mask_outliers or side / first <= options.mask_upscale:
            return None
        # Windows are meant for whole maps.
        enlarged = 1.0 if crop is None else crop.enlarged
        return outliers(
            (predicted if options.mask_source == "predicted" else target).detach(),
            options.quantile,
            options.widening,
            self._kernel("dilation", index, side * enlarged, first * enlarged),
            self._kernel("erosion", index, side * enlarged, first * enlarged),
        )

    def _weight(self, index: int, upscale: float) -> float:
        weight: DepthWeights | float = self.options.of_map("depth_weights", index, len(self.compared))
        omega = depth_weight(upscale, weight) if isinstance(weight, str) else weight
        return omega / len(self.compared) if self.options.depth_reduction == "mean" else omega

    def _kernel(self, name: str, index: int, side: float, first: float) -> int:
        """Side of a window on a map of this side, the first map's being ``first``."""
        size: int = self.options.of_map(name, index, len(self.compared))
        if isinstance(getattr(self.options, name), tuple):
            return size
        # As many times finer as the maps that the sizes are meant for are than a latent.
        reference = FINEST * (self.options.reference_side or first)
        return odd_kernel(size, side / reference)

    def _side(self, maps: Tensor, ndim: int) -> float:
        """Side of feature maps, in positions; those with fewer axes than latents count as squares or cubes."""
        if maps.ndim != ndim:
            return float(maps[0, 0].numel() ** (1 / (ndim - 2)))
        return latent_side(maps, self.video)


def _finite(values: Tensor) -> Tensor:
    """(n, ...) to (n,) bool."""
    return values.detach().isfinite().reshape(len(values), -1).all(dim=1)


def _inliers(predicted: Tensor, left_out: Tensor | None) -> Tensor:
    if left_out is None:
        return predicted.new_ones(len(predicted))
    return 1 - left_out.flatten(1).to(predicted.dtype).mean(dim=1)
