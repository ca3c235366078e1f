"""What several processes that train one model say together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed
from torch import Tensor

__all__ = ["counted", "own_place", "process_means", "process_sums", "threads_at_rest"]

REST = 0.5
"""Seconds for Gloo's threads to let go of the last exchange."""


def own_place() -> tuple[int, int]:
    """Number of this process and of all, as torch.distributed has them; (0, 1) where it is not set up."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def process_sums(values: Tensor) -> Tensor:
    """Sums over processes, by one reduction that no process waits for on an accelerator; all must call it.

    Args:
        values: Of the same shape in all processes, on the device of their module.

    Returns:
        The sums, float32; in one process the values as they came, without gradients.
    """
    if own_place()[1] == 1:
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
    _, processes = own_place()
    if processes == 1 or not found:
        return found
    together = torch.stack([value.to(device, torch.float32, non_blocking=True) for value in found.values()])
    return dict(zip(found, (process_sums(together) / processes).unbind(), strict=True))


def counted(samples: int) -> int:
    """A number of samples as ``LightningModule.log`` weighs the means of processes by it.

    Lightning rounds the mean of whole numbers of samples down, so that means over processes come out too large.
    """
    return cast(int, float(samples))


@contextmanager
def threads_at_rest() -> Iterator[None]:
    """Give Gloo's threads the time to come to rest after what is within, before Python may end.

    They hold the tensors of an exchange a little longer than it takes, and need Python to let go of them. One that does
    so while Python ends aborts the process with status 134, after all is done: a launcher takes the run for failed, and
    ends the others (https://github.com/pytorch/pytorch/pull/179291). To destroy the group would end its threads only
    where nothing else holds it, and PyTorch's own caches of sharded tensors do.
    """
    try:
        yield
    finally:
        if own_place()[1] > 1 and torch.distributed.get_backend() != "nccl":
            time.sleep(REST)
