"""Callbacks that have a part in the loss, and their Latent Perceptual Losses."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lpl_lightning.callbacks.lpl import LPLCallback
from lpl_lightning.losses import LatentPerceptualLoss

__all__ = ["leave_lpl_to_guard", "loss_callbacks", "lpl_losses"]

_LOOKING_ON = ("lpl_lightning", "lightning", "pytorch_lightning")
"""Packages whose callbacks, but for ``LPLCallback``, only look on, write, or end runs."""


def loss_callbacks(trainer: pl.Trainer) -> list[Any]:
    """The callbacks that the loss may depend on: ``LPLCallback``, and those of other projects."""
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return [
        callback
        for callback in callbacks
        if isinstance(callback, LPLCallback) or type(callback).__module__.split(".")[0] not in _LOOKING_ON
    ]


def lpl_losses(trainer: pl.Trainer) -> list[LatentPerceptualLoss]:
    """The losses of all ``LPLCallback`` of a trainer."""
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    found = [callback.loss for callback in callbacks if isinstance(callback, LPLCallback)]
    return [loss for loss in found if loss is not None]


def leave_lpl_to_guard(trainer: pl.Trainer) -> None:
    """Let a Latent Perceptual Loss that would raise, on one process alone, give what is not finite as its value."""
    for loss in lpl_losses(trainer):
        if loss.guard.policy == "raise":
            loss.guard.policy = "pass"
