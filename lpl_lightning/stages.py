r"""A decoder as a list of stages, so that it can stop early and show what it has made on its way.

:math:`\phi_l` of the Latent Perceptual Loss (Berrada et al., ICLR 2025, eq. 2) is the output of a decoder's stage l.
Here are the families of diffusers that decode images; ``video_stages`` has those that decode video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, cast

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderRAE,
    AutoencoderTiny,
    VQModel,
)
from torch import Tensor, nn

__all__ = ["Stage", "check_stages", "decoder_stages"]


def _output(output: Tensor) -> Tensor:
    return output


@dataclass(frozen=True)
class Stage:
    """One step of a decoder.

    Attributes:
        name: Its name in configs and logs.
        run: Takes the output of the stage before, the latent (B, C, h, w) at first, and gives its own: a tensor, or
            whatever the next stage takes.
        is_feature: Whether its output is a feature map that the Latent Perceptual Loss may compare. The last stage,
            "image", which makes the image out of the last features, is none; others that are none, such as a
            convolution of the latents, can be left out.
        read: The feature map (B, C, h, w) in its output, where that is something else.
    """

    name: str
    run: Callable[[Any], Any]
    is_feature: bool = True
    read: Callable[[Any], Tensor] = _output


@singledispatch
def decoder_stages(model: nn.Module) -> list[Stage]:
    """Split a model's decoder into stages, from the unscaled latent to the image.

    Register a function for another class of autoencoder with ``@decoder_stages.register``, and one for
    ``latents.latent_space`` where the model's config does not say what its latents are.

    Args:
        model: An autoencoder.

    Returns:
        Stages which run one after another equal the model's own ``decode``. The last is called "image" and is no
        feature. They may hold the model's modules but no state from one run to the next.

    Raises:
        ValueError: No function is registered for the model's class.
    """
    raise ValueError(
        f"`model` must be an autoencoder whose decoder can be split into stages, got {type(model).__name__}. "
        f"Known are {sorted(cls.__name__ for cls in decoder_stages.registry if cls is not object)}. For another, name "
        "modules of its decoder in `feature_modules`, or register a function that lists its stages with "
        "lpl_lightning.stages.decoder_stages.register."
    )


def check_stages(model: nn.Module) -> None:
    """Refuse a model without stages, or whose last one is not the image."""
    stages = decoder_stages(model)
    if stages[-1].name != "image" or stages[-1].is_feature:
        raise ValueError(
            f"The last of the decoder_stages of {type(model).__name__} must be 'image' with is_feature=False, "
            f"got {[stage.name for stage in stages]}."
        )


@decoder_stages.register(AutoencoderKL)
@decoder_stages.register(AsymmetricAutoencoderKL)
@decoder_stages.register(AutoencoderKLFlux2)
def _(model: Any) -> list[Stage]:
    decoder = model.decoder

    def up(block: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda features: cast(Tensor, block(features, None))

    stages = [Stage("post_quant_conv", model.post_quant_conv, False)] if model.post_quant_conv is not None else []
    stages.append(Stage("mid", lambda z: decoder.mid_block(decoder.conv_in(z), None)))
    stages += [Stage(f"up_{i}", up(block)) for i, block in enumerate(decoder.up_blocks)]
    return [
        *stages,
        Stage("image", lambda phi: decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(phi))), False),
    ]


@decoder_stages.register
def _(model: VQModel) -> list[Stage]:
    """Quantizes first, with the straight-through gradient that the model's quantizer has.

    With ``norm_type="spatial"`` every later block is normalized by the quantized latent, which therefore travels along.
    """
    decoder = model.decoder
    spatial = model.config["norm_type"] == "spatial"
    Pair = tuple[Tensor, Tensor | None]

    def along(pair: Tensor | Pair) -> Pair:
        """A latent and what goes along with it, also where the stage that pairs them was left out."""
        return pair if isinstance(pair, tuple) else (pair, pair if spatial else None)

    def post_quant(z: Tensor) -> Pair:
        return model.post_quant_conv(z), z if spatial else None

    def middle(latent: Tensor | Pair) -> Pair:
        z, quantized = along(latent)
        return decoder.mid_block(decoder.conv_in(z), quantized), quantized

    def up(block: nn.Module) -> Callable[[Pair], Pair]:
        return lambda pair: (block(*pair), pair[1])

    def image(pair: Pair) -> Tensor:
        phi, quantized = pair
        normed = decoder.conv_norm_out(phi) if quantized is None else decoder.conv_norm_out(phi, quantized)
        return cast(Tensor, decoder.conv_out(decoder.conv_act(normed)))

    def features(pair: Pair) -> Tensor:
        return pair[0]

    return [
        Stage("quantize", lambda z: model.quantize(z)[0], False),
        Stage("post_quant_conv", post_quant, False),
        Stage("mid", middle, read=features),
        *(Stage(f"up_{i}", up(block), read=features) for i, block in enumerate(decoder.up_blocks)),
        Stage("image", image, False),
    ]


@decoder_stages.register
def _(model: AutoencoderTiny) -> list[Stage]:
    layers = list(model.decoder.layers)
    starts = [0, *(i for i, layer in enumerate(layers) if isinstance(layer, nn.Upsample))]
    blocks = [nn.Sequential(*layers[a:b]) for a, b in zip(starts, [*starts[1:], len(layers) - 1], strict=True)]
    to_rgb = layers[-1]
    return [
        Stage("mid", lambda z: blocks[0](torch.tanh(z / 3) * 3)),
        *(Stage(f"up_{i}", block) for i, block in enumerate(blocks[1:])),
        Stage("image", lambda phi: to_rgb(phi).mul(2).sub(1), False),
    ]


@decoder_stages.register
def _(model: AutoencoderDC) -> list[Stage]:
    """Its blocks are stored shallow last and upsample first, so that the first to run is at the latent's resolution."""
    decoder = model.decoder
    deepest, *others = [block for block in reversed(decoder.up_blocks) if len(block)]  # one without layers does nothing

    def middle(z: Tensor) -> Tensor:
        phi = decoder.conv_in(z)
        if decoder.in_shortcut:
            phi = phi + z.repeat_interleave(decoder.in_shortcut_repeats, dim=1)
        return cast(Tensor, deepest(phi))

    def image(phi: Tensor) -> Tensor:
        normed = decoder.norm_out(phi.movedim(1, -1)).movedim(-1, 1)
        return cast(Tensor, decoder.conv_out(decoder.conv_act(normed)))

    ups = [Stage(f"up_{i}", block) for i, block in enumerate(others)]
    return [Stage("mid", middle), *ups, Stage("image", image, False)]


@decoder_stages.register
def _(model: AutoencoderRAE) -> list[Stage]:
    """A vision transformer: tokens (B, 1 + N, C) with a class token, which the feature maps (B, C, h, w) leave out."""
    decoder = model.decoder

    def tokens(z: Tensor) -> Tensor:
        z = model._denormalize_latents(z / model.config["scaling_factor"])
        patches = decoder.interpolate_latent(decoder.decoder_embed(z.flatten(2).transpose(1, 2)))
        class_token = decoder.trainable_cls_token.expand(len(z), -1, -1)
        return cast(Tensor, torch.cat([class_token, patches], dim=1) + decoder.decoder_pos_embed.to(patches.dtype))

    def grid(phi: Tensor) -> Tensor:
        maps = phi[:, 1:].transpose(1, 2)
        return cast(Tensor, maps.unflatten(2, (round(maps.shape[2] ** 0.5), -1)))

    def image(phi: Tensor) -> Tensor:
        patches = decoder.decoder_pred(decoder.decoder_norm(phi))[:, 1:]
        return cast(Tensor, model._denormalize_image(decoder.unpatchify(patches)))

    first, *others = decoder.decoder_layers
    return [
        Stage("layer_0", lambda z: first(tokens(z)), read=grid),
        *(Stage(f"layer_{i}", layer, read=grid) for i, layer in enumerate(others, start=1)),
        Stage("image", image, False),
    ]
