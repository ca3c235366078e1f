"""How a loss term enters a LightningModule that knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lpl_lightning.draws import Draws

__all__ = ["LPLMixin", "LossTerm"]

LossTerm = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(z0_hat, z0, noise_to_signal) -> loss``: both latents (B, C, h, w), the ratio (B,), the loss a scalar."""


class LPLMixin:
    """Lets callbacks add terms to the loss of a LightningModule.

    Lightning has no hook that changes a loss after ``training_step``, so the module asks for the terms itself, in one
    line::

        class MyModule(LPLMixin, LightningModule):
            def training_step(self, batch, batch_idx):
                ...
                return loss + self.auxiliary_loss(z0_hat, z0, sigma / alpha)

    Without a callback that adds a term, ``auxiliary_loss`` is zero.
    """

    @property
    def loss_terms(self) -> dict[str, LossTerm]:
        """The terms by name, in the order they came."""
        # A property, so that the mixin needs no __init__ that a module must remember to call.
        terms: dict[str, LossTerm] = self.__dict__.setdefault("_loss_terms", {})
        return terms

    @property
    def lpl_prediction(self) -> Tensor | None:
        """The prediction that ``auxiliary_loss`` was given, while terms are computed."""
        return cast("Tensor | None", self.__dict__.get("_lpl_prediction"))

    @property
    def lpl_draws(self) -> Draws | None:
        """The samples' random numbers that ``auxiliary_loss`` was given, while terms are computed."""
        return cast("Draws | None", self.__dict__.get("_lpl_draws"))

    def add_loss_term(self, name: str, fn: LossTerm) -> None:
        """Add a term.

        Raises:
            ValueError: There is one of that name.
        """
        if name in self.loss_terms:
            raise ValueError(f"There is a loss term {name!r} already: remove it first, or give the other another name.")
        self.loss_terms[name] = fn

    def remove_loss_term(self, name: str) -> None:
        """Remove a term; nothing happens where there is none."""
        self.loss_terms.pop(name, None)

    def auxiliary_loss(
        self,
        z0_hat: Tensor,
        z0: Tensor,
        noise_to_signal: Tensor | None = None,
        prediction: Tensor | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """Sum the terms.

        Args:
            z0_hat: Estimates of the clean latents (B, C, h, w), connected to the denoiser.
            z0: Clean latents (B, C, h, w).
            noise_to_signal: (B,) sigma / alpha of each sample, best on the CPU; without it no sample is gated.
            prediction: The denoiser's prediction (B, C, h, w), which ``z0_hat`` and the rest of the loss are computed
                from. With it, terms can tell how their gradient compares with that of the rest.
            draws: The samples' random numbers; without them terms draw by PyTorch's own generator.

        Returns:
            A scalar; zero without terms.

        Raises:
            ValueError: A term is no scalar.
        """
        total = torch.zeros((), device=z0.device)
        self.__dict__["_lpl_prediction"], self.__dict__["_lpl_draws"] = prediction, draws
        try:
            for name, fn in self.loss_terms.items():
                term = fn(z0_hat, z0, noise_to_signal)
                if not isinstance(term, Tensor) or term.ndim:
                    got = f"shape {tuple(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
                    raise ValueError(f"The loss term {name!r} must give a scalar tensor, got {got}: take its mean.")
                total = total + term
        finally:
            del self.__dict__["_lpl_prediction"], self.__dict__["_lpl_draws"]
        return total

    def __getstate__(self) -> dict[str, Any]:
        """Leave the terms out of copies: they belong to the callbacks of this module's trainer."""
        state = cast(dict[str, Any], super().__getstate__())
        return {key: value for key, value in state.items() if key != "_loss_terms"}
