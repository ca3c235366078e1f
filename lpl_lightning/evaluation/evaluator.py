"""A suite of measures over a set of real images, once, and over any number of sets of generated ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.evaluation.cache import Cached, ReferenceCache
from lpl_lightning.evaluation.gathering import gathered_objects, of_first
from lpl_lightning.evaluation.image_batches import loader
from lpl_lightning.evaluation.image_files import PixelHash
from lpl_lightning.evaluation.measure import Measure, Sets
from lpl_lightning.evaluation.report import Report
from lpl_lightning.evaluation.suite import Suite, versions

__all__ = ["Evaluator", "expected", "posterior_mean"]

Collate = Callable[[list[Any]], Any]


class Evaluator:
    """Measures generated images against real ones.

    All processes of a run build it alike, and call it alike.

    Args:
        suite: What is measured.
        device: Where networks run.
        cache: Where what measures keep of real images is looked up and put.
        batch_size: Images passed through networks at once.
        num_workers: Processes that read images; 0 reads in this one.
        rank: Number of this process.
        world_size: Number of processes.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        suite: Suite,
        device: torch.device,
        cache: ReferenceCache,
        batch_size: int = 64,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        progress: bool = True,
    ) -> None:
        self.suite, self.device, self.cache = suite, device, cache
        self.batch_size, self.num_workers = batch_size, num_workers
        self.rank, self.world_size, self.progress = rank, world_size, progress and rank == 0

    def take_real(
        self,
        dataset: Dataset[Any],
        sets: Sets,
        about: Mapping[str, Any],
        key: str | None = None,
        autoencoder: Autoencoder | None = None,
        collate_fn: Collate | None = None,
    ) -> None:
        """Measure the real images, or look up what an earlier evaluation kept of them.

        Args:
            dataset: They, as dictionaries with an ``image``.
            sets: What is going to be measured.
            about: What the report shall say of them.
            key: A key that changes with them, for the cache; None reads them once more to make one.
            autoencoder: What reconstructs them, if ``sets`` says that they are.
            collate_fn: How items become a batch; by default torch's.

        Raises:
            ValueError: A measure cannot be computed of the sets, or what the cache holds is of other images.
        """
        if (sets.autoencoder is None) != (autoencoder is None):
            raise ValueError("`autoencoder` must be given where `sets` says that it is measured, and only there.")
        self.sets = sets
        self.suite.begin(sets, self.device)
        images = loader(dataset, self.batch_size, self.num_workers, self.rank, self.world_size, collate_fn)
        if key is None:
            key = self._hash(self._bar(images, "Hashing real images", sets.real))
        found = {measure.label: self._found(key, measure) for measure in self.suite}
        states = {label: cached.tensors for label, cached in found.items() if cached is not None}
        hashes = {cached.images["hash"] for cached in found.values() if cached is not None}
        missing = [measure for measure in self.suite if measure.label not in states]
        if missing:
            pixels = self._pass(self._bar(images, "Real images", sets.real), missing, autoencoder)
            hashes.add(pixels)
            states |= {measure.label: measure.real_state() for measure in missing}
        if len(hashes) > 1:
            raise ValueError(
                f"The real images are not those that {self.cache.folder} holds results of, though all that is looked "
                "at to tell them apart is the same. Delete that folder, which is a cache, or evaluate without it."
            )
        (pixels,) = hashes
        if self.rank == 0:
            for measure in missing:
                about_cached = {"count": sets.real, "hash": pixels}
                self.cache.store(key, self._of(measure), states[measure.label], about_cached)
        self.about_real = {**about, "count": sets.real, "hash": pixels}
        self.suite.put_real_states(states)

    @property
    def made(self) -> dict[str, Any]:
        """All that values depend on besides the generated images, as reports hold it; after ``take_real``."""
        return expected(self.suite, self.sets) | {"reference": self.about_real["hash"]}

    def _found(self, key: str, measure: Measure) -> Cached | None:
        """What the first process finds, so that all do the same."""
        return of_first(self.cache.find(key, self._of(measure)) if self.rank == 0 else None)

    def _of(self, measure: Measure) -> dict[str, Any]:
        sets = self.sets
        return {
            "measure": measure.label,
            **measure.provenance(),
            "images": sets.real,
            "side": sets.image_size,
            "autoencoder": sets.autoencoder,
            "libraries": versions(),
        }

    def _bar(self, batches: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        with tqdm(total=total, desc=what, disable=not self.progress) as bar:
            for batch in batches:
                yield batch
                bar.update(min(len(batch["image"]) * self.world_size, total - bar.n))

    def _hash(self, batches: Iterable[Any]) -> str:
        own = PixelHash()
        for batch in batches:
            own.add(batch["image"])
        return _merged(own)

    def _pass(self, batches: Iterable[Any], measures: Sequence[Measure], autoencoder: Autoencoder | None) -> str:
        own = PixelHash()
        for batch in batches:
            own.add(batch["image"])
            images = batch["image"].to(self.device)
            for measure in measures:
                measure.update(images, "real", batch["index"])
            if autoencoder is not None:
                again = _reconstructed(autoencoder, images)
                for measure in measures:
                    measure.update(again, "reconstructed", batch["index"])
        return _merged(own)

    def measure(self, dataset: Dataset[Any], name: str, about: Mapping[str, Any]) -> Report:
        """Measure a set of generated images.

        Args:
            dataset: They, as dictionaries with an ``image`` and, if ``sets`` says so, a ``caption``.
            name: What the set is called.
            about: What the report shall say of them.

        Returns:
            The values; ``write`` writes more of the last set.
        """
        for measure in self.suite:
            measure.begin_generated()
        own = PixelHash()
        images = loader(dataset, self.batch_size, self.num_workers, self.rank, self.world_size)
        for batch in self._bar(images, "Generated images", self.sets.generated):
            own.add(batch["image"])
            self.suite.update(batch["image"].to(self.device), "generated", batch["index"], batch.get("caption"))
        pixels = _merged(own)
        values = self.suite.compute()
        about = {**about, "count": self.sets.generated, "image_size": self.sets.image_size, "hash": pixels}
        return Report(name, values, about, dict(self.about_real), made=self.made, versions=versions())

    def write(self, report: Report, folder: Path) -> Path:
        """Write the report of the set measured last, and all that belongs to it; by the first process alone.

        Returns:
            Path of ``report.json``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        report.notes += self.suite.write(folder, self.sets)
        return report.write(folder)


def expected(suite: Suite, sets: Sets) -> dict[str, Any]:
    """What ``Evaluator.made`` will be, but for the reference's hash, which takes all real images to be read."""
    return {"suite": suite.settings(sets), **asdict(sets)}


def _merged(own: PixelHash) -> str:
    """The hash of the images of all processes."""
    total = PixelHash()
    for part in gathered_objects(own):
        total.merge(part)
    return total.hexdigest()


@contextmanager
def posterior_mean(autoencoder: Autoencoder) -> Iterator[None]:
    """Let an autoencoder encode images to the mean of its posterior for a while, in place of a sample."""
    sampled, autoencoder.sample_posterior = autoencoder.sample_posterior, False
    try:
        yield
    finally:
        autoencoder.sample_posterior = sampled


@torch.no_grad()
def _reconstructed(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """What the autoencoder gives back of images, from the mean of its posterior."""
    with posterior_mean(autoencoder):
        return autoencoder.decode(autoencoder.encode(images)).float().clamp(-1, 1)
