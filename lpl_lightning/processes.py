"""What several processes that train one model say together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed
from torch import Tensor

__all__ = ["counted", "process_means"]


def process_means(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Means over processes, by one reduction that no process waits for on an accelerator; all must call it.

    Args:
        values: Scalars, of the same names in all processes.
        device: Of the processes' module.

    Returns:
        The means, on the device; in one process the values as they came, without gradients.
    """
    found = {name: value.detach() for name, value in values.items()}
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    world_size = torch.distributed.get_world_size()
    if world_size == 1 or not found:
        return found
    together = torch.stack([value.to(device, torch.float32, non_blocking=True) for value in found.values()])
    torch.distributed.all_reduce(together)
    return dict(zip(found, (together / world_size).unbind(), strict=True))


def counted(samples: int) -> int:
    """A number of samples as ``LightningModule.log`` weighs the means of processes by it.

    Lightning rounds the mean of whole numbers of samples down, so that means over processes come out too large.
    """
    return cast(int, float(samples))
