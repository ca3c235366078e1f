"""Trains a tiny decoder for the latents of an autoencoder, with an encoder of its own: AutoencoderTiny of diffusers.

    python notebooks/distill.py PHOTOS/train notebooks/tiny_autoencoder

It learns to decode what the autoencoder decodes, by the mean absolute error over pixels, and to encode what it encodes,
by the mean squared error. For LPL it is that autoencoder at a part of its decoder's cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import AutoencoderTiny
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

from lpl_lightning import Autoencoder
from lpl_lightning.data import ImageFolderDataModule


class Distillation(pl.LightningModule):
    """A tiny autoencoder, and the one that it learns from.

    Args:
        teacher: Of scaled latents (B, C, h, w) and images (B, 3, H, W) in [-1, 1].
        channels: Of all layers.
        blocks: Residual blocks at each resolution of the decoder, from the latents outwards; each but the last
            doubles it.
        lr: Largest learning rate.
    """

    def __init__(self, teacher: Autoencoder, channels: int, blocks: tuple[int, ...], lr: float) -> None:
        super().__init__()
        # In a tuple, so that it is neither trained nor saved.
        self.teacher, self.lr = (teacher,), lr
        sides = (channels,) * len(blocks)
        self.student: Any = AutoencoderTiny(
            encoder_block_out_channels=sides,
            decoder_block_out_channels=sides,
            num_encoder_blocks=blocks[::-1],
            num_decoder_blocks=blocks,
            latent_channels=teacher.latent_channels,
        )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """One on ``batch["image"]``."""
        images, (teacher,) = batch["image"], self.teacher
        with torch.no_grad():
            latents = teacher.to(images.device).encode(images)
            decoded = teacher.decode(latents)
        losses = {
            "decoder": l1_loss(self.student.decode(latents).sample, decoded),
            "encoder": mse_loss(self.student.encode(images).latents, latents),
        }
        self.log_dict(losses, prog_bar=True)
        return sum(losses.values(), torch.zeros((), device=images.device))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, warmed up and then down to nothing."""
        optimizer = torch.optim.Adam(self.student.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="folder of images, with a folder a class")
    parser.add_argument("out", type=Path, help="folder to save to")
    parser.add_argument("--model", default="notebooks/autoencoder", help="folder, hub id or embedded:NAME")
    parser.add_argument("--image-size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--channels", type=int, default=16, help="of all layers")
    parser.add_argument("--blocks", type=int, nargs="+", default=(2, 2, 1), help="at each resolution of the decoder")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    given = parser.parse_args()
    pl.seed_everything(0)
    autoencoder = Autoencoder(given.model)
    if (2 ** (len(given.blocks) - 1)) != autoencoder.downscale:
        parser.error(
            f"`--blocks` {given.blocks} upsample by {2 ** (len(given.blocks) - 1)}; the latents are smaller "
            f"than the images by {autoencoder.downscale}."
        )
    module = Distillation(autoencoder, given.channels, tuple(given.blocks), given.lr)
    data = ImageFolderDataModule(
        given.photos, image_size=given.image_size, batch_size=given.batch_size, horizontal_flip=True, num_workers=0
    )
    trainer = pl.Trainer(max_steps=given.steps, logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    module.student.save_pretrained(given.out)
