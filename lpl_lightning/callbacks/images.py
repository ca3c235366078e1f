"""Images that a run makes: grids during training, and files from ``lpl predict``."""

from __future__ import annotations

from itertools import compress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchvision.utils import make_grid

from lpl_lightning.arguments import at_least
from lpl_lightning.callbacks.ema import averaged
from lpl_lightning.data.base import ImageDataModule, SampleRequests
from lpl_lightning.data.listing import some
from lpl_lightning.evaluation.generated import (
    GeneratedFolder,
    generation_settings,
    goes_by_captions,
    not_finite,
    to_uint8,
    write_png,
)
from lpl_lightning.evaluation.report import check_folder
from lpl_lightning.generation import evaluating
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.run_folder import log_picture, run_folder
from lpl_lightning.sharding import unsharded

__all__ = ["ImageWriter", "SampleGrid"]


class SampleGrid(Callback):
    """Writes a grid of samples as PNG: at the start of training, every n steps, and at the end.

    All grids of a run use the same seeds, so that they can be compared. They lie in ``samples/`` of the run's folder
    and go to all loggers that have pictures, TensorBoard and Weights & Biases. With an ``EMA`` callback before it they
    show the average, from its first update on. Images that are not finite are warned of, and black: they are no reason
    to end a training run.

    Models that go by captions draw the first ones of the validation images, unless ``prompts`` are given.

    Args:
        num_images: How many, going round the classes or prompts.
        columns: Images in a row; a multiple of the number of classes puts a class in each column.
        every_n_steps: Optimizer steps between grids; none gives the first and the last only.
        seed: Image ``i`` is drawn from seed ``seed + i``.
        batch_size: Images sampled at once.
        prompts: What to draw, for models that go by captions.
    """

    def __init__(
        self,
        num_images: int = 64,
        columns: int = 8,
        every_n_steps: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        prompts: list[str] | None = None,
    ) -> None:
        at_least(1, num_images=num_images, columns=columns, batch_size=batch_size)
        if every_n_steps is not None:
            at_least(1, every_n_steps=every_n_steps)
        self.num_images = num_images
        self.columns = columns
        self.every_n_steps = every_n_steps
        self.seed = seed
        self.batch_size = batch_size
        self.prompts = prompts
        self._last_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that cannot generate."""
        if not isinstance(pl_module, LatentDiffusionModule):
            raise ValueError(
                f"SampleGrid draws from a LatentDiffusionModule, got {type(pl_module).__name__}; "
                "take it out of trainer.callbacks."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what the model makes before this run."""
        self._last_step = -1
        self._draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw every n optimizer steps."""
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last grid and say where it is."""
        # Anew even where the last step was drawn: weight averaging may just have put its weights in place.
        self._last_step = -1
        path = self._draw(trainer, pl_module)
        if path is not None:
            rank_zero_info(f"Samples: {path}")

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Path | None:
        step, folder = trainer.global_step, run_folder(trainer)
        if folder is None or not isinstance(pl_module, LatentDiffusionModule):
            return None
        path = folder / "samples" / f"step-{step:08d}.png"
        if step == self._last_step:
            return path
        self._last_step = step
        requests = self._requests(trainer, pl_module)
        asked = [requests[i] for i in range(self.num_images)]
        images = []
        with averaged(trainer, pl_module), unsharded(pl_module), evaluating(pl_module):
            for start in range(0, self.num_images, self.batch_size):
                part = asked[start : start + self.batch_size]
                captions = [r["caption"] for r in part if "caption" in r] or None
                with trainer.precision_plugin.forward_context():  # as in `lpl predict`
                    images.append(pl_module.generate([r["seed"] for r in part], [r["label"] for r in part], captions))
        drawn = torch.cat(images)
        if bad := not_finite(drawn):
            seeds = some(asked[i]["seed"] for i in bad)
            rank_zero_warn(f"At step {step}, samples of the seeds {seeds} hold NaN or infinity: they are black.")
            drawn[bad] = -1
        grid = make_grid(to_uint8(drawn), nrow=self.columns)
        # Sharded models need every rank to sample; only one writes.
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(grid, path)
            log_picture(trainer, "samples", path)
        return path

    def _requests(self, trainer: pl.Trainer, pl_module: LatentDiffusionModule) -> SampleRequests:
        num_classes = pl_module.conditioner.num_classes
        if num_classes is not None:
            return SampleRequests(self.num_images, num_classes, self.seed)
        data = getattr(trainer, "datamodule", None)
        prompts = self.prompts or (data.sample_captions(self.num_images) if isinstance(data, ImageDataModule) else [])
        if not prompts:
            raise ValueError(
                "SampleGrid draws what captions say, but the data give none: give it `prompts`, a list of strings."
            )
        return SampleRequests(self.num_images, seed=self.seed, captions=prompts)


class ImageWriter(BasePredictionWriter):
    """Writes what ``lpl predict`` generates as PNG files, one folder a class, and resumes where it was stopped.

    Image ``i`` is ``DIRNAME/CLASS/i.png``, all in class 0 where the model knows no classes. For a model that goes by
    captions, its caption lies beside it in ``i.txt``, as UTF-8. Images that are there are not made again; a folder made
    with other weights, prompts or settings, which ``settings.json`` in it records, is refused, and so is one that holds
    images without such a record.

    Args:
        dirname: Where to; the folder is made if need be.
    """

    def __init__(self, dirname: str = "generated") -> None:
        super().__init__(write_interval="batch")
        self.generated = GeneratedFolder(Path(dirname))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Do not gather the images in memory, and refuse a file where their folder is to be."""
        if stage == "predict" and isinstance(pl_module, LatentDiffusionModule):
            check_folder(self.generated.folder, "dirname")
            trainer.predict_loop.return_predictions = False

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a folder whose images were made with other weights or settings."""
        if not isinstance(pl_module, LatentDiffusionModule):
            return
        data = getattr(trainer, "datamodule", None)
        settings = generation_settings(
            pl_module,
            getattr(data, "generate_seed", None),
            getattr(data, "image_size", None),
            getattr(data, "num_classes", None),
            getattr(getattr(trainer.predict_dataloaders, "dataset", None), "captions", ()),
            str(trainer.precision),
        )
        remedy = "Give another folder with --writer.dirname, or delete it."
        self.generated.claim(settings, remedy, write=trainer.is_global_zero)
        trainer.strategy.barrier()  # all have looked before any writes

    def on_predict_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take out of the batch what is there already. Each image has its own seed, so the others stay the same."""
        if not isinstance(pl_module, LatentDiffusionModule):
            return
        if not getattr(pl_module.conditioner, "num_classes", None):
            batch["label"] = torch.zeros_like(batch["label"])
        todo = [
            not self.generated.path(index, label).exists()
            for index, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True)
        ]
        for key, values in batch.items():
            if isinstance(values, Tensor):
                batch[key] = values[torch.tensor(todo, device=values.device)]
            else:
                batch[key] = list(compress(values, todo))

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch of images and, for a model that goes by them, their captions."""
        if not isinstance(pl_module, LatentDiffusionModule):
            return
        captions = batch.get("caption") if goes_by_captions(pl_module) else None
        indices, seeds = batch["index"].tolist(), batch["seed"].tolist()
        images = to_uint8(prediction, [f"{index} (seed {seed})" for index, seed in zip(indices, seeds, strict=True)])
        for i, (image, index, label) in enumerate(zip(images, indices, batch["label"].tolist(), strict=True)):
            self.generated.write(image, index, label, None if captions is None else captions[i])

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the images are."""
        if isinstance(pl_module, LatentDiffusionModule):
            rank_zero_info(f"Images: {self.generated.folder}")
