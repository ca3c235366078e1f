from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import cli
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lpl_lightning.optimization import build_optimizers, check_optimizer


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


@pytest.mark.parametrize("plateau", [partial(cli.ReduceLROnPlateau, monitor="loss"), ReduceLROnPlateau])
def test_a_schedule_that_follows_a_metric_is_refused(plateau: Any) -> None:
    with pytest.raises(ValueError, match="advances once a step and follows no metric"):
        build_optimizers(nn.Linear(2, 2).parameters(), sgd, plateau)


def test_the_state_of_another_optimizer_is_refused() -> None:
    parameters = list(nn.Linear(2, 2).parameters())
    adamw = torch.optim.AdamW(parameters)
    saved: dict[str, Any] = {"optimizer_states": [adamw.state_dict()]}
    message = "optimizer is no SGD: it has amsgrad, betas, .*eps.* and not dampening, momentum, nesterov. Give the one"
    with pytest.raises(ValueError, match=message):
        check_optimizer(sgd(parameters), saved)
    schedule = torch.optim.lr_scheduler.StepLR(adamw, 3)  # which leaves initial_lr behind
    check_optimizer({"optimizer": adamw, "lr_scheduler": schedule}, saved)
    older = {key: value for key, value in adamw.state_dict()["param_groups"][0].items() if key != "fused"}
    check_optimizer(torch.optim.Adam(parameters), {"optimizer_states": [{"param_groups": [older]}]})
    with pytest.raises(ValueError, match=r"holds weights alone .*give it as `model.weights`, and no `ckpt_path`"):
        check_optimizer(adamw, {"state_dict": {}, "pytorch-lightning_version": "2.6"})
    check_optimizer(adamw, {"pytorch-lightning_version": "2.6"})  # of a folder of shards
