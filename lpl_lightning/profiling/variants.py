"""The ways to train that are compared: LPL as a config has it, and as other implementations compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.callbacks import LPLCallback
from lpl_lightning.execution import Execution
from lpl_lightning.losses import LatentPerceptualLoss
from lpl_lightning.losses.options import LossOptions

__all__ = ["LPLVariants", "keep_layout", "loss_of"]

WEIGHT = 3.0
"""Of the loss where the config gives none; no time depends on it."""


@dataclass(frozen=True)
class LPLVariants:
    """What a config says of LPL.

    Attributes:
        make: Makes the loss of an autoencoder.
        autoencoder: The callback's own, if it has one.
        weight: Of the loss, fixed.
        every_n_steps: At how many optimizer steps LPL is computed once.
        notes: Where it is measured otherwise than the config says, in sentences.
    """

    make: Callable[[Autoencoder], LatentPerceptualLoss]
    autoencoder: Autoencoder | None
    weight: float
    every_n_steps: int
    notes: tuple[str, ...]

    @classmethod
    def of(cls, callbacks: Sequence[Callback]) -> LPLVariants:
        """Read the ``LPLCallback`` among a trainer's callbacks, or take its defaults where there is none."""
        given = next((callback for callback in callbacks if isinstance(callback, LPLCallback)), None)
        notes = []
        if given is None:
            notes.append("The config has no LPLCallback: LPL is that of LPLCallback(), preset `paper`.")
        callback = given or LPLCallback(WEIGHT)
        if not callback.weight:
            notes.append(f"The weight is {WEIGHT:g} here, which the config leaves open or sets to 0.")
        if callback.budget.share is not None:
            notes.append("LPL is exact here, as before the config's `budget` has been looked at.")
        return cls(
            callback.make_loss,
            callback.autoencoder,
            callback.weight or WEIGHT,
            callback.every_n_steps,
            tuple(notes),
        )

    def configured(self) -> LPLCallback:
        """LPL as the config has it, from the first step on and at each."""
        return self._callback(self.make)

    def whole_batch(self) -> LPLCallback:
        """LPL of all that passed at once, without a random subset, with stages run again in the backward pass."""

        def make(autoencoder: Autoencoder) -> LatentPerceptualLoss:
            configured = self.make(autoencoder)
            options = {field.name: getattr(configured.options, field.name) for field in fields(LossOptions)}
            execution = Execution(
                streamed=False,
                checkpoint=configured.autoencoder.in_stages,
                channels_last=False,
                fold_upsampling=False,
            )
            return LatentPerceptualLoss(configured.autoencoder, configured.preset, **options, execution=execution)

        return self._callback(make)

    def _callback(self, make: Callable[[Autoencoder], LatentPerceptualLoss]) -> LPLCallback:
        def quiet(autoencoder: Autoencoder) -> LatentPerceptualLoss:
            loss = make(autoencoder)
            loss.announced = True  # the table says what is compared
            return loss

        return LPLCallback(self.weight, loss=quiet, autoencoder=self.autoencoder)


def loss_of(callback: LPLCallback, trainer: pl.Trainer, module: pl.LightningModule) -> LatentPerceptualLoss:
    """The loss that a callback makes for a module.

    Args:
        callback: The callback; it is attached to the module and detached again.
        trainer: Its trainer.
        module: The module.

    Raises:
        ValueError: The callback refuses the module or what it says of the loss.
    """
    callback.setup(trainer, module, "fit")
    loss = cast(LatentPerceptualLoss, callback.loss)
    callback.teardown(trainer, module, "fit")
    return loss


def keep_layout(model: nn.Module) -> Callable[[], None]:
    """Note how a model's weights of convolutions lie in memory.

    A loss may lay a frozen decoder's weights out anew, and what runs it afterwards would then run another way.

    Args:
        model: The model.

    Returns:
        What lays them out as they were.
    """
    formats = []
    for parameter in model.parameters():
        if parameter.ndim == 4:
            last = parameter.is_contiguous(memory_format=torch.channels_last) and not parameter.is_contiguous()
            formats.append((parameter, torch.channels_last if last else torch.contiguous_format))

    def restore() -> None:
        # Weights made in inference mode could take part in no graph.
        with torch.inference_mode(False):
            for parameter, memory_format in formats:
                parameter.data = parameter.data.contiguous(memory_format=memory_format)

    return restore
