"""An autoencoder of CompVis's layout, put together out of the parts of diffusers' AutoencoderKL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Posterior:
    """A posterior with no base class, as those projects have it."""

    mean: Tensor
    std: Tensor


class CompVisDecoder(nn.Module):
    """The levels are stored finest first and run from the last; level 0 has no ``upsample``."""

    mid: Any
    up: Any

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.conv_in, self.conv_out = decoder.conv_in, decoder.conv_out
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = decoder.mid_block.resnets
        (self.mid.attn_1,) = decoder.mid_block.attentions
        self.up = nn.ModuleList()
        for block in reversed(decoder.up_blocks):
            level: Any = nn.Module()
            level.block, level.attn = block.resnets, nn.ModuleList()
            if block.upsamplers is not None:
                (level.upsample,) = block.upsamplers
            self.up.append(level)
        self.norm_out = decoder.conv_norm_out

    def forward(self, z: Tensor) -> Any:
        phi: Any = self.mid.block_1(self.conv_in(z), None)
        phi = self.mid.block_2(self.mid.attn_1(phi), None)
        for level in reversed(list(self.up)):
            for i, block in enumerate(level.block):
                phi = block(phi, None)
                if len(level.attn):
                    phi = level.attn[i](phi)
            if hasattr(level, "upsample"):
                phi = level.upsample(phi)
        return self.conv_out(nn.functional.silu(self.norm_out(phi)))


class CompVisKL(nn.Module):
    """It has no config, and nothing of diffusers' but the blocks."""

    def __init__(self, kl: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv, self.post_quant_conv = kl.encoder, kl.quant_conv, kl.post_quant_conv
        self.decoder = CompVisDecoder(kl.decoder)

    def encode(self, images: Tensor) -> Posterior:
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, (0.5 * log_variance).exp())

    def decode(self, z: Tensor) -> Any:
        return self.decoder(self.post_quant_conv(z))


def frozen_as_they_do(model: nn.Module) -> nn.Module:
    """In eval mode for good, by a ``train`` that does nothing and returns what it was given."""
    model.eval().requires_grad_(False)
    vars(model)["train"] = lambda mode=True: mode
    return model
