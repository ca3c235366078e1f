r"""How strongly a loss term pulls, next to all else, where both meet: at the model's prediction.

:math:`\hat z_0` follows from the prediction p element by element, so the term's gradient at p is
:math:`g_{LPL} = \partial \hat z_0 / \partial p \odot \partial (w L_{LPL}) / \partial \hat z_0`, and the ratio is
:math:`\| g_{LPL} \| / \| \partial L_{tot} / \partial p - g_{LPL} \|`. Both gradients are those of the step's own
backward pass; nothing is computed twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GradientRatio"]


class GradientRatio:
    """Listens to one backward pass."""

    def __init__(self) -> None:
        self._ratio: Tensor | None = None
        self._term: Tensor | None = None

    def watch(self, z0_hat: Tensor, prediction: Tensor) -> Tensor:
        """Listen to the next backward pass.

        Args:
            z0_hat: Estimates of the clean latents, an elementwise function of the prediction.
            prediction: What the model predicted, and what all else in the loss is computed from.

        Returns:
            ``z0_hat``, to compute the term from.
        """
        self._ratio = self._term = None
        (slope,) = torch.autograd.grad(z0_hat, prediction, torch.ones_like(z0_hat), retain_graph=True)

        def of_term(gradient: Tensor) -> None:
            self._term = gradient.detach().float() * slope.float()

        def of_all(gradient: Tensor) -> None:
            if self._term is not None:
                rest = gradient.detach().float() - self._term
                self._ratio = torch.linalg.vector_norm(self._term) / torch.linalg.vector_norm(rest)
                self._term = None

        listened = z0_hat.view_as(z0_hat)
        listened.register_hook(of_term)
        prediction.register_hook(of_all)
        return listened

    def pop(self) -> Tensor | None:
        """The ratio of the last backward pass that was listened to, a scalar; None without one."""
        ratio, self._ratio = self._ratio, None
        return ratio
