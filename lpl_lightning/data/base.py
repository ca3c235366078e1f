"""What the image data modules share: loaders, and requests for images to generate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lpl_lightning.arguments import at_least
from lpl_lightning.data.captions import read_prompts

__all__ = ["ImageDataModule", "SampleRequests"]

Split = Literal["train", "val", "test"]


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

    Args:
        image_size: Side of the images, in pixels.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 loads in the training process.
        num_generate: How many images ``lpl predict`` generates.
        generate_seed: Generated image ``i`` is drawn from seed ``generate_seed + i``.
        prompts: Text file of the captions of generated images, one a line; None takes those of the validation images.
    """

    def __init__(
        self,
        image_size: int,
        batch_size: int,
        num_workers: int,
        num_generate: int,
        generate_seed: int,
        prompts: str | Path | None = None,
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
        return {"name": f"{split} images of {type(self).__name__}", "split": split, "image_size": self.image_size}

    def _loader(self, split: Split) -> DataLoader[dict[str, Any]]:
        dataset = self.dataset(split)
        assert isinstance(dataset, Sized)
        train = split == "train"
        ranks = self.trainer.world_size if self.trainer is not None else 1
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=train,
            # A partial batch would weigh its samples more; a set smaller than a batch must still yield one.
            drop_last=train and len(dataset) // ranks >= self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled training batches."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Validation batches, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Test batches, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Request]:
        """Requests for ``num_generate`` images: ``index``, ``label`` and ``seed``, each (B,) int64.

        With ``prompts``, or else where there are captions, they also hold ``caption``, a list of B strings.

        Raises:
            FileNotFoundError: ``prompts`` does not exist.
            ValueError: ``prompts`` is not a UTF-8 text file with at least one line.
        """
        # All captions, not as many as are asked for, so that requests of a longer run begin as those of a shorter.
        captions = tuple(self.validation_captions()) if self.prompts is None else read_prompts(self.prompts)
        requests = SampleRequests(self.num_generate, self.num_classes, self.generate_seed, captions)
        return DataLoader(requests, batch_size=self.batch_size)


def to_unit_range(image_uint8: Tensor) -> Tensor:
    """Map a uint8 image in [0, 255] to float32 in [-1, 1]."""
    return image_uint8.float().div_(127.5).sub_(1.0)
