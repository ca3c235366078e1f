"""What data modules of Hugging Face data sets and of tar shards share: preparation, faults, and streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lpl_lightning.arguments import at_least
from lpl_lightning.data.base import ImageDataModule, Split
from lpl_lightning.data.batches import EpochPlan
from lpl_lightning.data.crops import Crop, Interpolation, SquareCrop
from lpl_lightning.data.faults import Faults, OnError
from lpl_lightning.data.lanes import LaneSize, StreamPlan
from lpl_lightning.data.listing import path_hash, some
from lpl_lightning.data.samples import Preparation
from lpl_lightning.data.streams import Stream, StreamDataset

__all__ = ["SourceDataModule", "held_out"]


class SourceDataModule(ImageDataModule):
    """A data module of images that lie in tables or streams.

    Args:
        image_size: Side of the images, in pixels; the shorter side is resized to it, the rest cropped.
        val_fraction: Share of the training data to hold out where validation data are not given, in (0, 1).
        images_per_epoch: Images of an epoch of a stream, of all processes; None counts them.
        shuffle_buffer: Images that each loader process of a stream holds to draw the next from.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 decodes in the training process.
        crop: Which square of a training image: the centre, or one drawn anew each time; else the centre.
        horizontal_flip: Mirror half of the training images, drawn anew each time.
        interpolation: How to resize; always anti-aliased.
        on_error: What becomes of samples that cannot be used: ``skip`` or ``raise``.
        max_bad_share: Share of them, in [0, 1], above which the run ends all the same.
        report: File that names them; None lets it lie in the run's folder.
        num_generate: How many images ``lpl predict`` generates.
        generate_seed: Generated image ``i`` is drawn from seed ``generate_seed + i``.
        prompts: Text file of the captions of generated images, one a line.
    """

    def __init__(
        self,
        image_size: int,
        val_fraction: float,
        images_per_epoch: int | None,
        shuffle_buffer: int,
        batch_size: int,
        num_workers: int,
        crop: Crop,
        horizontal_flip: bool,
        interpolation: Interpolation,
        on_error: OnError,
        max_bad_share: float,
        report: str | Path | None,
        num_generate: int,
        generate_seed: int,
        prompts: str | Path | None,
    ) -> None:
        faults = Faults(on_error, max_bad_share, None if report is None else Path(report).expanduser().absolute())
        super().__init__(image_size, batch_size, num_workers, num_generate, generate_seed, prompts, faults)
        at_least(1, shuffle_buffer=shuffle_buffer)
        if images_per_epoch is not None:
            at_least(1, images_per_epoch=images_per_epoch)
        if not 0 < val_fraction < 1:
            raise ValueError(
                f"`val_fraction` must be in (0, 1), got {val_fraction}; to hold out none, give validation data."
            )
        self.val_fraction, self.images_per_epoch, self.shuffle_buffer = val_fraction, images_per_epoch, shuffle_buffer
        self._transforms: dict[bool, SquareCrop] = {
            True: SquareCrop(image_size, crop, horizontal_flip, interpolation),
            False: SquareCrop(image_size, interpolation=interpolation),
        }
        self._datasets: dict[Split, Any] = {}
        self._believes_counts = True

    def count_all(self) -> None:
        """Count the images of streams, whatever is said of them: each is to be asked for once, without epochs."""
        self.images_per_epoch, self._believes_counts = None, False
        self._datasets.clear()

    def plan(self, dataset: Dataset[dict[str, Any]], batch_size: int) -> EpochPlan:
        """Which images make the training batches of an epoch."""
        if not isinstance(dataset, StreamDataset):
            return super().plan(dataset, batch_size)
        size = LaneSize(self.batch_size, batch_size // self.batch_size, max(1, self.num_workers))
        shards = len(dataset.shards) if dataset.lengths is None else dataset.lengths
        dataset.plan = StreamPlan(len(dataset), shards, self.shuffle_buffer, size)
        return dataset.plan

    def _preparation(self, split: Split) -> Preparation:
        return Preparation(self._transforms[split == "train"], draw_caption=split == "train")

    def _streamed(
        self, split: Split, stream: Stream, shards: Sequence[int], lengths: Sequence[int] | None, count: int
    ) -> StreamDataset:
        if count < 1:
            raise ValueError(
                f"The {split} images must be at least one that can be used, but {some(map(str, stream.shards))} hold "
                "none. Mend them, name other members or columns, or give other data."
            )
        return StreamDataset(stream, shards, self._preparation(split), self.faults, lengths, count)


def held_out(names: Sequence[str], fraction: float, what: str) -> list[bool]:
    """Which of some shards are held out for validation: a share of them, by their names, and at least one.

    Args:
        names: Paths or URLs, of which the last part counts.
        fraction: The share, in (0, 1).
        what: The argument that would give validation data instead, for the error.

    Raises:
        ValueError: There is one shard alone.
    """
    if len(names) < 2:
        raise ValueError(
            f"`val_fraction` holds out whole shards of a stream, but there is one alone: {some(names)}. Give {what}, "
            "or more shards."
        )
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    hashes = [path_hash(name.rpartition("/")[2], Path()) for name in names]
    out = sorted(range(len(names)), key=lambda shard: (hashes[shard], shard))[:count]
    chosen = frozenset(out)
    return [shard in chosen for shard in range(len(names))]
