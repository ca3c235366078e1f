"""Evaluation of what a model generates: in ``lpl test``, and during training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from lpl_lightning.arguments import at_least
from lpl_lightning.callbacks.ema import averaged, decay_in_place
from lpl_lightning.callbacks.preemption import Preemption
from lpl_lightning.data.base import ImageDataModule
from lpl_lightning.evaluation.cache import ReferenceCache, default_folder
from lpl_lightning.evaluation.evaluator import Evaluator
from lpl_lightning.evaluation.generated import (
    GeneratedFolder,
    RequestedImages,
    generate,
    generation_settings,
    goes_by_captions,
    goes_by_labels,
    is_unfinished,
)
from lpl_lightning.evaluation.image_metrics import SpectrumMetrics
from lpl_lightning.evaluation.inputs import real_images, requested
from lpl_lightning.evaluation.measure import Sets
from lpl_lightning.evaluation.reconstruction_metrics import ReconstructionMetrics
from lpl_lightning.evaluation.report import VALIDATION, Report, check_folder, check_other
from lpl_lightning.evaluation.settings import digest
from lpl_lightning.evaluation.suite import Suite
from lpl_lightning.frozen import weights_hash
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.pretrained import read_checkpoint
from lpl_lightning.run_folder import loaded_run_folder, log_picture, run_folder

__all__ = ["Evaluation"]


class Evaluation(Callback):
    """Generates images, measures them against real ones, and writes a report.

    In ``lpl test``, where it always stands by, it does so at the end, and likewise in ``lpl validate``, with few images
    and cheap metrics. With ``every_n_steps`` it does so during training instead: the values are logged as
    ``eval_NAME``, which ``ModelCheckpoint`` may monitor. Where an ``EMA`` callback averages weights, the average is
    evaluated. A signal that ends the run stops the images (``Preemption``); the run that goes on from there makes the
    rest and the report first, which no ``ModelCheckpoint`` sees.

    The images of a model lie in ``evaluation/NAME/images``, or ``validation/NAME/images``, of the run's folder: of the
    checkpoint's run, if there is a checkpoint, or else of this one. NAME is the checkpoint's or step's with a hash of
    all that makes the images. Images that are there are not made again, so that an evaluation goes on where it was
    stopped; processes must see one file system. A report of them lies beside, in ``evaluation/NAME/COUNT-images-HASH``,
    whose hash is of suite, real images and numbers, so that none takes the place of another.

    Args:
        num_images: How many images are generated, going round the classes or captions; 0 evaluates nothing.
        suite: What is measured; by default what needs no downloaded weights, and in validation what a few images
            suffice for. ``configs/metrics/paper.yaml`` is one with FID.
        reference: Folder of the real images, brought to the data's size; by default those of the data's test set, or
            in validation and during training of its validation set, so that no checkpoint is chosen by test images.
        convert: Read images of ``reference`` that are not RGB of 8 bits as training does; by default they are refused.
        reconstruct: Whether the autoencoder's reconstructions of the real images are measured too.
        every_n_steps: Optimizer steps of training between evaluations; None evaluates in ``stage``.
        seed: Image ``i`` is drawn from seed ``seed + i``.
        prompts: Text file of captions, one a line, for models that go by them; by default those of the data's
            validation images.
        batch_size: Images generated, or passed through networks, at once by a process.
        num_workers: Processes that read images, for each process that evaluates.
        dirname: Folder of the one report, and of ``images`` beside it, in place of the above; another report that lies
            there is refused. During training it takes the place of ``evaluation``.
        cache: Whether to keep what was computed of the real images for the next time, in the user's folder for caches.
        stage: The command that evaluates.

    Attributes:
        report: The last one.
        folder: Where it lies.
        origin: Checkpoint that the model's weights were taken from by hand, and the decay of the average, if it is one.
    """

    def __init__(
        self,
        num_images: int = 10_000,
        suite: Suite | None = None,
        reference: str | None = None,
        convert: bool = False,
        reconstruct: bool = True,
        every_n_steps: int | None = None,
        seed: int = 0,
        prompts: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        dirname: str | None = None,
        cache: bool = True,
        stage: Literal["test", "validate"] = "test",
    ) -> None:
        at_least(1, batch_size=batch_size)
        at_least(0, num_images=num_images, num_workers=num_workers)
        if stage not in ("test", "validate"):
            raise ValueError(f"`stage` must be test or validate, got {stage!r}.")
        if every_n_steps is not None:
            at_least(1, every_n_steps=every_n_steps)
        self.num_images, self.reference, self.convert = num_images, reference, convert
        self.stage = stage
        cheap = [SpectrumMetrics(), ReconstructionMetrics()]
        self.suite = suite if suite is not None else Suite() if stage == "test" else Suite([*cheap])
        self.reconstruct, self.every_n_steps, self.seed, self.prompts = reconstruct, every_n_steps, seed, prompts
        self.batch_size, self.num_workers, self.dirname = batch_size, num_workers, dirname
        self.cache = ReferenceCache(default_folder() if cache else None)
        self.report: Report | None = None
        self.folder: Path | None = None
        self.origin: tuple[Path, float | None] | None = None
        self._evaluator: Evaluator | None = None
        self._measured: Any = None  # data that the evaluator has seen
        self._sets: Sets | None = None
        self._autoencoder = ""  # hash of its weights, taken once
        self._last_step = -1
        self._said = False

    @property
    def state_key(self) -> str:
        """Its own for each way of evaluating."""
        return self._generate_state_key(stage=self.stage, every_n_steps=self.every_n_steps, dirname=self.dirname)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be evaluated, before anything is trained."""
        self._last_step = trainer.global_step
        if self.every_n_steps is not None and run_folder(trainer) is not None:
            if not isinstance(pl_module, LatentDiffusionModule):
                raise ValueError(
                    f"Evaluation generates with a LatentDiffusionModule, got {type(pl_module).__name__}; take it out "
                    "of trainer.callbacks."
                )
            self._check(trainer, pl_module)
            if trainer.global_step and trainer.global_step % self.every_n_steps == 0:
                for preemption in self._preemptions(trainer):
                    preemption.listen(trainer)
                self._evaluate_step(trainer, pl_module, if_begun=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate every n optimizer steps."""
        step = trainer.global_step
        if self.every_n_steps is None or step == self._last_step or step % self.every_n_steps:
            return
        self._last_step = step
        values = self._evaluate_step(trainer, pl_module)
        pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False)

    def _evaluate_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, if_begun: bool = False
    ) -> dict[str, float]:
        """Evaluate what the training has come to, and log it."""
        step = trainer.global_step
        with averaged(trainer, pl_module) as decay:
            made = {"global_step": step, "ema": decay}
            report = self._evaluate(trainer, pl_module, f"step-{step:08d}", made, if_begun)
        values = {} if report is None else {f"eval_{name}": value.value for name, value in report.values.items()}
        for logger in trainer.loggers if values else ():  # now, whatever `log_every_n_steps` says
            logger.log_metrics(values, step=step)
        return values

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be evaluated, before the test loss is computed."""
        if self._is_due("test", trainer, pl_module):
            self._check(trainer, cast(LatentDiffusionModule, pl_module))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate after the test loss."""
        if self._is_due("test", trainer, pl_module):
            self._evaluate_loaded(trainer, pl_module, "test")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be evaluated, before the validation loss is computed."""
        if self._is_due("validate", trainer, pl_module) and self._has_real(trainer):
            self._check(trainer, cast(LatentDiffusionModule, pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate after the validation loss."""
        if self._is_due("validate", trainer, pl_module) and self._has_real(trainer):
            self._evaluate_loaded(trainer, pl_module, "val")

    def _is_due(self, stage: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        is_asked = self.every_n_steps is None and self.num_images > 0 and self.stage == stage
        is_run = trainer.state.fn == stage and run_folder(trainer) is not None
        return is_asked and is_run and isinstance(pl_module, LatentDiffusionModule)

    def _has_real(self, trainer: pl.Trainer) -> bool:
        """Whether there is what a validation's spectra are held against; who asks for its losses need not have it."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ImageDataModule):
            found = data.has_images
        else:
            found = hasattr(getattr(trainer.val_dataloaders, "dataset", None), "__len__")
        if self.reference is None and not found and not self._said:
            self._said = True
            rank_zero_info(
                "No images are drawn to be compared: the data hold no real ones. Give `--validation.reference`, a "
                "folder of them."
            )
        return self.reference is not None or found

    def _evaluate_loaded(self, trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str) -> None:
        """Evaluate weights as they were given to the trainer."""
        source, decay = (trainer.ckpt_path, None) if self.origin is None else self.origin
        made: dict[str, Any] = {"weights": getattr(pl_module, "weights", None)}
        if source is not None:
            checkpoint = read_checkpoint(str(source), "ckpt_path", weights=False)
            decay = decay_in_place(trainer, checkpoint) if self.origin is None else decay
            made = {"checkpoint": str(source), "global_step": checkpoint.get("global_step"), "ema": decay}
        report = self._evaluate(trainer, pl_module, "weights" if source is None else Path(source).stem, made)
        if report is not None:
            values = {f"{prefix}_{name}": value.value for name, value in report.values.items()}
            # The same in all processes; Lightning warns of what is not said to be brought together.
            pl_module.log_dict(values, sync_dist=True)

    def _check(self, trainer: pl.Trainer, module: LatentDiffusionModule) -> None:
        """Refuse sets that cannot be measured, and captions that are not there."""
        requests = requested(trainer, module, self.num_images, self.seed, self.prompts)
        side = module.latent_size * module.autoencoder.downscale
        dataset, _, _, _ = real_images(trainer, side, self.reference, self.convert)
        model = module.autoencoder.model
        self._autoencoder = weights_hash(model)
        autoencoder = self._reconstructing(trainer, module) if self.reconstruct else None
        if self.dirname is not None:
            check_folder(Path(self.dirname).expanduser(), "dirname")
        self._sets = Sets(side, len(dataset), len(requests), goes_by_captions(module), autoencoder)
        self.suite.check(self._sets)

    def _reconstructing(self, trainer: pl.Trainer, module: LatentDiffusionModule) -> str:
        """All that what an autoencoder gives back depends on."""
        made = module.autoencoder
        around = f", autocast of {trainer.precision}" if made.autocast else ""
        return f"{type(made.model).__name__} {self._autoencoder} in {made.dtype}{around}"

    def _evaluate(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        name: str,
        made: dict[str, Any],
        if_begun: bool = False,
    ) -> Report | None:
        """Evaluate the weights in place, or with ``if_begun`` only where that was stopped; a signal stops it."""
        if run_folder(trainer) is None or not isinstance(pl_module, LatentDiffusionModule) or self._sets is None:
            return None
        with isolate_rng():
            requests = requested(trainer, pl_module, self.num_images, self.seed, self.prompts)
            settings = generation_settings(
                pl_module,
                self.seed,
                self._sets.image_size,
                requests.num_classes,
                requests.captions,
                str(trainer.precision),
                self._autoencoder,
            )
            places = [self._place(trainer, name, settings)]
            if if_begun:  # here, or in the folder of the run that goes on
                places = list(filter(is_unfinished, [*places, self._place(trainer, name, settings, trainer.ckpt_path)]))
            if (place := trainer.strategy.broadcast(places[0] if places else None)) is None:
                return None
            images = GeneratedFolder(place / "images")
            remedy = "Give another folder as `dirname`, or delete it."
            images.claim(settings, remedy, write=trainer.is_global_zero)
            # Before images are made, since a report that is in the way is told by the real ones.
            evaluator = self._with_real(trainer, pl_module, self._sets)
            self.folder = folder = place
            if self.dirname is None or trainer.training:
                self.folder = folder = place / f"{self.num_images}-images-{digest(evaluator.made)}"
            else:
                check_other(folder, "dirname", evaluator.made)
            is_whole = generate(
                pl_module,
                requests,
                images,
                self.batch_size,
                trainer.global_rank,
                trainer.world_size,
                trainer.strategy.barrier,
                trainer.precision_plugin.forward_context,
                trainer.is_global_zero,
                lambda: any(preemption.is_received(trainer) for preemption in self._preemptions(trainer)),
            )
            if not is_whole:
                rank_zero_info(
                    f"The evaluation stops; the run that goes on from here makes the rest of {images.folder}."
                )
                return None
            generated = RequestedImages(images, requests, goes_by_labels(pl_module))
            where = Path(os.path.relpath(images.folder, folder)).as_posix()
            report = evaluator.measure(generated, place.name, {"folder": where})
        report.generation = {**made, "seed": self.seed, **settings}
        if trainer.testing and report.reference.get("split") == "val":
            report.notes.append(
                "The data have no test images: the real ones are the validation images, by which a checkpoint may have "
                "been chosen."
            )
        if trainer.is_global_zero:
            evaluator.write(report, folder)
            for picture in sorted(folder.glob("*.png")):
                log_picture(trainer, f"eval_{picture.stem}", picture)
            rank_zero_info(f"Evaluation: {folder / 'report.md'}")
        self.report = report
        return report

    def _preemptions(self, trainer: pl.Trainer) -> list[Preemption]:
        """Those that end the training at a signal as soon as this callback is done."""
        callbacks: list[Any] = trainer.callbacks if trainer.training else [self]  # type: ignore[attr-defined]
        return [one for one in callbacks[callbacks.index(self) :] if isinstance(one, Preemption)]

    def _with_real(self, trainer: pl.Trainer, module: LatentDiffusionModule, sets: Sets) -> Evaluator:
        """The evaluator with the real images measured, which is done once."""
        loaded = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        real = getattr(trainer, "datamodule", None) or loaded
        if self._evaluator is None or self._evaluator.sets != sets or self._measured is not real:
            self._measured = real
            dataset, about, key, collate = real_images(trainer, sets.image_size, self.reference, self.convert)
            self._evaluator = Evaluator(
                self.suite,
                module.device,
                self.cache,
                self.batch_size,
                self.num_workers,
                trainer.global_rank,
                trainer.world_size,
            )
            autoencoder = module.autoencoder if self.reconstruct else None
            self._evaluator.take_real(dataset, sets, about, key, autoencoder, collate)
        return self._evaluator

    def _place(
        self, trainer: pl.Trainer, name: str, settings: dict[str, Any], stopped: str | Path | None = None
    ) -> Path:
        """Where the images lie, in ``images``; of training, in this run's folder or in that of the one that stopped."""
        named = f"{name}-{digest(settings)}"
        if self.dirname is not None:
            given = Path(self.dirname).expanduser().absolute()
            return given / named if trainer.training else given
        source = stopped if trainer.training else trainer.ckpt_path if self.origin is None else self.origin[0]
        run = loaded_run_folder(trainer, source)
        assert run is not None  # else nothing is evaluated
        return run.absolute() / (VALIDATION if trainer.validating else "evaluation") / named
