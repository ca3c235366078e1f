"""Folders of generated images: what lies where, what made them, and making those that are missing."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm

from lpl_lightning.data.base import SampleRequests
from lpl_lightning.data.listing import some
from lpl_lightning.evaluation.image_files import ImageFiles
from lpl_lightning.evaluation.report import REPORT, write_whole
from lpl_lightning.evaluation.settings import as_json, described, differing, model_settings
from lpl_lightning.generation import evaluating
from lpl_lightning.module import LatentDiffusionModule

__all__ = [
    "GeneratedFolder",
    "RequestedImages",
    "generate",
    "generation_settings",
    "goes_by_captions",
    "goes_by_labels",
    "is_unfinished",
    "not_finite",
    "to_uint8",
    "write_png",
]


RECORD = "settings.json"
"""File, in a folder of images, that says what made them."""


def not_finite(images: Tensor) -> list[int]:
    """Which of a batch of images (B, ...) hold NaN or infinity."""
    found: list[int] = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return found


def to_uint8(images: Tensor, names: Sequence[object] | None = None) -> Tensor:
    """Map images to uint8, rounding to the nearest.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        names: What each is called in an error; by default its position.

    Returns:
        (B, 3, H, W) in [0, 255], on the CPU.

    Raises:
        ValueError: Images are not finite, which as bytes would be black.
    """
    if bad := not_finite(images):
        raise ValueError(
            f"Images must be finite, but {len(bad)} of {len(images)} hold NaN or infinity: "
            f"{some(bad if names is None else [names[i] for i in bad])}. Has training diverged, or does the precision "
            "overflow? Take an earlier checkpoint, or `trainer.precision` 32-true."
        )
    return images.add(1).mul(127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def write_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8; the file appears whole or not at all."""
    part = _draft(path)
    to_pil_image(image).save(part, format="PNG")
    os.replace(part, path)


def _draft(path: Path) -> Path:
    """Where a file is written first: a place of its own, since another command may be making the same images."""
    return path.with_name(f"{path.name}.{uuid4().hex}.part")


def goes_by_captions(module: LatentDiffusionModule) -> bool:
    """Whether images are made of captions rather than of labels or of nothing."""
    return getattr(module.conditioner, "num_classes", None) is None


def goes_by_labels(module: LatentDiffusionModule) -> bool:
    """Whether images are made of labels, and lie in folders by them."""
    return bool(getattr(module.conditioner, "num_classes", None))


def is_unfinished(place: Path) -> bool:
    """Whether images were made in ``place/images``, and no report of them lies beside."""
    return (place / "images").exists() and not any(place.glob(f"*/{REPORT}"))


def generation_settings(
    module: LatentDiffusionModule,
    seed: int | None,
    image_size: int | None,
    num_classes: int | None,
    prompts: Sequence[str],
    precision: str,
    autoencoder: str | None = None,
) -> dict[str, Any]:
    """All that makes generated images what they are, as JSON holds it.

    Args:
        module: What generates them.
        seed: Seed of the first image.
        image_size: Side in pixels.
        num_classes: Classes that the images go round.
        prompts: All captions that the images go round, so that a folder can be made in parts.
        precision: The trainer's.
        autoencoder: ``weights_hash`` of the autoencoder's model, where it is known.
    """
    sampler = module.sampler
    scheduler = sampler.scheduler if sampler.scheduler is not None else module.noise.sampling_scheduler()
    settings = {
        **model_settings(module, autoencoder),
        "trainer_precision": precision,
        "scheduler": described(scheduler),
        "num_steps": sampler.num_steps,
        "guidance_scale": sampler.guidance_scale,
        "guidance_interval": sampler.guidance_interval,
        "precision": sampler.precision,
        "generate_seed": seed,
        "image_size": image_size,
        "num_classes": num_classes,
    }
    if goes_by_captions(module):
        settings["prompts_blake2b"] = hashlib.blake2b(json.dumps(list(prompts)).encode(), digest_size=16).hexdigest()
    restored: dict[str, Any] = as_json(settings)
    return restored


class GeneratedFolder:
    """A folder of generated images, one sub-folder a class; ``settings.json`` in it says what made them.

    Image ``i`` is ``FOLDER/CLASS/i.png``, all in class 0 where the model knows no classes. For a model that goes by
    captions, its caption lies beside it in ``i.txt``, as UTF-8.

    Args:
        folder: Where it is, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()

    def claim(self, settings: Mapping[str, Any], remedy: str, write: bool) -> None:
        """Note what will make the images, or see that it is what made those that are there.

        Args:
            settings: What ``generation_settings`` gave.
            remedy: What to do where it is not, for the error.
            write: Whether this process writes the note.

        Raises:
            ValueError: The folder holds images made with other settings, or nothing says with which.
        """
        record = self.folder / RECORD
        # Looked for before the record, which another process may be writing: it has none made before that.
        image = next(self.folder.glob("[0-9]*/[0-9]*.png"), None)
        if record.exists():
            if differ := differing(self._known(record, remedy), settings):
                raise ValueError(
                    f"{self.folder} holds images made with other settings ({differ}; see {record}). {remedy}"
                )
        elif image is not None:
            raise ValueError(
                f"{self.folder} holds images, such as {image.relative_to(self.folder)}, but no {RECORD} that says what "
                f"made them: they may be another model's. {remedy}"
            )
        elif write:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(record, json.dumps(settings, indent=1))

    def _known(self, record: Path, remedy: str) -> dict[str, Any]:
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{record}, which says what made the images beside it, is damaged ({error}). {remedy}"
            ) from error
        if not isinstance(known, dict):
            raise ValueError(f"{record}, which says what made the images beside it, holds no settings. {remedy}")
        return known

    def path(self, index: int, label: int) -> Path:
        """Where image ``index`` lies."""
        return self.folder / f"{label:04d}" / f"{index:06d}.png"

    def write(self, image: Tensor, index: int, label: int, caption: str | None = None) -> None:
        """Write an image (3, H, W) uint8 and, if there is one, its caption on one line, as such files have several."""
        path = self.path(index, label)
        path.parent.mkdir(parents=True, exist_ok=True)
        if caption is not None:
            # Before the image, which tells a later run that there is nothing left to do.
            text, part = path.with_suffix(".txt"), _draft(path)
            part.write_text(" ".join(caption.split()), encoding="utf-8", newline="\n")
            os.replace(part, text)
        write_png(image, path)


def generate(
    module: LatentDiffusionModule,
    requests: SampleRequests,
    folder: GeneratedFolder,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: bool = True,
    is_stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Generate the images that a folder lacks.

    An image depends on its own seed, label and caption alone: neither on the batch or process that it is made in nor on
    what was there already.

    Args:
        module: What generates them; its training mode is put back.
        requests: Images asked for.
        folder: Where to.
        batch_size: Images generated at once.
        rank: Number of this process, which makes every ``world_size``-th of the missing images.
        world_size: Number of processes, which must see one file system.
        barrier: Waits for all processes.
        precision: Makes the context that images are generated in, such as a trainer's autocast.
        progress: Whether to show a progress bar.
        is_stopped: Whether to make no more, for now; asked before each batch, by all processes at once, which must be
            answered the same.

    Returns:
        Whether the folder lacks none.
    """
    by_label = goes_by_labels(module)
    captions = goes_by_captions(module)

    def place(number: int) -> Path:
        return folder.path(number, requests[number]["label"] if by_label else 0)

    missing = [number for number in range(len(requests)) if not place(number).exists()]
    barrier()  # all have seen the same before any writes
    own = missing[rank::world_size]
    rounds = math.ceil(len(missing) / (world_size * batch_size))
    done = len(requests) - len(missing)
    with evaluating(module), tqdm(total=len(requests), initial=done, desc="Images", disable=not progress) as bar:
        for number in range(rounds):
            if is_stopped():
                return False
            # A sharded model runs on all processes or on none: who has nothing left makes an image once more.
            batch = own[number * batch_size : (number + 1) * batch_size]
            asked = [requests[image] for image in batch or missing[:1]]
            labels = [request["label"] if by_label else 0 for request in asked]
            texts = [request["caption"] for request in asked if "caption" in request] if captions else None
            seeds = [request["seed"] for request in asked]
            with torch.no_grad(), precision():
                images = to_uint8(module.generate(seeds, labels, texts), [f"seed {seed}" for seed in seeds])
            for position in range(len(batch)):
                caption = texts[position] if texts else None
                folder.write(images[position], batch[position], labels[position], caption)
            done += min(len(asked) * world_size, len(requests) - done)
            bar.update(done - bar.n)
    barrier()
    return True


class RequestedImages(ImageFiles):
    """The images that requests ask for, in their order; their folder may hold more.

    Args:
        folder: Where they lie.
        requests: What was asked for.
        by_label: Whether they lie in folders by their label.
    """

    def __init__(self, folder: GeneratedFolder, requests: SampleRequests, by_label: bool) -> None:
        super().__init__(folder.folder, "images")
        asked = [requests[number] for number in range(len(requests))]
        self.paths = [str(folder.path(one["index"], one["label"] if by_label else 0)) for one in asked]
        self.captions = [one["caption"] for one in asked if "caption" in one] or None
