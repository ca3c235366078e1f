"""Rivals of LPL for the study, as networks that ``Autoencoder`` looks into: ``LPLCallback`` trains on each of them.

``DecodedNetwork`` is the decoder with an ImageNet classifier behind it: features of decoded images, as LPIPS compares
them (Zhang et al., 2018), without its trained weights. ``NoisedDenoiser`` is a trained denoiser: its features
of latents with noise added again (Self-Perceptual; Lin and Yang, 2024), without condition.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn

from lpl_lightning.autoencoder_loading import load_autoencoder
from lpl_lightning.metrics.weight_files import read_weights
from lpl_lightning.pretrained import read_state

__all__ = ["DecodedNetwork", "NoisedDenoiser"]


class DecodedNetwork(nn.Module):
    """Decodes latents, and passes the images through SqueezeNet 1.0.

    Its modules ``network.0`` to ``network.12`` are those of torchvision's ``features``.

    Args:
        autoencoder: Folder of the autoencoder.
        weights: File of the network's weights, for images of 0 to 255 less their mean.
    """

    def __init__(self, autoencoder: str, weights: str) -> None:
        super().__init__()
        self.decoder: Any = load_autoencoder(autoencoder, None, None, torch.float32)
        self.config = self.decoder.config
        classifier = torchvision.models.squeezenet1_0()
        classifier.load_state_dict(read_weights(weights))
        self.network = classifier.features.float()
        for module in self.network.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        self.register_buffer("mean", torch.tensor([123.0, 117.0, 104.0]).view(3, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> Any:
        """The autoencoder's."""
        return self.decoder.encode(images)

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) to images (B, 3, H, W)."""
        images = cast(Tensor, self.decoder.decode(z).sample)
        self.network((images + 1) * 127.5 - self.mean)
        return images


class NoisedDenoiser(nn.Module):
    """Adds noise to latents, the same to each at each time, and runs a trained MMDiT on them.

    Features of its blocks are those of ``backbone.transformer_blocks.N.ff``, since a block also gives back its context.

    Args:
        backbone: The untrained network.
        weights: A checkpoint of ``LatentDiffusionModule`` that it was the backbone of.
        autoencoder: Folder of the autoencoder, whose scale latents have.
        t: Time of flow matching, 0 to 1, that the noise is of.
    """

    def __init__(self, backbone: nn.Module, weights: str, autoencoder: str, t: float = 0.25) -> None:
        super().__init__()
        own = {name: tensor.float() for name, tensor in read_state(weights).items()}
        prefix = "denoiser.backbone."
        backbone.load_state_dict({k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)})
        self.backbone: Any = backbone
        found: Any = load_autoencoder(autoencoder, None, None, torch.float32)
        self.config, self.t = found.config, t
        self.shift, self.scale = float(found.config.shift_factor or 0.0), float(found.config.scaling_factor)
        null = {name: own[f"conditioner.{name}.weight"][-1] for name in ("tokens", "pooled")}
        for name, value in null.items():
            self.register_buffer(name, value, persistent=False)

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) to the prediction for them."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(z.shape[1:], generator=generator).to(z)
        noised = (1 - self.t) * (z - self.shift) * self.scale + self.t * noise
        count = len(z)
        return cast(
            Tensor,
            self.backbone(
                hidden_states=noised,
                timestep=torch.full((count,), 1000 * self.t, device=z.device),
                encoder_hidden_states=self.tokens.expand(count, 1, -1),
                pooled_projections=self.pooled.expand(count, -1),
            ).sample,
        )
