from __future__ import annotations

import warnings
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
    with pytest.warns(UserWarning, match=r"weight_decay 0\.01 \(given 0\)"):
        check_optimizer(torch.optim.Adam(parameters), {"optimizer_states": [{"param_groups": [older]}]})
    with pytest.raises(ValueError, match=r"holds weights alone .*give it as `model.weights`, and no `ckpt_path`"):
        check_optimizer(adamw, {"state_dict": {}, "pytorch-lightning_version": "2.6"})
    check_optimizer(adamw, {"pytorch-lightning_version": "2.6"})  # of a folder of shards


def test_settings_that_the_checkpoint_takes_the_place_of_are_named() -> None:
    """PyTorch's optimizers and schedules go on with what they were saved with, whatever they are built with now."""

    def built(rate: float, steps: int, decay: float = 0.1, taken: int = 0) -> Any:
        module = nn.Linear(2, 2)
        found: Any = build_optimizers(
            module.parameters(),
            partial(torch.optim.AdamW, lr=rate, weight_decay=decay),
            partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        )
        for _ in range(taken):
            module(torch.ones(1, 2)).sum().backward()
            found["optimizer"].step()
            found["lr_scheduler"]["scheduler"].step()
        return found

    def saved(found: Any) -> dict[str, Any]:
        states = found["optimizer"].state_dict(), found["lr_scheduler"]["scheduler"].state_dict()
        return {"optimizer_states": [states[0]], "lr_schedulers": [states[1]]}

    checkpoint = saved(built(0.5, 8, taken=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the rate has moved, and is not what was given
        check_optimizer(built(0.5, 8), checkpoint)
    with pytest.warns(
        UserWarning, match=r"not with those given: lr 0.5 \(given 0.25\), weight_decay 0.1 \(given 0.2\)\. "
    ):
        check_optimizer(built(0.25, 8, decay=0.2), checkpoint)
    with pytest.warns(UserWarning, match=r"not with those given: T_max 8 \(given 16\)\. "):
        check_optimizer(built(0.5, 16), checkpoint)
    again = built(0.5, 16)
    again["optimizer"].load_state_dict(checkpoint["optimizer_states"][0])
    again["lr_scheduler"]["scheduler"].load_state_dict(checkpoint["lr_schedulers"][0])
    assert again["lr_scheduler"]["scheduler"].T_max == 8, "which is why"
    plain = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5)
    with pytest.warns(UserWarning, match=r"lr 0\.5 \(given 0\.25\)"):
        check_optimizer(
            torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.25), {"optimizer_states": [plain.state_dict()]}
        )


@pytest.mark.parametrize(
    "schedule",
    [
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9),
        partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=2, T_mult=2),
        partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 2]),
        partial(torch.optim.lr_scheduler.LinearLR, total_iters=3),
        partial(torch.optim.lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
        partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    ],
)
def test_what_a_schedule_moves_is_no_setting(schedule: Any) -> None:
    module = nn.Linear(2, 2)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    old: Any = build_optimizers(module.parameters(), sgd, schedule)
    for _ in range(3):
        module(torch.ones(1, 2)).sum().backward()
        old["optimizer"].step()
        old["lr_scheduler"]["scheduler"].step()
    states = old["optimizer"].state_dict(), old["lr_scheduler"]["scheduler"].state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_optimizer(
            build_optimizers(module.parameters(), sgd, schedule),
            {"optimizer_states": [states[0]], "lr_schedulers": [states[1]]},
        )
