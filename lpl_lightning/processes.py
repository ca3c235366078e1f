"""What several processes that train one model say together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed
from torch import Tensor

__all__ = ["counted", "process_means", "process_sums"]


def process_sums(values: Tensor) -> Tensor:
    """Sums over processes, by one reduction that no process waits for on an accelerator; all must call it.

    Args:
        values: Of the same shape in all processes, on the device of their module.

    Returns:
        The sums, float32; in one process the values as they came, without gradients.
    """
    if _processes() == 1:
        return values.detach()
    together = values.detach().to(torch.float32, copy=True)
    torch.distributed.all_reduce(together)
    return together


def process_means(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Means over processes, by one ``process_sums``; all must call it.

    Args:
        values: Scalars, of the same names in all processes.
        device: Of the processes' module.

    Returns:
        The means, on the device; in one process the values as they came, without gradients.
    """
    found = {name: value.detach() for name, value in values.items()}
    processes = _processes()
    if processes == 1 or not found:
        return found
    together = torch.stack([value.to(device, torch.float32, non_blocking=True) for value in found.values()])
    return dict(zip(found, (process_sums(together) / processes).unbind(), strict=True))


def _processes() -> int:
    is_one = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return 1 if is_one else torch.distributed.get_world_size()


def counted(samples: int) -> int:
    """A number of samples as ``LightningModule.log`` weighs the means of processes by it.

    Lightning rounds the mean of whole numbers of samples down, so that means over processes come out too large.
    """
    return cast(int, float(samples))
