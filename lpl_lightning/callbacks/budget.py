"""Keeps a loss to a share of the time of a training step, by the best random subset of it that fits.

The first steps, which train with the exact loss, are timed; then what each compared map costs and how much its gradient
varies is measured on samples of the last one (``losses/measurement.py``), and the probabilities with the least variance
for the time allowed are found. Few samples take more than their share of the time of many, so steps with these
probabilities are timed too, and they are corrected, up to twice. The last are kept to the end of the run, checkpoints
included.

Of the steps that are timed together, those that take more than three times as long as the median one, the loss apart,
do not count, as long as they are a fifth of them at most: while images are sampled for a grid, a checkpoint is saved,
or another callback works now and then, the time is not a step's. What is so in more of them is how the run goes, such
as a loader that is waited for at every second batch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lpl_lightning.arguments import at_least
from lpl_lightning.losses import LatentPerceptualLoss, Subset
from lpl_lightning.losses.measurement import (
    LEAST,
    MapCosts,
    best_probabilities,
    measure_maps,
    second_moment,
    synchronize,
)

__all__ = ["Budget"]

SLOW = 3.0
"""So many times the median is a step's time, without the loss, that does not count."""
FEW = 0.2
"""The largest part of the steps that does not."""


@dataclass(frozen=True)
class Found:
    """What probabilities are corrected by.

    Attributes:
        costs: Of the maps.
        exact: Seconds of the exact loss of a batch.
        part: The part of the loss, by ``costs``, that the probabilities ask for.
        corrections: How many may follow.
    """

    costs: MapCosts
    exact: float
    part: float
    corrections: int


class Budget:
    """Finds the probabilities of a ``Subset`` for a share of time.

    Args:
        share: Time of the loss over time of the whole step, above 0 and below 1; None keeps the loss exact.
        warmup: Steps before the first that is timed, each time.
        steps: Steps that are timed with the exact loss.
        thinned: Steps that are timed with a random part of it before each correction and after it: so many at a time,
            until the mean time of the loss has a standard error of a tenth of it.
        most: Steps that are timed so at most.
        corrections: How many there are at most; a time within a tenth of the share ends them.
    """

    def __init__(
        self,
        share: float | None,
        warmup: int = 3,
        steps: int = 10,
        thinned: int = 40,
        most: int = 400,
        corrections: int = 2,
    ) -> None:
        if share is not None and (isinstance(share, bool | str) or not 0 < share < 1):
            raise ValueError(f"`budget` must lie between 0 and 1, a share of the time of a step, got {share}.")
        at_least(1, steps=steps, thinned=thinned, most=most)
        at_least(0, warmup=warmup, corrections=corrections)
        self.share = share
        self.warmup = warmup
        self.steps = steps
        self.thinned = thinned
        self.most = most
        self.corrections = corrections
        self._given = Subset()  # which a loss has from here, and not by itself
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.keep: list[float] | None = None
        self._found: Found | None = None
        self._steps = 0
        self._times: list[tuple[float, float]] = []  # seconds of the loss and of the whole step, of each
        self._term: float | None = None  # seconds of the loss in the step at hand
        self._started = 0.0
        self._last: float | None = None
        self._latents: tuple[Tensor, Tensor] | None = None

    @property
    def measuring(self) -> bool:
        """Whether the probabilities are still to be found, or corrected."""
        return self.share is not None and (self.keep is None or self._found is not None)

    def apply(self, loss: LatentPerceptualLoss) -> None:
        """Give a loss what was found.

        Raises:
            ValueError: It has a subset of its own.
        """
        if self.share is not None and loss.subset not in (Subset(), self._given):
            raise ValueError(
                "`budget` finds a subset of the loss, which has one by `subset` already. Leave one of them out."
            )
        if self.share is not None and not loss.execution.streamed:
            raise ValueError("`budget` times the loss with its gradient, which needs `execution` with streamed: true.")
        if self.keep is not None and len(self.keep) != len(loss.compared):
            self.keep, self._found = None, None  # of another loss: measured anew
        if self.share is not None:
            self._give(loss)

    def _give(self, loss: LatentPerceptualLoss) -> None:
        loss.subset = self._given = Subset(keep=self.keep or 1.0)

    def start_term(self, device: torch.device) -> None:
        """The loss of a step, or of a part of it, is about to be computed."""
        self._started = synchronize(device)

    def end_term(self, z0_hat: Tensor, z0: Tensor, passed: Tensor | None) -> None:
        """It was computed; a step's times add up.

        Args:
            z0_hat: Estimates (B, C, *positions).
            z0: Clean latents, likewise.
            passed: (B,) bool, which samples passed the gate; None is all.
        """
        self._term = (self._term or 0.0) + synchronize(z0.device) - self._started
        if self._found is not None:
            return
        if passed is not None:
            rows = passed.to(z0.device)
            z0_hat, z0 = z0_hat[rows], z0[rows]
        if len(z0):
            self._latents = (z0_hat.detach()[:4].clone(), z0.detach()[:4].clone())

    def interrupt(self) -> None:
        """Something that is no training step comes between two of them."""
        self._last = self._term = None

    def end_batch(self, trainer: pl.Trainer, device: torch.device, loss: LatentPerceptualLoss) -> None:
        """A batch was trained on; after the last step that is timed, find or correct the probabilities.

        Batches that are accumulated are one step: all that comes with the update is in the time of its last alone.

        Args:
            trainer: Averages over its processes.
            device: Of the module.
            loss: Is given them.
        """
        if trainer.fit_loop._should_accumulate():
            return
        now, last, term = synchronize(device), self._last, self._term
        self._last, self._term = now, None
        if term is None:  # a step without the loss
            self.interrupt()
        if last is None or term is None:
            return
        self._steps += 1
        if self._steps <= self.warmup:
            return
        timed = self._steps - self.warmup
        self._times.append((term, now - last))
        if self._found is not None:
            done = self._correct(trainer, loss, self._found, timed)
        elif done := timed == self.steps:
            self._find(trainer, loss)
        if not done:
            return
        self._latents = None
        self._steps, self._times = self.warmup if self.keep is None else 0, []
        self.interrupt()  # what was just computed took time, too

    def _find(self, trainer: pl.Trainer, loss: LatentPerceptualLoss) -> None:
        assert self.share is not None
        maps = len(loss.compared)
        costs = None if self._latents is None else measure_maps(loss, *self._latents)
        # One row of numbers from each process: its times, whether it had samples, and what it measured on them.
        measured = [0.0] * (2 * maps + 1) if costs is None else [1.0, *costs.seconds, *costs.moments]
        counted, seconds, _, whole, found, *of_maps = _total(trainer, [*_sums(self._times), *measured])
        if not found or not seconds:
            rank_zero_info(
                f"LPL is still exact: in the {self.steps} steps timed for `budget` no sample passed the gate; the "
                "next ones are timed."
            )
            return
        costs = MapCosts(tuple(of_maps[:maps]), tuple(of_maps[maps:]))
        if not sum(costs.moments):  # no gradient to tell maps apart by
            costs = MapCosts(costs.seconds, costs.seconds)
        allowed = self._allowed(seconds, whole) / seconds
        self.keep = best_probabilities(costs, allowed)
        self._give(loss)
        if allowed < 1:
            self._found = Found(costs, seconds / counted, max(LEAST, allowed), self.corrections)
        self._say(costs, seconds / whole, allowed)

    def _allowed(self, seconds: float, whole: float) -> float:
        """Time t of the loss with t = share (rest + t)."""
        assert self.share is not None
        return self.share / (1 - self.share) * (whole - seconds)

    def _correct(self, trainer: pl.Trainer, loss: LatentPerceptualLoss, found: Found, timed: int) -> bool:
        """Correct the probabilities, or say that they stay, unless more steps have to be timed."""
        assert self.share is not None
        if timed % self.thinned and timed != self.most:
            return False
        counted, *totals = _total(trainer, _sums(self._times))
        seconds, squares, whole = (total / counted for total in totals)
        error = math.sqrt(max(0.0, squares - seconds**2) / counted)
        if timed < self.most and (not seconds or error > 0.1 * seconds):
            return False
        taken = f"With these LPL took {seconds / whole:.0%} of a step, and may take {self.share:.0%}"
        if not found.corrections or abs(seconds / whole - self.share) <= 0.1 * self.share:
            self._found = None
            rank_zero_info(f"{taken}: they stay.")
            return True
        # Time lies on a line through what this part took and what all of it took, if that was more, else through zero.
        slope = (found.exact - seconds) / (1 - found.part)
        slope = slope if slope > 0 else seconds / found.part
        part = found.part + (self._allowed(seconds, whole) - seconds) / slope
        part = min((1 + found.part) / 2, max(found.part / 2, part))
        self.keep = best_probabilities(found.costs, part)
        self._give(loss)
        self._found = replace(found, part=part, corrections=found.corrections - 1)
        rank_zero_info(
            f"{taken}: from now on its maps are computed for {self._said()}. The second moment of its gradient is "
            f"{second_moment(found.costs, self.keep):.3g} times the exact one's."
        )
        return True

    def _said(self) -> str:
        assert self.keep is not None
        return f"a random {', '.join(f'{q:.0%}' for q in self.keep)} of the samples past the gate"

    def _say(self, costs: MapCosts, share: float, allowed: float) -> None:
        assert self.keep is not None
        if allowed >= 1:
            rank_zero_info(f"LPL stays exact: it takes {share:.0%} of a step, and may take {self.share:.0%}.")
            return
        less = 1 / max(LEAST, allowed)
        rank_zero_info(
            f"LPL takes {share:.0%} of a step and may take {self.share:.0%}: from now on its maps are computed, "
            f"shallow to deep, for {self._said()}. The second moment of its gradient is "
            f"{second_moment(costs, self.keep):.3g} times the exact one's; with all maps for a random {1 / less:.0%} "
            f"of the samples, or at one step in {less:.3g}, it would be {less:.3g} times. Next, these are timed."
        )

    def state_dict(self) -> dict[str, Any]:
        """What was found, and what its correction goes by."""
        return {"keep": self.keep, "share": self.share, "found": self._found and asdict(self._found)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was found, if it was for the same share; else it is found anew."""
        if state["share"] == self.share:
            self.keep = state["keep"]
            found = state.get("found")
            self._found = found and Found(**{**found, "costs": MapCosts(**found["costs"])})


def _sums(times: list[tuple[float, float]]) -> list[float]:
    """How many steps count, the seconds of the loss in them, the squares of these, and the seconds of all of the steps.

    Args:
        times: Of each step the seconds of the loss, and of all of it.
    """
    limit = SLOW * median(whole - term for term, whole in times)
    usual = [(term, whole) for term, whole in times if whole - term <= limit]
    counted = usual if len(times) - len(usual) <= FEW * len(times) else times
    rows = [(1.0, term, term**2, whole) for term, whole in counted]
    return [sum(column) for column in zip(*rows, strict=True)]


def _total(trainer: pl.Trainer, numbers: list[float]) -> list[float]:
    """Sums over processes."""
    total = trainer.strategy.reduce(torch.tensor(numbers, device=trainer.strategy.root_device), reduce_op="sum")
    assert isinstance(total, Tensor)
    return total.tolist()
