"""What an evaluation is of: the images that a model is asked for, and the real ones they are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from lpl_lightning.data.base import ImageDataModule, SampleRequests
from lpl_lightning.data.captions import read_prompts
from lpl_lightning.evaluation.image_files import ImageFiles
from lpl_lightning.module import LatentDiffusionModule

__all__ = ["real_images", "requested"]


def requested(
    trainer: pl.Trainer, module: LatentDiffusionModule, num_images: int, seed: int, prompts: str | None = None
) -> SampleRequests:
    """The images that a model is asked for, going round its classes or captions.

    Args:
        trainer: Its data give captions, if there is no file of them.
        module: The model.
        num_images: How many.
        seed: Image ``i`` is drawn from seed ``seed + i``.
        prompts: Text file of captions, one a line.

    Raises:
        ValueError: The model goes by captions, and there are none.
    """
    num_classes = getattr(module.conditioner, "num_classes", None)
    if num_classes is not None:
        return SampleRequests(num_images, num_classes, seed)
    data = getattr(trainer, "datamodule", None)
    captions: Sequence[str] = ()
    if prompts is not None:
        captions = read_prompts(Path(prompts).expanduser())
    elif isinstance(data, ImageDataModule):
        captions = tuple(data.validation_captions())
    if not captions:
        raise ValueError("The model goes by captions, but the data give none: give Evaluation `prompts`, a file.")
    return SampleRequests(num_images, seed=seed, captions=captions)


def real_images(
    trainer: pl.Trainer, side: int, reference: str | None = None, convert: bool = False
) -> tuple[Any, dict[str, Any], str | None, Any]:
    """The real images: those of a folder, or else of the trainer's data, of the test set or for validation.

    Args:
        trainer: Whose data are taken, and whose stage says which.
        side: Side in pixels that images of a folder are brought to.
        reference: Folder of real images.
        convert: Read images of that folder that are not RGB of 8 bits as training does.

    Returns:
        The dataset, what a report says of it, a key of it for the cache or None, and how its items become batches or
        None.

    Raises:
        ValueError: There are no real images.
    """
    if reference is not None:
        files = ImageFiles(reference, "reference", side, convert)
        return files, {"name": reference, **files.provenance()}, files.quick_key(), None
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, ImageDataModule):
        if not data.has_images:
            raise ValueError(
                f"Evaluation needs real images, and {type(data).__name__} holds latents: give it `reference`, a folder "
                "of images."
            )
        split: Literal["val", "test"] = "test" if trainer.testing else "val"
        return data.dataset(split), data.describe(split), None, None
    loaded = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    dataset = getattr(loaded, "dataset", None)
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "Evaluation found no set of images to measure generated ones against: give it `reference`, a folder of "
            "real images."
        )
    return dataset, {"name": f"images of {type(dataset).__name__}"}, None, getattr(loaded, "collate_fn", None)
