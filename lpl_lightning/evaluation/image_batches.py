"""Batches of sets of images for evaluation, shared out over processes, in which each image is known by its position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from lpl_lightning.arguments import at_least
from lpl_lightning.loader_processes import OutliveSignals

__all__ = ["loader"]


def loader(
    dataset: Dataset[Any],
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    """Batches of one process's share of a set, without the repeats that ``DistributedSampler`` fills up with.

    Args:
        dataset: A map-style dataset whose items become batches that are dictionaries, with an ``image`` an item; these
            get the positions of their items as ``index``.
        batch_size: Images per batch.
        num_workers: Loader processes; 0 loads in this one.
        rank: Number of this process. It gets the positions ``rank``, ``rank + world_size``, and so on.
        world_size: Number of processes.
        collate_fn: How items become a batch; by default torch's.

    Raises:
        ValueError: A number is out of range, or the dataset is not such.
    """
    at_least(1, batch_size=batch_size, world_size=world_size)
    at_least(0, num_workers=num_workers, rank=rank)
    if rank >= world_size:
        raise ValueError(f"`rank` must be below `world_size`, {world_size}, got {rank}.")
    if not isinstance(dataset, Sized):
        raise ValueError(f"`dataset` must be map-style, with a length, got {type(dataset).__name__}.")
    return DataLoader(
        _Share(dataset, range(rank, len(dataset), world_size)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_Collate(collate_fn or default_collate),
        pin_memory=torch.cuda.is_available(),
        # Seeds of workers are drawn from it, so that an evaluation leaves the random numbers of a training run alone.
        generator=torch.Generator(),
        # A signal to the job of an evaluation in training is that of training to act on.
        worker_init_fn=OutliveSignals() if num_workers else None,
    )


class _Share(Dataset[tuple[int, Any]]):
    """Some positions of a dataset, and what is there."""

    def __init__(self, dataset: Dataset[Any], positions: range) -> None:
        self.dataset, self.positions = dataset, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        position = self.positions[number]
        return position, self.dataset[position]


class _Collate:
    """Makes batches as another function does, which need not know of the positions that are added."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, found: list[tuple[int, Any]]) -> dict[str, Any]:
        batch = self.collate([item for _, item in found])
        if not isinstance(batch, Mapping) or "image" not in batch:
            raise ValueError(
                "`dataset` must have dictionaries with an `image` for items, or a `collate_fn` that makes such batches "
                f"of them; got {type(found[0][1]).__name__} for an item and {type(batch).__name__} for a batch."
            )
        if len(batch["image"]) != len(found):
            raise ValueError(
                f"`collate_fn` must leave no image out, got {len(batch['image'])} of {len(found)}: metrics are of all."
            )
        return {**batch, "index": torch.tensor([position for position, _ in found])}
