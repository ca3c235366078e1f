"""How far a training is."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

__all__ = ["StepCount"]


class StepCount:
    """Counts the batches, or groups of batches, that weights were updated on.

    With one optimizer that is the trainer's ``global_step``, which counts each optimizer's updates. Of several, each
    may step in some batches alone, such as a discriminator's that begins late: those in which any did are counted.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._steps: int | None = None  # of several optimizers
        self._global_step: int | None = 0  # up to which they were counted
        self._loaded: dict[str, Any] = {}

    def prepare(self) -> None:
        """Training is set up: a state that was loaded by now is an evaluation's, and not gone on from."""
        self._loaded = {}

    def start(self, trainer: pl.Trainer) -> None:
        """Training begins, or goes on."""
        if self._loaded:
            self._steps, self._global_step = (self._loaded.get(name) for name in ("optimizer_steps", "counted_to"))
            self._loaded = {}
        optimizers = len(trainer.optimizers)
        if optimizers < 2:
            self._steps = None
        elif self._steps is None:  # a checkpoint of a version that did not count: as if all had stepped equally often
            self._steps = trainer.global_step // optimizers
        elif self._global_step is not None and trainer.global_step > self._global_step:
            self._steps += 1  # it was saved within a batch, after its updates
        self._global_step = trainer.global_step

    def end_batch(self, trainer: pl.Trainer) -> None:
        """A batch was trained on."""
        if self._steps is not None and trainer.global_step > (self._global_step or 0):
            self._steps, self._global_step = self._steps + 1, trainer.global_step

    def steps(self, trainer: pl.Trainer) -> int:
        """How many there were; within a batch, without it."""
        return trainer.global_step if self._steps is None else self._steps

    def state_dict(self) -> dict[str, Any]:
        """What was counted of several optimizers; nothing of one."""
        return {} if self._steps is None else {"optimizer_steps": self._steps, "counted_to": self._global_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, if it is training that does."""
        self._loaded = dict(state)
