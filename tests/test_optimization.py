from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lpl_lightning.optimization import build_optimizers


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def test_only_what_is_trainable_is_optimized() -> None:
    frozen, trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    built: Any = build_optimizers([*frozen.parameters(), *trained.parameters()], sgd, None)
    assert built.param_groups[0]["params"] == list(trained.parameters())
    with pytest.raises(ValueError, match="Nothing to train"):
        build_optimizers(frozen.parameters(), sgd, None)


def test_schedules_advance_once_a_step() -> None:
    built: Any = build_optimizers(
        nn.Linear(2, 2).parameters(), sgd, lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3)
    )
    assert built["lr_scheduler"]["interval"] == "step"
    assert built["lr_scheduler"]["scheduler"].optimizer is built["optimizer"]


def test_a_schedule_that_follows_a_metric_is_refused() -> None:
    from lightning.pytorch.cli import ReduceLROnPlateau

    with pytest.raises(ValueError, match="advances once a step and follows no metric"):
        build_optimizers(
            nn.Linear(2, 2).parameters(), sgd, lambda optimizer: ReduceLROnPlateau(optimizer, monitor="loss")
        )
