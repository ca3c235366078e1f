r"""Training of the autoencoder itself.

.. math:: L = \|x - \hat x\|_1 + w_{KL} \, KL(q(z|x) \,\|\, N(0, 1)) + w_P \, P(\hat x, x)

with the first two terms as means over pixels and over latent elements, so that neither depends on the image's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio

from lpl_lightning.arguments import check_divides, check_sizes
from lpl_lightning.drawing import DrawingModule
from lpl_lightning.optimization import Maker, build_optimizers, check_optimizer
from lpl_lightning.pretrained import check_fit
from lpl_lightning.processes import counted

__all__ = ["AutoencoderModule", "autoencoder_kl"]


def autoencoder_kl(
    block_out_channels: list[int],
    latent_channels: int = 4,
    layers_per_block: int = 2,
    norm_num_groups: int = 32,
    mid_block_add_attention: bool = True,
    sample_size: int = 256,
) -> AutoencoderKL:
    """Make an untrained ``AutoencoderKL`` without quantization convolutions.

    A config names this function where it would name the class: diffusers annotates the class's lists of blocks as
    tuples of one element, which a parser of types must refuse.

    Args:
        block_out_channels: Channels of each block from the images inwards; n of them downsample by 2 ** (n - 1).
        latent_channels: Channels of the latents.
        layers_per_block: Residual layers in an encoder block; a decoder block has one more.
        norm_num_groups: Groups of the normalization; divides every entry of ``block_out_channels``.
        mid_block_add_attention: Attention between the encoder's and the decoder's middle layers.
        sample_size: Side of the images in pixels, kept in the model's config.
    """
    if uneven := [channels for channels in block_out_channels if channels % norm_num_groups]:
        raise ValueError(
            f"`norm_num_groups`={norm_num_groups} must divide every entry of `block_out_channels`, got {uneven}."
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
        block_out_channels=tuple(block_out_channels),
        latent_channels=latent_channels,
        layers_per_block=layers_per_block,
        norm_num_groups=norm_num_groups,
        mid_block_add_attention=mid_block_add_attention,
        sample_size=sample_size,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


class AutoencoderModule(DrawingModule):
    """Trains a diffusers ``AutoencoderKL`` on images with L1, KL and, if given, a perceptual loss.

    Validation reconstructs from the posterior's mean and logs ``val_psnr`` (dB, from the squared error over all
    pixels of the set, images in [-1, 1]), and measures the latents' mean and standard deviation, which
    ``SaveAutoencoder`` writes into the saved model as ``shift_factor`` and ``scaling_factor``.

    Args:
        autoencoder: The model to train, randomly initialised or pretrained.
        optimizer: Makes the optimizer of the autoencoder's parameters.
        lr_scheduler: Makes a schedule that advances once a step.
        kl_weight: Weight of the KL divergence, in nats per latent element.
        perceptual: Called with the reconstruction and the image, both (B, 3, H, W) in [-1, 1], gives a loss of any
            shape, whose mean is taken; ``lpips.LPIPS`` serves. Frozen, and kept out of the checkpoint.
        perceptual_weight: Its weight.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        kl_weight: float = 5e-4,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
    ) -> None:
        super().__init__()
        # Objects cannot go into a checkpoint that runs no code; what the command line was given is plain and can.
        self.save_hyperparameters(ignore=["autoencoder", "optimizer", "lr_scheduler", "perceptual"])
        if "_instantiator" in self.hparams:
            self.save_hyperparameters()
        self.autoencoder = autoencoder
        self.optimizer: OptimizerCallable = Maker(optimizer)
        self.lr_scheduler: LRSchedulerCallable | None = None if lr_scheduler is None else Maker(lr_scheduler)
        self.kl_weight = kl_weight
        self.perceptual_weight = perceptual_weight
        # In a tuple, so that it is neither saved, trained nor counted as part of this module.
        self._perceptual = (perceptual.eval().requires_grad_(False),) if perceptual is not None else ()
        self.psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0))
        self.latent_mean = MeanMetric()
        self.latent_square = MeanMetric()

    def setup(self, stage: str) -> None:
        """Check that the images fit, before the first step."""
        data = getattr(self.trainer, "datamodule", None)
        if getattr(data, "has_images", None) is False:
            raise ValueError(f"An autoencoder is trained on images, and {type(data).__name__} holds latents.")
        image_size = getattr(data, "image_size", None)
        if isinstance(image_size, int):
            downscale = 2 ** (len(self.autoencoder.config.block_out_channels) - 1)
            check_divides(image_size, downscale)
            why = f"the autoencoder downscales by {downscale}"
            check_sizes(getattr(data, "image_sizes", ()), downscale, why)
        super().setup(stage)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model in one sentence."""
        check_fit(self.state_dict(), checkpoint["state_dict"], "the checkpoint")
        if self._trainer is not None and self.trainer.state.fn == "fit":
            check_optimizer(self.configure_optimizers(), checkpoint)
        super().on_load_checkpoint(checkpoint)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images from the mean of their posterior: (B, 3, H, W) in [-1, 1] in and out."""
        reconstruction: Tensor = self.autoencoder.decode(self.autoencoder.encode(images).latent_dist.mode()).sample
        return reconstruction

    def _step(self, images: Tensor, stage: Literal["train", "val", "test"]) -> Tensor:
        posterior = self.autoencoder.encode(images).latent_dist
        training = stage == "train"
        generators: Any = self.training_draws(len(images)).generators if training else None  # a list, too
        latents = posterior.sample(generators) if training else posterior.mode()
        reconstruction = self.autoencoder.decode(latents).sample
        l1 = (reconstruction - images).abs().mean()
        kl = posterior.kl().sum() / latents.numel()
        loss: Tensor = l1 + self.kl_weight * kl
        logs = {"l1": l1, "kl": kl}
        for perceptual in self._perceptual:
            with torch.inference_mode(False):  # of a validation, whose tensors could take part in no later graph
                perceptual.to(images.device)
            logs["perceptual"] = perceptual(reconstruction, images).mean()
            loss = loss + self.perceptual_weight * logs["perceptual"]
        prefix = "" if training else f"{stage}_"
        counts: dict[str, Any] = {"batch_size": counted(len(images)), "sync_dist": not training}
        self.log(f"{prefix}loss", loss, prog_bar=True, **counts)
        for name, value in logs.items():
            self.log(f"{prefix}loss_{name}", value, prog_bar=training, **counts)
        if not training:
            self.psnr(reconstruction, images)
            self.log(f"{stage}_psnr", self.psnr, prog_bar=True, batch_size=len(images))
        if stage == "val":
            self.latent_mean.update(latents.float())
            self.latent_square.update(latents.float().square())
        return loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One training step on ``batch["image"]``."""
        return self._step(batch["image"], "train")

    def on_validation_epoch_start(self) -> None:
        """Forget the latents' statistics of the last validation."""
        self.latent_mean.reset()
        self.latent_square.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Reconstruct from the posterior's mean."""
        self._step(batch["image"], "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Reconstruct from the posterior's mean."""
        self._step(batch["image"], "test")

    def latent_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of the latents of the last validation, over all elements."""
        mean = self.latent_mean.compute()
        return mean.item(), (self.latent_square.compute() - mean.square()).sqrt().item()

    @torch.no_grad()
    def measured_latents(self, batches: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
        """As ``latent_statistics``, of the latents of other batches, by this process alone; None where there are none.

        Args:
            batches: Of images.
        """
        autoencoder, count, total, squares = self.autoencoder, 0, 0.0, 0.0
        for batch in batches:
            images = batch["image"].to(autoencoder.device, autoencoder.dtype)
            latents = autoencoder.encode(images).latent_dist.mode().double()
            count += latents.numel()
            total, squares = total + latents.sum().item(), squares + latents.square().sum().item()
        if not count:
            return None
        mean = total / count
        return mean, max(squares / count - mean**2, 0.0) ** 0.5

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the autoencoder's parameters, and its schedule."""
        return build_optimizers(self.autoencoder.parameters(), self.optimizer, self.lr_scheduler)
