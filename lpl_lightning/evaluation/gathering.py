"""What is kept of images that pass by in batches, on several processes, in the order of the images' positions.

Metrics that shuffle their samples, or that sum in single precision, depend on the order of what they are given. Here
each row carries the position of its image, so that batch size and number of processes change nothing.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed import (
    all_gather_object,
    broadcast_object_list,
    get_world_size,
    is_available,
    is_initialized,
)
from torchmetrics.utilities.distributed import gather_all_tensors

from lpl_lightning.metrics.gaussian import add_features, empty_moments, merge_moments

__all__ = ["Moments", "Rows", "gathered", "gathered_objects", "of_first"]

Kept = TypeVar("Kept")


def gathered(tensor: Tensor) -> list[Tensor]:
    """A tensor of each process, which may differ in size; all processes must call this."""
    if not (is_available() and is_initialized()):
        return [tensor]
    found: list[Tensor] = gather_all_tensors(tensor.contiguous())
    return found


class Moments:
    """Mean and covariance of rows, kept in one tensor (D + 1, D + 1) float64 as ``metrics.gaussian`` says.

    Args:
        dim: Number D of features.
        device: Where they are kept.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self.own = empty_moments(dim).to(device)

    def add(self, features: Tensor) -> None:
        """Take a batch (B, D)."""
        add_features(self.own, features)

    def all(self) -> Tensor:
        """The moments of all processes' rows."""
        return merge_moments(torch.stack(gathered(self.own)))


class Rows:
    """Rows of images by the images' position.

    Args:
        width: Numbers in a row.
        device: Where they are kept.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width, self.device = width, device
        self._index: list[Tensor] = []
        self._rows: list[Tensor] = []

    def add(self, index: Tensor, rows: Tensor) -> None:
        """Take a batch.

        Args:
            index: (B,) integer, positions of its images.
            rows: (B, ``width``), or (B,) where that is 1.
        """
        # Copies: the caller's tensors may be written over.
        self._index.append(index.to(self.device, torch.long, copy=True))
        self._rows.append(rows.detach().to(self.device, torch.float32, copy=True).reshape(len(index), self.width))

    def all(self) -> tuple[Tensor, Tensor]:
        """Those of all processes.

        Returns:
            Positions (N,), rising, and rows (N, ``width``) float32. A position that came twice is there once.
        """
        index = torch.cat([torch.empty(0, dtype=torch.long, device=self.device), *self._index])
        rows = torch.cat([torch.empty(0, self.width, device=self.device), *self._rows])
        # Flat: processes may have none, and then no shape to agree on.
        index = torch.cat([part.flatten() for part in gathered(index)])
        rows = torch.cat([part.flatten() for part in gathered(rows.flatten())]).view(-1, self.width)
        order = index.argsort(stable=True)
        index, rows = index[order], rows[order]
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        return index[first], rows[first]


def gathered_objects(own: Kept) -> list[Kept]:
    """An object of each process; all processes must call this."""
    if not (is_available() and is_initialized()):
        return [own]
    found: list[Any] = [None] * get_world_size()
    all_gather_object(found, own)
    return found


def of_first(own: Kept) -> Kept:
    """The object of the first process; all processes must call this."""
    if not (is_available() and is_initialized()):
        return own
    found: list[Any] = [own]
    broadcast_object_list(found, src=0)
    return cast(Kept, found[0])
