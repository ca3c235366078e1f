r"""How strongly a loss term pulls, next to all else, where both meet: at the model's prediction.

:math:`\hat z_0` follows from the prediction p element by element, so the term's gradient at p is
:math:`g_{LPL} = \partial \hat z_0 / \partial p \odot \partial (w L_{LPL}) / \partial \hat z_0`, and the ratio is
:math:`\| g_{LPL} \| / \| \partial L_{tot} / \partial p - g_{LPL} \|`. Both gradients are those of the step's own
backward pass, over the predictions of all processes; nothing is computed twice.
"""

from __future__ import annotations

from functools import partial

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lpl_lightning.processes import process_sums

__all__ = ["GradientRatio"]


class GradientRatio:
    """Listens to one backward pass."""

    def __init__(self) -> None:
        self._squares: Tensor | None = None  # of both norms, over predictions
        self._heard = False
        # Of each prediction that is listened to, what the terms that are computed from it pull at it.
        self._terms: list[tuple[Tensor, list[Tensor]]] = []

    def watch(self, z0_hat: Tensor, prediction: Tensor) -> Tensor:
        """Listen to the next backward pass; of several terms in one, the sum counts.

        Args:
            z0_hat: Estimates of the clean latents, an elementwise function of the prediction.
            prediction: What the model predicted, and what all else in the loss is computed from.

        Returns:
            ``z0_hat``, to compute the term from. Where both come out of one compiled graph, which does not say how
            they hang together, nothing is listened to.

        Raises:
            ValueError: ``z0_hat`` is not computed from the prediction, or not element by element.
        """
        if self._squares is None or self._heard:
            self._squares, self._heard, self._terms = torch.zeros(2, device=prediction.device), False, []
        (slope,) = torch.autograd.grad(
            z0_hat, prediction, torch.ones_like(z0_hat), retain_graph=True, allow_unused=True
        )
        if slope is None and type(prediction.grad_fn).__name__.startswith("Compiled"):
            rank_zero_warn(
                "`lpl_gradient_ratio` is not logged: how `z0_hat` follows from the prediction lies within one compiled "
                "graph. Compile the network alone, not what computes the loss, to have it."
            )
            self._squares = None
            return z0_hat
        if slope is None or slope.shape != z0_hat.shape:
            raise ValueError(
                "`prediction` given to auxiliary_loss must be the tensor that `z0_hat` was computed from, element by "
                f"element; got shapes {tuple(prediction.shape)} and {tuple(z0_hat.shape)}"
                + (", and `z0_hat` does not depend on it" if slope is None else "")
                + ". Give the very tensor, not a copy or a part of it, or leave it out."
            )

        terms = next((of_it for one, of_it in self._terms if one is prediction), None)
        if terms is None:
            terms = []
            self._terms.append((prediction, terms))
            prediction.register_hook(partial(self._hear, terms))
        of_prediction = terms

        def of_term(gradient: Tensor) -> None:
            of_prediction.append(gradient.detach().float() * slope.float())

        listened = z0_hat.view_as(z0_hat)
        listened.register_hook(of_term)
        return listened

    def _hear(self, terms: list[Tensor], gradient: Tensor) -> None:
        """Take up the gradient at a prediction, whose terms have been heard before."""
        if terms and self._squares is not None:
            term = torch.stack(terms).sum(0)
            rest = gradient.detach().float() - term
            self._squares = self._squares + torch.stack([term.square().sum(), rest.square().sum()])
            self._heard = True
            terms.clear()

    def pop(self) -> Tensor | None:
        """The ratio of the last backward pass that was listened to, a scalar; None without one.

        All processes must call it, and have listened to the same backward passes.
        """
        squares, self._squares, self._terms = self._squares, None, []
        if squares is None:
            return None
        of_term, of_rest = process_sums(squares)
        return torch.sqrt(of_term / of_rest)
