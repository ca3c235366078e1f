"""Turn the Latent Perceptual Loss on in any LightningModule, by one entry under ``trainer.callbacks``."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lpl_lightning.arguments import at_least
from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.losses import LatentPerceptualLoss
from lpl_lightning.mixin import LPLMixin

__all__ = ["LPLCallback"]


class LPLCallback(Callback):
    """Adds ``weight * LPL`` to the loss of a module with ``LPLMixin``.

    The term is attached at setup and detached at teardown. It logs ``loss_lpl`` (before the weight), ``gate_share``
    (share of the batch that passed the gate) and ``lpl_weight``; in validation ``val_loss_lpl``,
    in test ``test_loss_lpl``.

    Args:
        weight: Weight w of the loss; the paper's best is about 3, where LPL is about a fifth of the total.
        start_step: Optimizer step at which it starts.
        ramp_steps: Steps over which its weight then rises from 0 to ``weight``, linearly.
        every_n_steps: Compute it at every n-th optimizer step only, with n times the weight, so that the gradient
            summed over steps stays the same in expectation.
        loss: Makes the loss of an autoencoder: ``LatentPerceptualLoss`` with the options that a config gives it.
        autoencoder: The autoencoder whose decoder is looked into; by default the module's ``autoencoder``.
    """

    def __init__(
        self,
        weight: float = 3.0,
        start_step: int = 0,
        ramp_steps: int = 0,
        every_n_steps: int = 1,
        loss: Callable[[Autoencoder], LatentPerceptualLoss] = LatentPerceptualLoss,
        autoencoder: Autoencoder | None = None,
    ) -> None:
        at_least(0, weight=weight, start_step=start_step, ramp_steps=ramp_steps)
        at_least(1, every_n_steps=every_n_steps)
        self.weight = weight
        self.start_step = start_step
        self.ramp_steps = ramp_steps
        self.every_n_steps = every_n_steps
        self._make_loss = loss
        self._autoencoder = autoencoder

    def weight_at(self, step: int) -> float:
        """Weight at an optimizer step, counted from 0; 0 where the loss is not computed."""
        since = step - self.start_step
        if since < 0 or since % self.every_n_steps:
            return 0.0
        ramp = min(1.0, (since + 1) / (self.ramp_steps + 1))
        return self.weight * self.every_n_steps * ramp

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Attach the term."""
        if stage == "predict":
            return
        if not isinstance(pl_module, LPLMixin):
            raise ValueError(
                f"LPLCallback needs a module with LPLMixin, got {type(pl_module).__name__}. Make it a subclass of "
                "lpl_lightning.LPLMixin and add self.auxiliary_loss(z0_hat, z0, noise_to_signal) to its loss."
            )
        if "lpl" in pl_module.loss_terms:
            raise ValueError(
                "There are two LPLCallbacks under trainer.callbacks, perhaps one of the config and one of an overlay; "
                "leave one out."
            )
        autoencoder = self._autoencoder or getattr(pl_module, "autoencoder", None)
        if not isinstance(autoencoder, Autoencoder):
            raise ValueError(
                f"LPLCallback found no lpl_lightning.Autoencoder: {type(pl_module).__name__}.autoencoder is "
                f"{type(autoencoder).__name__}. Give it one by `autoencoder`, such as Autoencoder(your_vae)."
            )
        loss = self._make_loss(autoencoder)

        def term(z0_hat: Tensor, z0: Tensor, noise_to_signal: Tensor | None) -> Tensor:
            training = pl_module.training
            weight = self.weight_at(trainer.global_step) if training else self.weight
            if weight == 0:
                return z0.new_zeros(())
            if autoencoder.scale.device != z0.device:
                autoencoder.to(z0.device)
            value: Tensor = loss(z0_hat, z0, noise_to_signal).mean()
            prefix = "" if training else "test_" if trainer.testing else "val_"
            pl_module.log(
                f"{prefix}loss_lpl",
                value.detach(),
                prog_bar=training,
                batch_size=len(z0),
                sync_dist=not training,
            )
            if training:
                if noise_to_signal is not None:
                    share = loss.passes(noise_to_signal).float().mean()
                    pl_module.log("gate_share", share, prog_bar=True, batch_size=len(z0))
                pl_module.log("lpl_weight", weight, batch_size=len(z0))
            return value * weight

        pl_module.add_loss_term("lpl", term)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Detach the term."""
        if isinstance(pl_module, LPLMixin):
            pl_module.remove_loss_term("lpl")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Detach the term, so that a run that was interrupted in a notebook can be started again."""
        self.teardown(trainer, pl_module, "fit")
