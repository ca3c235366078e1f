"""From the optimizer and schedule of a config to what ``configure_optimizers`` returns."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

__all__ = ["build_optimizers"]


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
