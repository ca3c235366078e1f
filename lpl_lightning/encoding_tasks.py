"""What of a data set is to be encoded: batches that lie within shards, and what they hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from lpl_lightning.data.base import Split
from lpl_lightning.data.batches import drawing
from lpl_lightning.data.buckets import Assignment
from lpl_lightning.data.faults import Faults, Unreadable

__all__ = ["Task", "Variants", "is_whole", "said_of", "tasks"]


class Task(NamedTuple):
    """A batch to encode.

    Attributes:
        split: Whose images.
        file: The shard that they go to, in the cache's folder.
        indices: Their positions.
        is_last: Whether they are the last of the shard.
    """

    split: Split
    file: str
    indices: Sequence[int]
    is_last: bool


class Variants(Dataset[Any]):
    """Batches of items, each as it is drawn several times, without those that cannot be read."""

    def __init__(
        self,
        sets: Mapping[Split, Dataset[Any]],
        buckets: Mapping[Split, Assignment],
        faults: Faults,
        crops: int,
        flips: Sequence[float],
        seed: int,
    ) -> None:
        self.sets, self.buckets, self.faults = sets, buckets, faults
        self.crops, self.flips, self.seed = crops, flips, seed
        self._mirrored: dict[tuple[Split, float], Any] = {}

    def __getitem__(self, task: Task) -> dict[str, Any]:
        crops, flips = (self.crops, self.flips) if task.split == "train" else (1, [0.0])
        found = []
        for index in task.indices:
            try:
                found.append([self._drawn(task.split, index, crop, flip) for crop in range(crops) for flip in flips])
            except Unreadable as fault:
                self.faults.take(fault)
            else:
                self.faults.passed()
        read = [row[0] for row in found]
        batch: dict[str, Any] = {"task": task, "items": [{"key": r["key"], "captions": r["captions"]} for r in read]}
        if read:
            batch["image"] = torch.stack([torch.stack([item["image"] for item in row]) for row in found])
            for name in ("original_size", "crop_top_left"):
                if name in read[0]:
                    batch[name] = torch.stack([torch.stack([item[name] for item in row]) for row in found])
            if "label" in read[0]:
                batch["label"] = torch.tensor([item["label"] for item in read])
        return batch

    def _items(self, split: Split, flip: float) -> Any:
        """The set, mirrored with a probability; once, since a stream goes on where it was."""
        if (split, flip) not in self._mirrored:
            items: Any = self.sets[split]
            self._mirrored[split, flip] = items.mirrored(flip) if hasattr(items, "mirrored") else items
        return self._mirrored[split, flip]

    def _drawn(self, split: Split, index: int, crop: int, flip: float) -> dict[str, Any]:
        items = self._items(split, flip)
        where = (index, self.buckets[split].size_of(index)) if split in self.buckets else (index,)
        with drawing(self.seed, crop, index):
            item = dict(items.item(*where) if hasattr(items, "item") else items[index])
        said = getattr(items, "captions_of", None)
        item["captions"] = list(said(index)) if said is not None else [item["caption"]] if "caption" in item else []
        item["key"] = items.key(index) if hasattr(items, "key") else str(index)
        return item


def said_of(shard: Path) -> Path:
    """The small file beside a shard, which appears after it."""
    return shard.with_suffix(".json")


def is_whole(shard: Path) -> bool:
    """Whether a shard is there, as what lies beside it says."""
    try:
        said = json.loads(said_of(shard).read_text(encoding="utf-8"))
        return not said["items"] or shard.stat().st_size == said["bytes"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that a crash of the machine has left empty
        return False


def tasks(split: Split, groups: Iterable[Sequence[int]], shard_size: int, batch_size: int) -> Iterator[Task]:
    """The batches of a split, none of which lies in two shards.

    Args:
        split: The split.
        groups: Positions of its images, those of one size together.
        shard_size: Images in a shard.
        batch_size: Images in a batch.
    """
    number = 0
    for group in groups:
        for start in range(0, len(group), shard_size):
            end = min(start + shard_size, len(group))
            for first in range(start, end, batch_size):
                last = min(first + batch_size, end)
                yield Task(split, f"{split}/{number:06d}.tar", tuple(group[first:last]), last == end)
            number += 1
