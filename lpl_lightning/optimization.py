"""From the optimizer and schedule of a config to what ``configure_optimizers`` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lpl_lightning.checkpoints import WEIGHTS_ALONE

__all__ = ["Maker", "build_optimizers", "check_optimizer"]


OF_SCHEDULES = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
"""Settings that schedules leave in an optimizer."""


class Maker:
    """A callable that a copy of a module shares, such as one that ``StochasticWeightAveraging`` makes.

    What a config's parser makes cannot be copied.

    Args:
        make: What is called.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *args: Any) -> Any:
        """Make an optimizer of parameters, or a schedule of an optimizer."""
        return self.make(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Maker:
        return self


def check_optimizer(configured: Any, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another kind of optimizer, and warn of settings that the checkpoint's take the place of.

    Args:
        configured: What ``configure_optimizers`` returns; looked at where that is an optimizer or has one.
        checkpoint: To go on with.

    Raises:
        ValueError: The checkpoint is of weights alone, or each of the two has settings that the other has not. One that
            alone has more is of another version of PyTorch.
    """
    # Of a folder of shards, the optimizer's state has been loaded by then, with the weights.
    written = {"pytorch-lightning_version", "state_dict"} <= checkpoint.keys()
    if written and "optimizer_states" not in checkpoint:
        raise ValueError(WEIGHTS_ALONE)
    optimizer = configured.get("optimizer") if isinstance(configured, Mapping) else configured
    states = checkpoint.get("optimizer_states") or []
    if not isinstance(optimizer, Optimizer) or len(states) != 1:
        return
    groups = (optimizer.param_groups, states[0]["param_groups"])
    own, found = ({key for group in of for key in group} - OF_SCHEDULES for of in groups)
    if own - found and found - own:
        raise ValueError(
            f"The checkpoint's optimizer is no {type(optimizer).__name__}: it has {', '.join(sorted(found - own))} and "
            f"not {', '.join(sorted(own - found))}. Give the one that it was trained with; to begin anew from its "
            "weights with another, give the checkpoint as `model.weights`, and no `ckpt_path`."
        )
    differing = [said for own, found in zip(*groups, strict=False) for said in _unlike(own, found, _constant(own))]
    schedule = configured.get("lr_scheduler") if isinstance(configured, Mapping) else None
    schedule = schedule.get("scheduler") if isinstance(schedule, Mapping) else schedule
    saved = checkpoint.get("lr_schedulers") or []
    if isinstance(schedule, LRScheduler) and len(saved) == 1:
        arguments = signature(type(schedule)).parameters.keys() - {"optimizer", "last_epoch"}
        differing += _unlike(schedule.state_dict(), saved[0], arguments)
    if differing:
        rank_zero_warn(
            f"Training goes on with the checkpoint's settings of optimizer and schedule, not with those given: "
            f"{', '.join(dict.fromkeys(differing))}. To train its weights by others, give the checkpoint as "
            "`model.weights`, and no `ckpt_path`."
        )


def _constant(group: Mapping[str, Any]) -> set[str]:
    """What of an optimizer's group no schedule changes: where there is one, the rate that it began with."""
    moved = {"lr"} if "initial_lr" in group else set()
    moved |= {"betas", "momentum"} if "max_momentum" in group else set()
    return group.keys() - {"params", *OF_SCHEDULES, *moved} | ({"initial_lr"} & group.keys())


def _unlike(own: Mapping[str, Any], found: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Settings of two that both have, as numbers or words, and that differ."""

    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    kept = [name for name in sorted(names) if name in own and name in found]
    pairs = [(name, plain(own[name]), plain(found[name])) for name in kept]
    kinds = (int, float, str, tuple)
    said = [(name, a, b) for name, a, b in pairs if isinstance(a, kinds) and isinstance(b, kinds) and a != b]
    return [f"{'lr' if name == 'initial_lr' else name} {there} (given {here})" for name, here, there in said]


def build_optimizers(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None,
) -> OptimizerLRScheduler:
    """Build an optimizer over the trainable parameters, and its schedule, which advances once a step.

    Args:
        parameters: Parameters; those that require no gradient are left out.
        optimizer: Makes an optimizer of the parameters.
        lr_scheduler: Makes a schedule of the optimizer; none keeps the rate as it is.

    Raises:
        ValueError: Nothing is trainable, or the schedule needs a metric to follow.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError("Nothing to train: every parameter of the module has requires_grad=False.")
    built = optimizer(trainable)
    if lr_scheduler is None:
        return built
    schedule = lr_scheduler(built)
    if isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(
            "`lr_scheduler` advances once a step and follows no metric, so ReduceLROnPlateau cannot serve; "
            "use a schedule over steps, such as torch.optim.lr_scheduler.CosineAnnealingLR."
        )
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
