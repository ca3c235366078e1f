r"""Random subsets of what the Latent Perceptual Loss compares, with its expectation kept.

Let the l-th of the compared maps be computed for a sample with the probability :math:`q_l`, and with it all that are
shallower, which the decoder passes on its way: :math:`q_1 \ge q_2 \ge \dots`. With one number u between 0 and 1 for
each sample, that is where :math:`u < q_l`. Then

.. math:: \hat L = \sum_l \frac{[u < q_l]}{q_l} L_l, \quad \mathbb{E}_u \hat L = \sum_l L_l = L.

One q for all maps is a random part of the samples; falling ones see shallow maps, which cost little, more often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lpl_lightning.arguments import at_least, read_settings

__all__ = ["Crop", "Subset", "depths_of", "draw_crop"]


@dataclass(frozen=True)
class Subset:
    """What part of the loss is computed at a time, drawn anew at each call.

    Attributes:
        keep: Probability, above 0 and at most 1, that a sample which passed the gate is compared; or a list with one
            for each compared map, shallow to deep, none above the one before. What is computed weighs 1 / probability
            more, so that the expectation is the exact loss. Of n samples ``floor(n q)`` or one more are drawn; where
            each goes by a number of its own, as in ``LatentDiffusionModule``, nq on average.
        crop: Side, in latent positions, of the random part of the latent that is compared, the same of all samples in
            a call; None compares all of it. Of an exact partition into such parts one is drawn, each as likely.
        halo: Positions around it that the decoder sees as well, fewer at the border of the latent. The expectation is
            the exact loss only where no feature depends on what lies further away and no statistics are taken over
            positions. Normalization layers, attention, standardized features and outlier masks do both, and no halo
            makes up for it: ``notebooks/cost.py crops`` measures by how much.
    """

    keep: float | Sequence[float] = 1.0
    crop: int | None = None
    halo: int = 4

    @classmethod
    def of(cls, value: object) -> Subset:
        """Read settings: by name or as they are; None for everything.

        Raises:
            ValueError: An unknown name, or a value out of its range.
        """
        found = read_settings(cls, "subset", value)
        found.check()
        return found

    # Not in __post_init__: a config's parser would take the error for another type's and say something else.
    def check(self) -> None:
        """Refuse values out of their range."""
        given = list(self.keep) if isinstance(self.keep, Sequence) and not isinstance(self.keep, str) else [self.keep]
        for name, value in (("crop", self.crop), ("halo", self.halo)):
            if (isinstance(value, bool) or not isinstance(value, int)) and not (name == "crop" and value is None):
                raise ValueError(f"`{name}` must be a whole number of positions, got {value!r}.")
        if not given or not all(isinstance(q, int | float) and not isinstance(q, bool) and 0 < q <= 1 for q in given):
            raise ValueError(
                f"`keep` must be a probability above 0 and at most 1, or a list of them, got {self.keep!r}."
            )
        if any(deeper > shallower for shallower, deeper in pairwise(given)):
            raise ValueError(
                f"`keep` must not rise from one map to the next, since deeper ones are made of them; got {given}."
            )
        if self.crop is not None:
            at_least(1, crop=self.crop)
        at_least(0, halo=self.halo)

    def probabilities(self, maps: int) -> list[float]:
        """The probability q of each compared map.

        Raises:
            ValueError: A list that is too short.
        """
        if isinstance(self.keep, int | float):
            return [float(self.keep)] * maps
        if len(self.keep) < maps:
            raise ValueError(
                f"`keep` as a list must have an entry for each compared feature map: expected {maps}, got "
                f"{len(self.keep)}. Add the missing ones, or compare fewer maps (`depth`)."
            )
        return [float(q) for q in self.keep[:maps]]


def depths_of(
    count: int, probabilities: Sequence[float], generator: torch.Generator | None = None, u: Tensor | None = None
) -> Tensor:
    """Draw how many maps are computed for each sample.

    Numbers u that are drawn here are evenly spaced from a random start and in random order: each is uniform, and as
    many samples as there should be, to one, are drawn.

    Args:
        count: Number of samples n.
        probabilities: q of each map, not rising.
        generator: Source of the draws, on the CPU.
        u: (n,) The samples' own numbers, uniform in (0, 1), on the CPU, in place of drawn ones.

    Returns:
        (n,) int64 on the CPU, each from 0 to the number of maps.
    """
    if all(q == 1 for q in probabilities):
        return torch.full((count,), len(probabilities))
    if u is None:
        order = torch.randperm(count, generator=generator)
        start = torch.rand((), generator=generator, dtype=torch.float64)
        u = (order + start) / max(1, count)
    return (u[:, None] < torch.tensor(probabilities, dtype=torch.float64)).sum(dim=1)


@dataclass(frozen=True)
class Crop:
    """Part of a latent.

    Attributes:
        window: Positions, by axis, that the decoder is given.
        inner: Positions of the window, by axis, that are compared.
        parts: Number of such parts that the latent is made of.
        share: Of the latent's positions.
        enlarged: Side of the latent over that of the window.
        frames: Whether the first axis is time.
    """

    window: tuple[slice, ...]
    inner: tuple[slice, ...]
    parts: int
    share: float
    enlarged: float
    frames: bool = False

    def weight(self, reduction: Literal["mean", "sum"]) -> float:
        """What the part's mean or sum over positions counts for, so that its expectation is the latent's."""
        return self.parts * (self.share if reduction == "mean" else 1.0)

    def inner_of(self, sides: Sequence[int]) -> tuple[slice, ...]:
        """Positions that are compared of a map of the window with these sides.

        Raises:
            ValueError: The map's positions are not whole multiples of the window's.
        """
        found: list[slice] = []
        for window, inner, side in zip(self.window, self.inner, sides, strict=False):
            length = window.stop - window.start
            if self.frames and not found and len(sides) == len(self.window):
                found.append(slice(0, side))  # time stays whole
                continue
            if len(sides) != len(self.window) or side % length:
                raise ValueError(
                    f"`crop` needs feature maps whose positions follow the latent's, so many to each; this decoder "
                    f"makes {tuple(sides)} of {length}. Leave `crop` out."
                )
            factor = side // length
            found.append(slice(inner.start * factor, inner.stop * factor))
        return tuple(found)


def draw_crop(
    sides: Sequence[int], crop: int, halo: int, frames: bool = False, generator: torch.Generator | None = None
) -> Crop | None:
    """Draw one part of an exact partition of a latent.

    Args:
        sides: The latent's sides, in positions.
        crop: Side of the parts; they are made equal to within one position.
        halo: Positions around a part that belong to its window. Windows have the same sides wherever they lie.
        frames: Whether the first axis is time, which stays whole.
        generator: Source of the draw, on the CPU.

    Returns:
        The part, or None where the window would be all there is.
    """
    window, inner, count, share = [], [], 1, 1.0
    for axis, side in enumerate(sides):
        parts = 1 if frames and axis == 0 else math.ceil(side / crop)
        k = int(torch.randint(parts, (), generator=generator))
        first, last = side * k // parts, side * (k + 1) // parts
        length = min(side, math.ceil(side / parts) + 2 * halo)
        start = min(max(0, first - halo), side - length)
        window.append(slice(start, start + length))
        inner.append(slice(first - start, last - start))
        count *= parts
        share *= (last - first) / side
    spans = [part.stop - part.start for part in window]
    if spans == list(sides):
        return None
    ratios = [side / span for side, span in zip(sides, spans, strict=True)][frames:]
    return Crop(tuple(window), tuple(inner), count, share, math.prod(ratios) ** (1 / len(ratios)), frames)
