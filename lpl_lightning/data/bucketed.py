"""Images at the sizes of their buckets, and batches of one size each.

In training each batch is of one bucket, the same for all processes, which share it out; the order of the buckets'
batches is random, and comes with everything else from the seed and the epoch alone (``batches``). What does not fill a
batch of all processes is left out of the epoch, other images each time; a bucket with fewer images than that makes no
batch in any epoch, and is for the assignment to avoid.

Elsewhere batches are made in the order of the images, each as soon as its bucket has enough, and what is left at the
end makes smaller ones: every image is in one, and the first batches show the shapes that are common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from lpl_lightning.data.buckets import Assignment, Size
from lpl_lightning.data.faults import Faults, first_readable

__all__ = ["BucketedDataset", "BucketedPlan", "Resizable", "bucketed_loader", "described"]


class Resizable(Protocol):
    """A data set whose images can be had at any size."""

    @property
    def faults(self) -> Faults:
        """What becomes of images that cannot be read."""

    def __len__(self) -> int:
        """Number of images."""

    def item(self, index: int, size: Size | None = None) -> dict[str, Any]:
        """An image with height and width in pixels, or an error, ``Unreadable``."""


class BucketedDataset(Dataset[dict[str, Any]]):
    """A data set's images, each at the size of its bucket.

    In the place of one that cannot be read comes, at the same size, the next of its bucket that can.

    Args:
        images: The images.
        assignment: Which bucket each is in.
    """

    def __init__(self, images: Resizable, assignment: Assignment) -> None:
        self.images, self.assignment = images, assignment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        bucket = int(self.assignment.bucket_of[index])
        size, members, count = self.assignment.sizes[bucket], self.assignment.members[bucket], len(self)
        place = int(np.searchsorted(members, index))

        def get(step: int) -> dict[str, Any]:
            # After its own bucket, which may be small where nothing is trained, any image.
            at = members[(place + step) % len(members)] if step < len(members) else (index + step) % count
            return self.images.item(int(at), size)

        return first_readable(get, 0, len(members) + count, self.images.faults)


class BucketedPlan:
    """Batches of one bucket each, in random order; an ``EpochPlan``.

    Args:
        assignment: Which bucket each image is in.
        batch_size: Images in a batch of all processes together; where there are fewer in all, a batch has them all.
    """

    def __init__(self, assignment: Assignment, batch_size: int) -> None:
        self.assignment, self.batch_size = assignment, min(batch_size, len(assignment.bucket_of))
        self._batches = [len(members) // self.batch_size for members in assignment.members]

    @property
    def settings(self) -> dict[str, int]:
        """Images, those of a batch, the number of buckets, and a digest of which image is in which."""
        digest = blake2b(repr(self.assignment.sizes).encode(), digest_size=6)
        digest.update(self.assignment.bucket_of.astype("<i8").tobytes())
        return {
            "items": len(self.assignment.bucket_of),
            "batch_size": self.batch_size,
            "buckets": len(self.assignment.sizes),
            "digest_of_buckets": int.from_bytes(digest.digest(), "big"),
        }

    @property
    def left_out(self) -> int:
        """How many images an epoch leaves out."""
        return len(self.assignment.bucket_of) - len(self) * self.batch_size

    @property
    def never(self) -> int:
        """How many of these every epoch leaves out, since their buckets have fewer images than a batch."""
        return sum(len(members) for members in self.assignment.members if len(members) < self.batch_size)

    def __len__(self) -> int:
        return sum(self._batches)

    def __call__(self, seed: int, epoch: int) -> Iterator[Sequence[int]]:
        """Positions of the items of each batch."""
        rng = np.random.default_rng([seed, epoch])
        orders = [rng.permutation(members) for members in self.assignment.members]
        buckets = rng.permutation(np.repeat(np.arange(len(orders)), self._batches))
        taken = [0] * len(orders)
        for bucket in buckets.tolist():
            first = taken[bucket] * self.batch_size
            taken[bucket] += 1
            yield orders[bucket][first : first + self.batch_size].tolist()


class _WholeBatches(Dataset[Any]):
    """Batches of a bucketed data set, in the order in which they fill up."""

    def __init__(self, dataset: Dataset[Any], assignment: Assignment, batch_size: int) -> None:
        self.dataset = dataset
        self.batches: list[list[int]] = []
        filling: dict[int, list[int]] = {}
        for index, bucket in enumerate(assignment.bucket_of.tolist()):
            batch = filling.setdefault(bucket, [])
            batch.append(index)
            if len(batch) == batch_size:
                self.batches.append(filling.pop(bucket))
        self.batches += filling.values()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        return default_collate([self.dataset[index] for index in self.batches[number]])


def bucketed_loader(
    dataset: Dataset[Any], assignment: Assignment, batch_size: int, num_workers: int = 0
) -> DataLoader[Any]:
    """Each image once, in batches of one size, the same each time.

    Args:
        dataset: The images, each at the size of its bucket.
        assignment: Which bucket each is in.
        batch_size: Images in a batch; the last of a bucket may have fewer.
        num_workers: Loader processes; 0 loads in this one.
    """
    # To Lightning the batches are the items, which it shares out among processes.
    return DataLoader(
        _WholeBatches(dataset, assignment, batch_size),
        batch_size=None,
        collate_fn=_same,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else what training draws would depend on when it is validated
    )


def _same(batch: Any) -> Any:
    return batch


def described(plan: BucketedPlan) -> str:
    """What an epoch is made of, for the log."""
    assignment = plan.assignment
    counts = zip(assignment.sizes, assignment.members, strict=True)
    shapes = ", ".join(f"{height} x {width}: {len(members)}" for (height, width), members in counts)
    moved = f" {assignment.moved} are nearer to sizes with fewer images than a batch." if assignment.moved else ""
    never = f" {plan.never} are in no epoch: their sizes have fewer images than a batch." if plan.never else ""
    return (
        f"{len(assignment.bucket_of)} images in buckets, height x width ({shapes}).{moved} In an epoch of {len(plan)} "
        f"batches of {plan.batch_size}, {plan.left_out - plan.never} images are left out, others each time: they fill "
        f"no batch.{never}"
    )
