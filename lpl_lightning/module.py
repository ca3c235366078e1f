r"""Training of a latent diffusion or flow model.

images, condition -> ``Autoencoder.encode`` -> z0 -> ``NoiseProcess`` -> (z_t, t) -> ``Denoiser`` -> prediction ->
``NoiseProcess.estimate_z0`` -> z0_hat -> losses:

.. math:: L = \mathbb{E} \, w_t \| p - p^* \|^2 + \sum_{terms}

with the prediction's target :math:`p^*` and the terms that callbacks add, such as ``LPLCallback``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from lpl_lightning.agreement import (
    MEANING,
    check_batch,
    check_encoded,
    check_meaning,
    check_noise,
    check_precision,
    check_prediction,
    check_range,
    meaning_of,
    warn_of_meaning,
)
from lpl_lightning.arguments import check_divides
from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.base_weights import BASE, BaseWeights
from lpl_lightning.conditioning import Conditioner
from lpl_lightning.denoiser import Denoiser, check_image_sizes
from lpl_lightning.draws import Draws, Generators, normal
from lpl_lightning.fine_tuning import FineTuning
from lpl_lightning.generation import GeneratingModule
from lpl_lightning.mixin import LPLMixin
from lpl_lightning.noise import NoiseProcess
from lpl_lightning.optimization import Maker, build_optimizers, check_optimizer
from lpl_lightning.pretrained import check_fit, read_notes, read_state, resize_positions
from lpl_lightning.processes import counted, process_means
from lpl_lightning.sampling import Sampler
from lpl_lightning.sharding import load_whole, shard

__all__ = ["LatentDiffusionModule"]

PARTS = ["autoencoder", "noise", "denoiser", "conditioner", "optimizer", "lr_scheduler", "sampler", "fine_tuning"]


class LatentDiffusionModule(LPLMixin, GeneratingModule):
    """A latent diffusion or flow model, in parts.

    Batches are dictionaries with ``image`` (B, 3, H, W) in [-1, 1], or the latents of images that were encoded before
    (``clean_latents``), and what the conditioner asks for. Logged are
    ``loss``, ``loss_diffusion`` and what callbacks add; in validation and test the same with ``val_`` and ``test_``,
    on noise and times that are the same each time.

    Args:
        autoencoder: The frozen autoencoder.
        noise: How latents are noised and what the denoiser predicts.
        denoiser: The network that is trained.
        conditioner: What makes the denoiser's condition of a batch, and its dropout for guidance.
        optimizer: Makes the optimizer of the trainable parameters.
        lr_scheduler: Makes a schedule that advances once a step.
        sampler: How images are sampled; by default 50 steps with guidance 2.
        weights: Weights to start from, for post-training: a checkpoint (.ckpt), a .safetensors file or
            ``embedded:NAME``. Optimizer and step count start anew; to go on with a run give its checkpoint as
            ``ckpt_path`` instead. Grids of position embeddings are resized to this model's. Of a checkpoint whose
            weights mean something else is warned. Of a run of LoRA, its LoRA is gone on with, over the weights that it
            was trained over, loaded from where they were.
        weights_ema: Decay of the moving average to take from a checkpoint given as ``weights``; by default its weights
            are taken as they were trained.
        fine_tuning: Which weights are trained; by default all of the denoiser's and the conditioner's.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        noise: NoiseProcess,
        denoiser: Denoiser,
        conditioner: Conditioner,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        sampler: Sampler | None = None,
        weights: str | None = None,
        weights_ema: float | None = None,
        fine_tuning: FineTuning | None = None,
    ) -> None:
        super().__init__()
        # Built by hand, the parts are objects, which a checkpoint that runs no code cannot hold: load_from_checkpoint
        # is given them again. Built by the command line, they are plain config, and it builds them itself.
        self.save_hyperparameters(ignore=PARTS)
        if "_instantiator" in self.hparams:
            self.save_hyperparameters()
        self.autoencoder = autoencoder
        self.noise = noise
        self.denoiser = denoiser
        self.conditioner = conditioner
        self.optimizer: OptimizerCallable = Maker(optimizer)
        self.lr_scheduler: LRSchedulerCallable | None = None if lr_scheduler is None else Maker(lr_scheduler)
        self.sampler = sampler if sampler is not None else Sampler()
        self.weights = weights
        self.base = weights
        """What the weights were trained from, also where a checkpoint has taken their place since."""
        self.fine_tuning = fine_tuning
        self._base: BaseWeights | None = None
        """What a LoRA is trained over, which checkpoints do not hold."""
        self.begun = BaseWeights()
        """What this run begins from, if it does not go on from a checkpoint."""
        self._evaluated = 0  # samples of the set at hand, by this process
        if weights is None and weights_ema is not None:
            raise ValueError(
                f"`weights_ema`={weights_ema} says which weights of `weights` to take: give `weights` too."
            )
        # Here rather than in setup, which runs before each evaluation too, and after weights to average are copied.
        self._start_from(weights, weights_ema)

    def _start_from(self, source: str | None, ema: float | None) -> None:
        """Load weights and prepare the fine-tuning: after them, or before where they are of one already."""
        tuning = self.fine_tuning
        found = None if source is None else read_state(source, ema)
        is_tuned = tuning is not None and found is not None and tuning.made(found)
        base = BaseWeights(source, ema)
        if source is not None and is_tuned and tuning is not None and not tuning.saves_all:
            base = BaseWeights.said_by(read_notes(source))
            if base.must_be_loaded(self.denoiser, source) and base.source is not None:
                self._load(read_state(base.source, base.ema), base.source)
                BaseWeights.of(self.denoiser, base.source, base.ema).agreed(base)
        elif source is not None and found is not None and not is_tuned:
            self._load(found, source)
            self.begun = BaseWeights.of(self.denoiser, source, ema)
        if tuning is not None:
            if not tuning.saves_all:
                self._base = BaseWeights.of(self.denoiser, base.source, base.ema)
                self.base = base.source
            tuning.prepare(self.denoiser)
        if source is not None and found is not None and is_tuned:
            self._load(found, source)
            self.begun = BaseWeights.of(self.denoiser, source, ema)
        if source is not None:
            # A checkpoint of this module holds its own weights and asks for no others but a LoRA's base.
            own = self._base if self._base is not None else BaseWeights()
            self.hparams["weights"], self.hparams["weights_ema"] = own.source, own.ema

    def configure_model(self) -> None:
        """Share the weights out between processes, where the strategy is FSDP2's."""
        mesh = self.device_mesh
        if mesh is None:
            return
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"The model is sharded along data alone, but ModelParallelStrategy has `tensor_parallel_size` "
                f"{mesh['tensor_parallel'].size()}: take lpl_lightning.FSDP2Strategy, or set it to 1 and "
                "`data_parallel_size` to the number of processes."
            )
        shard(self, self.denoiser, self.conditioner, mesh["data_parallel"])
        # Weights that are first gathered in inference mode, as by `validate` before `fit`, could not be trained.
        for loop in (self.trainer.validate_loop, self.trainer.test_loop, self.trainer.predict_loop):
            loop.inference_mode = False

    def prepare_data(self) -> None:
        """Check that the parts and the data fit, before the data module looks at its images."""
        self._check_parts()

    def setup(self, stage: str) -> None:
        """Check that the parts and the data fit, before the first step."""
        self._check_parts()
        super().setup(stage)

    def _check_parts(self) -> None:
        check_noise(self.noise)
        if self.autoencoder.space.rank not in (None, 4):
            raise ValueError(
                f"`autoencoder`: {type(self.autoencoder.model).__name__} is one of video, and this module trains on "
                "images. Take one of images, or LatentPerceptualLoss in a loop of your own, which takes both."
            )
        if self._image_size is not None:
            check_divides(self._image_size, self.autoencoder.downscale)
        latent_size = None if self._image_size is None else self.latent_size
        self.denoiser.check(self.autoencoder.latent_channels, latent_size, self.conditioner)
        sizes = getattr(getattr(self.trainer, "datamodule", None), "image_sizes", ())
        check_image_sizes(sizes, self.autoencoder, self.denoiser)
        self.conditioner.check(getattr(self.trainer, "datamodule", None))
        self.sampler.check(self.noise)
        check_encoded(getattr(self.trainer, "datamodule", None), self.autoencoder, self.conditioner)
        if self.trainer.training:
            check_precision(self.parameters(), str(self.trainer.precision))

    def on_validation_epoch_start(self) -> None:
        """Begin the set anew."""
        self._evaluated = 0

    def on_test_epoch_start(self) -> None:
        """Begin the set anew."""
        self._evaluated = 0

    def load_weights(self, source: str, ema: float | None = None) -> None:
        """Load trained weights, of this model with any autoencoder, at any resolution.

        Of a checkpoint whose weights were trained for another noise process or other latents is warned.

        Args:
            source: A checkpoint (.ckpt), a .safetensors file or ``embedded:NAME``.
            ema: Decay of the moving average to take; None takes the weights as they were trained.

        Raises:
            ValueError: The weights are of another model, or of a LoRA that was trained over other weights than its.
        """
        found = read_state(source, ema)
        if self._base is not None:
            self._base = self._base.agreed(BaseWeights.said_by(read_notes(source)))
        self._load(found, source)

    def _load(self, found: Mapping[str, Tensor], source: str) -> None:
        own = self.state_dict()
        fitted = resize_positions(own, found)
        check_fit(own, fitted, source)
        warn_of_meaning(self.meaning(), source)
        load_whole(self, fitted)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, or of the same model trained for something else, in one sentence."""
        if "state_dict" in checkpoint:  # a folder of shards is loaded before, and holds none
            check_fit(self.state_dict(), checkpoint["state_dict"], "the checkpoint")
        if self._trainer is not None and self.trainer.state.fn == "fit":
            check_optimizer(self.configure_optimizers(), checkpoint)
        if self._base is None:
            self.base = checkpoint.get(BASE, self.base)
        else:
            found = BaseWeights.said_by(checkpoint)
            # One that was drawn at random is another wherever the config of a checkpoint alone is built again.
            if self._trainer is not None or self.denoiser.is_pretrained or found.source is not None:
                self._base = self._base.agreed(found)
            self.base = self._base.source
        check_meaning(self.meaning(), checkpoint)
        super().on_load_checkpoint(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the weights mean, which their shapes do not tell, and what they were trained from."""
        checkpoint[MEANING] = self.meaning()
        self.begun.note_begun(checkpoint)
        if self.base is not None:
            checkpoint[BASE] = self.base
        if self._base is not None:
            self._base.note(checkpoint)
        super().on_save_checkpoint(checkpoint)

    def meaning(self) -> dict[str, Any]:
        """What the weights mean: what the denoiser predicts, of which noise, and how latents are scaled."""
        return meaning_of(self.noise, self.autoencoder)

    def _step(self, batch: dict[str, Any], stage: Literal["train", "val", "test"], batch_idx: int) -> Tensor:
        training = stage == "train"
        check_batch(batch)
        if batch_idx == 0:  # not at each, since an accelerator would be waited for
            check_range(batch)
        size = len(batch["image"] if "image" in batch else batch["latent"])
        draws, kept = self._draw(size, stage, batch_idx)
        z0 = self.clean_latents(batch, draws.generators)
        noisy = self.noise.sample(z0, draws.generators, self.noise.times(draws.time))
        drop = self.conditioner.dropped(draws.drop) if training else None
        condition = self.conditioner({**batch, "caption_draw": draws.caption}, size, drop)
        prediction = self.denoiser(noisy.z_t, noisy.t, condition)
        check_prediction(self.denoiser, prediction, noisy.z_t)
        errors = (prediction.float() - self.noise.target(noisy)).square().flatten(1).mean(dim=1)
        diffusion = (self.noise.weight(noisy) * errors)[:kept].sum() / max(1, kept)
        z0_hat = self.noise.estimate_z0(prediction, noisy)
        latents = (z0_hat[:kept], noisy.z0[:kept], noisy.noise_to_signal[:kept])
        loss: Tensor = diffusion + self.auxiliary_loss(*latents, prediction, draws.of_first(kept))
        values = {"loss": loss, "loss_diffusion": diffusion}
        if training:
            values = process_means(values, self.device)
        for name, value in values.items():
            shown = training or name == "loss"
            name = name if training else f"{stage}_{name}"
            self.log(name, value, prog_bar=shown, batch_size=counted(kept), sync_dist=not training)
        return loss

    def _draw(self, size: int, stage: Literal["train", "val", "test"], batch_idx: int) -> tuple[Draws, int]:
        """Random numbers of a batch's samples, and how many of these are not there to fill up a process's share."""
        if stage == "train":
            return self.training_draws(size), size
        trainer = self._trainer
        if trainer is None:
            return Draws.of(0, batch_idx * size, size), size
        rank, ranks = trainer.global_rank, trainer.world_size
        # They take turns in a set for evaluation, and those that get less begin again.
        first, self._evaluated = self._evaluated * ranks + rank, self._evaluated + size
        loaded: Any = trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders
        sampler, end = getattr(loaded, "sampler", None), first + size * ranks
        if isinstance(sampler, DistributedSampler):
            held = len(cast(Sized, sampler.dataset))
            # Where batches are made beforehand, as those of buckets are, it has whole batches to give.
            end = min(end, held) if loaded.batch_size else end * (batch_idx * ranks + rank < held)
        kept = len(range(first, end, ranks))
        return Draws.of(0, first, size, step=ranks), kept

    def clean_latents(self, batch: Mapping[str, Any], generator: Generators | None = None) -> Tensor:
        """Scaled latents z0 of a batch, of its images, or drawn from the posteriors that were found of them before.

        Args:
            batch: ``image`` (B, 3, H, W) in [-1, 1]; or ``latent`` (B, C, h, w), mean of scaled latents in any floating
                type, and, where it is to be drawn, ``latent_std``.
            generator: Source of the posterior's noise, one or one a sample.

        Returns:
            (B, C, h, w).
        """
        if "latent" not in batch:
            return self.autoencoder.encode(batch["image"], generator)
        mean, deviation = batch["latent"].float(), batch.get("latent_std")
        if deviation is None or not self.autoencoder.sample_posterior:
            return cast(Tensor, mean)
        return cast(Tensor, mean + deviation.float() * normal(mean.shape, generator, mean.device))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One step of training."""
        return self._step(batch, "train", batch_idx)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same losses on noise and times that are the same each time."""
        self._step(batch, "val", batch_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As in validation."""
        self._step(batch, "test", batch_idx)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the trainable parameters, and its schedule."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return build_optimizers(trained, self.optimizer, self.lr_scheduler)
