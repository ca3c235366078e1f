"""What the image data modules share: loaders, what becomes of bad images, and requests for images to generate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lpl_lightning.arguments import at_least
from lpl_lightning.data.batches import EpochPlan, Shuffled, TrainingLoader
from lpl_lightning.data.buckets import Assignment
from lpl_lightning.data.captions import read_prompts
from lpl_lightning.data.faults import Faults, Unreadable, read_faults
from lpl_lightning.data.listing import some
from lpl_lightning.processes import own_place
from lpl_lightning.run_folder import run_folder

__all__ = ["ImageDataModule", "SampleRequests"]

Split = Literal["train", "val", "test"]

STAGE_SPLITS: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": (),
}
"""Splits that a stage of the trainer needs."""

REPORT = "bad_data.jsonl"
"""File, in the folder of a run, that says which images it left out and why."""


class Request(TypedDict):
    """One image to generate: its number, its class, the seed of its noise and, where there are any, its caption."""

    index: int
    label: int
    seed: int
    caption: NotRequired[str]


class SampleRequests(Dataset[Request]):
    """Requests for images to generate, balanced over the classes: image ``i`` is of class ``i % num_classes``.

    Each image has a seed of its own, so it does not depend on the batch, the rank or the run it is made in.

    Args:
        num_images: How many images to generate.
        num_classes: How many classes to go round; 0 for an unconditional model (every label is then 0).
        seed: Image ``i`` is drawn from seed ``seed + i``.
        captions: Captions to go round: image ``i`` has number ``i % len(captions)``. Without any, requests hold none.
    """

    def __init__(self, num_images: int, num_classes: int = 0, seed: int = 0, captions: Sequence[str] = ()) -> None:
        at_least(0, num_images=num_images, num_classes=num_classes)
        self.num_images = num_images
        self.num_classes = num_classes
        self.seed = seed
        self.captions = captions

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Request:
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        label = index % self.num_classes if self.num_classes else 0
        request: Request = {"index": index, "label": label, "seed": self.seed + index}
        if self.captions:
            request["caption"] = self.captions[index % len(self.captions)]
        return request


class ImageDataModule(pl.LightningDataModule, ABC):
    """A data module of square images; subclasses say where the images come from.

    ``lpl predict`` asks it for images to generate: ``num_generate`` of them, balanced over the classes and going round
    the prompts. A subclass whose items have a ``caption`` overrides ``has_captions`` and ``validation_captions``.

    Training batches depend on the seed, the epoch and their number alone, and a run that goes on from a checkpoint gets
    the batches that it had not seen (``batches.TrainingLoader``). The seed is torch's, as ``seed_everything`` sets it.

    Args:
        image_size: Side of the images, in pixels.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 loads in the training process.
        num_generate: How many images ``lpl predict`` generates.
        generate_seed: Generated image ``i`` is drawn from seed ``generate_seed + i``.
        prompts: Text file of the captions of generated images, one a line; None takes those of the validation images.
        faults: What becomes of images that cannot be read. Without a file of its own, its report is
            ``bad_data.jsonl`` in the run's folder.
    """

    def __init__(
        self,
        image_size: int,
        batch_size: int,
        num_workers: int,
        num_generate: int,
        generate_seed: int,
        prompts: str | Path | None = None,
        faults: Faults | None = None,
    ) -> None:
        super().__init__()
        at_least(1, image_size=image_size, batch_size=batch_size)
        at_least(0, num_workers=num_workers, num_generate=num_generate)
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.num_generate = num_generate
        self.generate_seed = generate_seed
        self.prompts = None if prompts is None else Path(prompts).expanduser().absolute()
        self.faults = Faults() if faults is None else faults
        self._order_seed: int | None = None
        self._goes_on = False  # whether that is of a checkpoint that training goes on from
        self._reporting: pl.Trainer | None = None
        self._run_report: Path | None = None
        self._found_beforehand: dict[str, str] = {}

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels; empty where there are none."""

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart; 0 where there are none."""
        return len(self.class_names)

    @property
    def has_captions(self) -> bool:
        """Whether batches hold a ``caption``."""
        return False

    @property
    def has_images(self) -> bool:
        """Whether batches hold ``image``, and not latents in its place."""
        return True

    def validation_captions(self) -> Iterator[str]:
        """One caption of each validation image, in order, without decoding images; nothing without captions."""
        return iter(())

    def sample_captions(self, num: int) -> list[str]:
        """Captions of the first ``num`` validation images, going round if there are fewer; [] without captions."""
        return list(islice(cycle(self.validation_captions()), num))

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[dict[str, Any]]:
        """The images of one split."""

    def describe(self, split: Split) -> dict[str, Any]:
        """What a report says of the images of a split: their ``name`` and the ``split`` that they are of, at least."""
        split = self._source(split)
        return {"name": f"{split} images of {type(self).__name__}", "split": split, "image_size": self.image_size}

    def _source(self, split: Split) -> Split:
        """The split whose images stand for those of one: validation's, where there are none for test."""
        return split

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of all that images may have; with more than one, each batch is of one of them."""
        return ((self.image_size, self.image_size),)

    def training_batches(self, batch_size: int) -> tuple[Dataset[dict[str, Any]], EpochPlan]:
        """The training images, and which of them make the batches of an epoch.

        Args:
            batch_size: Images in a batch of all processes together.
        """
        dataset = self.dataset("train")
        return dataset, self.plan(dataset, batch_size)

    def assignment(self, split: Split) -> Assignment | None:
        """Which size each image of a split is brought to, in the order of ``dataset``; None for squares alone."""
        return None

    def plan(self, dataset: Dataset[dict[str, Any]], batch_size: int) -> EpochPlan:
        """Which items make the training batches of an epoch.

        Args:
            dataset: The training images.
            batch_size: Images in a batch of all processes together.
        """
        assert isinstance(dataset, Sized)
        return Shuffled(len(dataset), batch_size)

    def _write_faults_into_run(self) -> None:
        """Let the report of bad images lie in the run's folder, one for each trainer; all processes must call this."""
        trainer = self.trainer
        if trainer is None or trainer is self._reporting or self.faults.report not in (None, self._run_report):
            return
        folder = run_folder(trainer)
        self._reporting, self._run_report = trainer, None if folder is None else folder / REPORT
        self.faults.begin(self._run_report)
        self._write_faults(self._found_beforehand)  # which is looked for once

    def _write_faults(self, bad: Mapping[str, str]) -> None:
        """Write images down that were found bad beforehand, reasons by name, once for all processes."""
        self._found_beforehand |= bad
        if self.trainer is None or self.trainer.is_global_zero:
            self.faults.write(bad)

    def _left_out(self, bad: Mapping[str, str], total: int, what: str, is_harmless: bool = False) -> None:
        """Leave out what was found bad beforehand, or refuse to.

        Args:
            bad: Reasons by name.
            total: How many items those are among.
            what: What they are, for the warning.
            is_harmless: Whether nothing is lost with them, so that they may be any number.

        Raises:
            Unreadable: They are not to be skipped.
            ValueError: They are too many.
        """
        if not bad:
            return
        if self.faults.on_error == "raise":
            raise Unreadable(*next(iter(bad.items())))
        self._write_faults(bad)
        if not is_harmless:
            self.faults.check_share(len(bad), total, bad)
        rank_zero_warn(
            f"Left out {len(bad)} of {total} {what}: "
            f"{some(f'{name} ({reason})' for name, reason in bad.items())}. Mend or remove them to be rid of this "
            "warning."
        )

    def _eval_loader(self, split: Split) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            self.dataset(split),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else what training draws would depend on when it is validated
        )

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled training batches; the same ones in order where the trainer is to overfit some.

        A loader that is taken by hand is for the processes that torch.distributed has by then, which need equal seeds,
        and knows of no ``limit_train_batches``: what that leaves of an epoch is one of its own.
        """
        self._write_faults_into_run()
        if getattr(self.trainer, "overfit_batches", 0):
            return self._eval_loader("train")
        trainer = self.trainer
        # A loader that is taken by hand, also after a run, is for no trainer's epochs.
        asking = trainer if trainer is not None and trainer.state.status == TrainerStatus.RUNNING else None
        rank, ranks = own_place() if asking is None else (asking.global_rank, asking.world_size)
        progress: Any = None if asking is None else asking.fit_loop.epoch_progress.current
        begins = asking is not None and not (asking.global_step or progress.processed or self._goes_on)
        if self._order_seed is None or begins:
            own = torch.initial_seed() % 2**63
            self._order_seed = own if trainer is None else int(trainer.strategy.broadcast(own))
        dataset, plan = self.training_batches(self.batch_size * ranks)
        if asking is None:
            return TrainingLoader(dataset, plan, self._order_seed, rank, ranks, self.num_workers)
        # Lightning asks anew in the middle of a run, and gives a loader no state where a run goes on at an epoch's end.
        # So it begins where the epochs that the trainer has counted end, as `set_epoch` would have it.
        limit = asking.limit_train_batches
        return TrainingLoader(
            dataset, plan, self._order_seed, rank, ranks, self.num_workers, limit, iteration=progress.processed
        )

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep: the seed of order and draws."""
        return {} if self._order_seed is None else {"order_seed": self._order_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the seed of ``state_dict``, in all loaders that the trainer asks for; not where it evaluates."""
        if self.trainer is None or self.trainer.state.fn == "fit":
            self._order_seed = state_dict.get("order_seed", self._order_seed)
            self._goes_on = "order_seed" in state_dict

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Validation batches, in order."""
        self._write_faults_into_run()
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Test batches, in order."""
        self._write_faults_into_run()
        return self._eval_loader("test")

    def teardown(self, stage: str | None = None) -> None:
        """Say how many items were left out in all, by all processes."""
        self._goes_on = False
        report = self.faults.report
        if report is not None and (count := len(read_faults(report))):
            rank_zero_info(f"{count} items could not be used: {report} names them.")

    def predict_dataloader(self) -> DataLoader[Request]:
        """Requests for ``num_generate`` images: ``index``, ``label`` and ``seed``, each (B,) int64.

        With ``prompts``, or else where there are captions, they also hold ``caption``, a list of B strings.

        Raises:
            FileNotFoundError: ``prompts`` does not exist.
            ValueError: ``prompts`` is not a UTF-8 text file with at least one line, or ``num_generate`` is 0.
        """
        if self.num_generate == 0:
            raise ValueError("`data.num_generate` is 0: there is nothing to generate.")
        # All captions, not as many as are asked for, so that requests of a longer run begin as those of a shorter.
        captions = tuple(self.validation_captions()) if self.prompts is None else read_prompts(self.prompts)
        requests = SampleRequests(self.num_generate, self.num_classes, self.generate_seed, captions)
        return DataLoader(requests, batch_size=self.batch_size)


def to_unit_range(image_uint8: Tensor) -> Tensor:
    """Map a uint8 image in [0, 255] to float32 in [-1, 1]."""
    return image_uint8.float().div_(127.5).sub_(1.0)
