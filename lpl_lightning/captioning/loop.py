"""Images in batches to captions in a journal, as far as a run goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch.utils.data import DataLoader
from tqdm import tqdm

from lpl_lightning.captioning.batches import Batch, Batches, Images, Share, planned
from lpl_lightning.captioning.journal import Journal, Row
from lpl_lightning.captioning.models import Captioner
from lpl_lightning.captioning.prompts import Prompt

__all__ = ["CaptionLoop", "OnError"]

OnError = Literal["skip", "raise"]


class CaptionLoop:
    """Captions what has none yet, of one listing of images after the other.

    Args:
        load: Loads the model, which is done once there is something for it to do.
        prepare: Images to the model's inputs.
        batch_size: Images captioned at once.
        num_workers: Processes that read images.
        on_error: What becomes of images that cannot be captioned.
        limit: The most images, rounded up to whole batches; None captions all.
    """

    def __init__(
        self,
        load: Callable[[], Captioner],
        prepare: Prompt,
        batch_size: int,
        num_workers: int,
        on_error: OnError,
        limit: int | None,
    ) -> None:
        self.load, self.prepare = load, prepare
        self.batch_size, self.num_workers, self.on_error = batch_size, num_workers, on_error
        self.batches_left = None if limit is None else -(-limit // batch_size)
        self._captioner: Captioner | None = None

    def plan(self, journal: Journal, share: Share) -> list[list[int]]:
        """The batches of a listing that a process still has to make."""
        return planned(journal.is_missing, journal.has_failed, self.batch_size, share)

    def caption(
        self,
        plan: list[list[int]],
        images: Images,
        journal: Journal,
        place: str,
        add: Callable[[Sequence[Row]], None] | None = None,
        title: str | None = None,
    ) -> bool:
        """Caption images of a listing.

        Args:
            plan: Their numbers, batch by batch.
            images: Those of the whole listing.
            journal: What captions are written to; it has their names.
            place: What their names are relative to, for errors.
            add: Told of each batch, once it is on the disk.
            title: What stands before the progress bar.

        Returns:
            Whether all were, which ``limit`` may keep from being so.

        Raises:
            ValueError: One cannot be captioned, and ``on_error`` is raise.
        """
        todo = plan if self.batches_left is None else plan[: self.batches_left]
        if self.batches_left is not None:
            self.batches_left -= len(todo)
        if not todo:
            return not plan
        if self._captioner is None:
            self._captioner = self.load()
        batches = Batches(images, todo, min(self.batch_size, len(journal.names)), self.prepare)
        loader = DataLoader(batches, batch_size=None, num_workers=self.num_workers, collate_fn=_as_it_is)
        quiet = os.environ.get("RANK", "0") != "0"
        with tqdm(total=sum(map(len, todo)), desc=title, unit="image", disable=quiet) as bar:
            for batch in loader:
                rows = _captioned(batch, self._captioner, journal.names)
                for number, why in batch.errors.items():
                    self.refuse(f"{place}/{journal.names[number]}", why)
                journal.append(rows)
                if add is not None:
                    add(rows)
                bar.update(len(batch.numbers))
        return len(todo) == len(plan)

    def refuse(self, name: str, why: str) -> None:
        """End the run because of something that cannot be captioned, if that is asked for.

        Raises:
            ValueError: It is.
        """
        if self.on_error == "raise":
            raise ValueError(
                f"{name} cannot be captioned ({why}). Mend or remove it, or set `on_error` to skip; captions made "
                "before it are kept."
            )


def _captioned(batch: Batch, captioner: Captioner, names: Sequence[str]) -> list[Row]:
    """What became of each image of a batch, in order."""
    rows = {number: Row(names[number], None, error) for number, error in batch.errors.items()}
    if batch.inputs is not None:
        found = captioner(batch.inputs, batch.sizes, names[batch.numbers[0]])
        rows |= {
            number: Row(names[number], text, None, is_long)
            for number, (text, is_long) in zip(batch.readable, found, strict=True)
        }
    return [rows[number] for number in batch.numbers]


def _as_it_is(batch: Any) -> Any:
    return batch
