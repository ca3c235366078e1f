r"""Choice of the weight of a loss term by its share of the total.

With the means of the term, :math:`\bar L_{LPL}`, and of all else, :math:`\bar L`, over some steps, the weight
:math:`w = \frac{s}{1 - s} \bar L / \bar L_{LPL}` makes the share :math:`w \bar L_{LPL} / (\bar L + w \bar L_{LPL})`
equal s.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lpl_lightning.arguments import whole_at_least
from lpl_lightning.processes import process_sums

__all__ = ["WeightCalibration"]

_log = logging.getLogger(__name__)


class WeightCalibration:
    """Measures a term for some steps, in which it is not trained on, and then freezes its weight.

    Args:
        target_share: s, the share of the total loss that the term is to have, above 0 and below 1.
        steps: How many batches it is measured on.
    """

    def __init__(self, target_share: float = 0.2, steps: int = 100) -> None:
        if not 0 < target_share < 1:
            raise ValueError(f"`target_share` must lie between 0 and 1, got {target_share}.")
        whole_at_least(1, calibration_steps=steps)
        self.target_share = target_share
        self.steps = steps
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.weight: float | None = None
        self._sums: Tensor | None = None  # of the term, of all else, and of the batches counted
        self._batches = 0
        self._given = False  # whether a batch had a loss
        self.begin_step()

    def begin_step(self) -> None:
        """A training step begins."""
        self._term: Tensor | None = None

    def measure(self, term: Tensor) -> None:
        """Note the term's value, unweighted, in the training step at hand; of several in one, the sum.

        Args:
            term: A scalar; nothing waits for it.
        """
        self._term = term.detach() if self._term is None else self._term + term.detach()

    def finish_batch(self, outputs: Any, trainer: pl.Trainer) -> None:
        """Note the loss that the batch was trained on, without the term, and freeze the weight after the last.

        Args:
            outputs: What ``on_train_batch_end`` is given.
            trainer: Says how many batches it accumulates.

        Raises:
            ValueError: ``training_step`` returns no loss, or no sample passed the gate.
        """
        if self._term is None:
            return
        term, self._term = self._term, None
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        automatic = trainer.lightning_module.automatic_optimization
        if isinstance(loss, Tensor):
            self._given = True
        elif loss is None and automatic:
            loss = torch.full_like(term, math.nan)  # Lightning leaves out such a batch
        else:
            raise _no_loss(loss)
        # With automatic optimization Lightning gives the loss divided by the number of batches that it accumulates.
        divided = trainer.accumulate_grad_batches if automatic else 1
        found = torch.stack([term, loss.detach().to(term) * divided, torch.ones_like(term)]).double()
        # A batch that is not finite, or was left out, counts as none.
        found = torch.where(found.isfinite().all(), found, torch.zeros_like(found))
        # Each batch's over all processes, so that the first one's checkpoint holds what all have measured.
        found = process_sums(found).double()
        self._sums = found if self._sums is None else self._sums.to(found.device) + found
        self._batches += 1
        if self._batches < self.steps:
            return
        self._check_given()
        term_mean, rest = (self._sums[:2] / self._sums[2]).tolist()
        for what, value, remedy in (
            ("a Latent Perceptual Loss", term_mean, "no sample passed the gate, or none was finite: raise `threshold`"),
            ("a loss without it", rest, "a share of such a total means nothing"),
        ):
            if not value > 0:
                raise ValueError(
                    f"LPLCallback(weight='auto') found {what} of {value:.4g} over {self.steps} batches: {remedy}, or "
                    "give `weight` a number."
                )
        self.weight = self.target_share / (1 - self.target_share) * rest / term_mean
        rank_zero_info(
            f"LPL's weight is {self.weight:.4g} from now on: over {self.steps} batches the loss was {rest:.4g} "
            f"and LPL {term_mean:.4g}, which makes it {self.target_share:.0%} of the total."
        )

    def end(self, trainer: pl.Trainer) -> None:
        """Say that training ended before the weight was found.

        Args:
            trainer: Its first process says it.

        Raises:
            ValueError: ``training_step`` returned no loss.
        """
        self._check_given()
        if trainer.is_global_zero:
            _log.warning(
                "LPL was not trained on: by the end of training, %d of the %d batches of `calibration_steps` were "
                "measured. Go on from a checkpoint, lower `calibration_steps`, or give `weight` a number.",
                self._batches,
                self.steps,
            )

    def _check_given(self) -> None:
        """Refuse batches none of which had a loss."""
        if self._sums is not None and not self._given and not self._sums[2]:
            raise _no_loss(None)

    def state_dict(self) -> dict[str, Any]:
        """The weight, or what has been measured so far."""
        sums = None if self._sums is None else self._sums.tolist()
        return {"weight": self.weight, "sums": sums, "batches": self._batches, "target_share": self.target_share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; a weight for another share becomes the one for this."""
        self.weight = state["weight"]
        other = state.get("target_share", self.target_share)
        if self.weight is not None and other != self.target_share:
            self.weight *= self.target_share / (1 - self.target_share) / (other / (1 - other))
        self._sums = None if state["sums"] is None else torch.tensor(state["sums"], dtype=torch.float64)
        self._batches = state["batches"]


def _no_loss(got: object) -> ValueError:
    return ValueError(
        f"LPLCallback(weight='auto') needs the loss that `training_step` returns, got {type(got).__name__}. Return it, "
        "or give `weight` a number."
    )
