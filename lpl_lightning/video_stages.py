"""Decoders of video as stages: Wan's causal one, and Qwen-Image's, which is the same with images as one-frame videos.

These models decode one latent frame at a time, and their convolutions keep the last frames they saw in a cache. All
their convolutions are causal, so that a stage may as well take all frames at once: only the first frame, which is not
upsampled in time, and which the temporal upsampling of later frames does not see, must go ahead of the others, with a
cache that the stage keeps for the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from torch import Tensor, nn

from lpl_lightning.stages import Stage, decoder_stages

__all__ = ["causal_video_stages"]


@decoder_stages.register(AutoencoderKLWan)
@decoder_stages.register(AutoencoderKLQwenImage)
def causal_video_stages(model: Any) -> list[Stage]:
    """Split the decoder of AutoencoderKLWan or AutoencoderKLQwenImage into stages.

    Args:
        model: The autoencoder.

    Returns:
        "post_quant_conv", "mid", "up_0" and so on, "image". Latents are (B, C, T, h, w); features are
        (B, C_l, 1 + n_l (T - 1), h_l, w_l), where n_l frames come of each latent frame after the first.
    """
    decoder = model.decoder
    patch_size = model.config.get("patch_size") or 1
    stages = [
        Stage("post_quant_conv", model.post_quant_conv, False),
        Stage("mid", lambda z: decoder.mid_block(decoder.conv_in(z))),
    ]
    for i, block in enumerate(decoder.up_blocks):
        upsamples_time = any(hasattr(module, "time_conv") for module in block.modules())
        stages.append(Stage(f"up_{i}", _first_frame_ahead(block) if upsamples_time else block))

    def image(phi: Tensor) -> Tensor:
        video = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(phi)))
        return _unpatchify(video, patch_size).clamp(-1, 1)

    return [*stages, Stage("image", image, False)]


def _first_frame_ahead(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """Run a block that upsamples in time on the first frame, then on all others with what it left in the cache."""
    # Only Wan 2.2's blocks have a shortcut around the upsampling, which must know the first frame.
    marks_first = isinstance(getattr(block, "avg_shortcut", None), nn.Module)

    def run(phi: Tensor) -> Tensor:
        cache: list[Any] = [None] * len(list(block.modules()))  # one entry per causal convolution, and to spare
        outputs = []
        for start, stop in ((0, 1), (1, phi.shape[2])):
            if start < stop:
                first = {"first_chunk": start == 0} if marks_first else {}
                outputs.append(block(phi[:, :, start:stop], feat_cache=cache, feat_idx=[0], **first))
        return torch.cat(outputs, dim=2)

    return run


def _unpatchify(video: Tensor, size: int) -> Tensor:
    """(B, C size^2, T, h, w) to (B, C, T, h size, w size); Wan 2.2 has a patch's columns before its rows."""
    patches = video.unflatten(1, (-1, size, size))  # (B, C, column, row, T, h, w)
    return cast(Tensor, patches.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4))
