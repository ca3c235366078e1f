"""Keeps a loss to a share of the time of a training step, by the best random subset of it that fits.

The first steps, which train with the exact loss, are timed; then what each compared map costs and how much its gradient
varies is measured on samples of the last one (``losses/measurement.py``), and the probabilities with the least variance
for the time allowed are kept to the end of the run, checkpoints included.
"""

from __future__ import annotations

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


class Budget:
    """Finds the probabilities of a ``Subset`` for a share of time.

    Args:
        share: Time of the loss over time of the whole step, above 0 and below 1; None keeps the loss exact.
        warmup: Steps before the first that is timed.
        steps: Steps that are timed.
    """

    def __init__(self, share: float | None, warmup: int = 3, steps: int = 10) -> None:
        if share is not None and (isinstance(share, bool | str) or not 0 < share < 1):
            raise ValueError(f"`budget` must lie between 0 and 1, a share of the time of a step, got {share}.")
        at_least(1, steps=steps)
        self.share = share
        self.warmup = warmup
        self.steps = steps
        self.keep: list[float] | None = None
        self._batches = 0
        self._sums = [0.0, 0.0]  # seconds of the loss, and of all of the steps
        self._term: float | None = None
        self._last: float | None = None
        self._latents: tuple[Tensor, Tensor] | None = None

    @property
    def measuring(self) -> bool:
        """Whether the probabilities are still to be found."""
        return self.share is not None and self.keep is None

    def apply(self, loss: LatentPerceptualLoss) -> None:
        """Give a loss what was found.

        Raises:
            ValueError: It has a subset of its own.
        """
        if self.share is not None and loss.subset not in (Subset(), Subset(keep=self.keep or 1.0)):
            raise ValueError(
                "`budget` finds a subset of the loss, which has one by `subset` already. Leave one of them out."
            )
        if self.share is not None and not loss.execution.streamed:
            raise ValueError("`budget` times the loss with its gradient, which needs `execution` with streamed: true.")
        if self.keep is not None and len(self.keep) != len(loss.compared):
            self.keep = None  # of another loss: measured anew
        if self.keep is not None:
            loss.subset = Subset(keep=self.keep)

    def start_term(self, device: torch.device) -> None:
        """The loss of a batch is about to be computed."""
        self._term = synchronize(device)

    def end_term(self, z0_hat: Tensor, z0: Tensor, passed: Tensor | None) -> None:
        """It was computed.

        Args:
            z0_hat: Estimates (B, C, *positions).
            z0: Clean latents, likewise.
            passed: (B,) bool, which samples passed the gate; None is all.
        """
        assert self._term is not None
        self._term = synchronize(z0.device) - self._term
        if passed is not None:
            rows = passed.to(z0.device)
            z0_hat, z0 = z0_hat[rows], z0[rows]
        if len(z0):
            self._latents = (z0_hat.detach()[:4].clone(), z0.detach()[:4].clone())

    def interrupt(self) -> None:
        """Something that is no training step comes between two of them."""
        self._last = None

    def end_batch(self, trainer: pl.Trainer, device: torch.device, loss: LatentPerceptualLoss) -> None:
        """A batch was trained on; after the last that is timed, find the probabilities.

        Args:
            trainer: Averages over its processes.
            device: Of the module.
            loss: Is given them.
        """
        now, last, term = synchronize(device), self._last, self._term
        self._last, self._term = now, None
        if term is None:  # a batch without the loss
            self.interrupt()
        if last is None or term is None:
            return
        self._batches += 1
        if self._batches <= self.warmup:
            return
        self._sums[0] += term
        self._sums[1] += now - last
        if self._batches == self.warmup + self.steps:
            self._find(trainer, loss)
            self._latents = None

    def _find(self, trainer: pl.Trainer, loss: LatentPerceptualLoss) -> None:
        assert self.share is not None
        maps = len(loss.compared)
        costs = None if self._latents is None else measure_maps(loss, *self._latents)
        # One row of numbers from each process: its times, whether it had samples, and what it measured on them.
        measured = [0.0] * (2 * maps + 1) if costs is None else [1.0, *costs.seconds, *costs.moments]
        numbers = torch.tensor([*self._sums, *measured], device=trainer.strategy.root_device)
        total = trainer.strategy.reduce(numbers, reduce_op="sum")
        assert isinstance(total, Tensor)
        seconds, whole, found, *of_maps = total.tolist()
        if not found or not seconds:
            rank_zero_info(
                f"LPL is still exact: in the {self.steps} batches timed for `budget` no sample passed the gate; the "
                "next ones are timed."
            )
            self._batches, self._sums = self.warmup, [0.0, 0.0]
            return
        costs = MapCosts(tuple(of_maps[:maps]), tuple(of_maps[maps:]))
        if not sum(costs.moments):  # no gradient to tell maps apart by
            costs = MapCosts(costs.seconds, costs.seconds)
        # Time t of the loss with t = share (rest + t).
        allowed = self.share / (1 - self.share) * (whole - seconds) / seconds
        self.keep = best_probabilities(costs, allowed)
        loss.subset = Subset(keep=self.keep)
        self._say(costs, seconds / whole, allowed)

    def _say(self, costs: MapCosts, share: float, allowed: float) -> None:
        assert self.keep is not None
        if allowed >= 1:
            rank_zero_info(f"LPL stays exact: it takes {share:.0%} of a step, and may take {self.share:.0%}.")
            return
        less = 1 / max(LEAST, allowed)
        rank_zero_info(
            f"LPL takes {share:.0%} of a step and may take {self.share:.0%}: from now on its maps are computed, "
            f"shallow to deep, for a random {', '.join(f'{q:.0%}' for q in self.keep)} of the samples past the gate. "
            f"The second moment of its gradient is {second_moment(costs, self.keep):.3g} times the exact one's; with "
            f"all maps for a random {1 / less:.0%} of the samples, or at one step in {less:.3g}, it would be "
            f"{less:.3g} times."
        )

    def state_dict(self) -> dict[str, Any]:
        """What was found."""
        return {"keep": self.keep, "share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was found, if it was for the same share; else it is found anew."""
        if state["share"] == self.share:
            self.keep = state["keep"]
