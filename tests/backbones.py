"""Tiny untrained backbones of diffusers' families, each with the denoiser that calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from lpl_lightning import (
    Denoiser,
    DiTDenoiser,
    FluxDenoiser,
    PixArtDenoiser,
    SanaDenoiser,
    SD3Denoiser,
    UNetDenoiser,
)

TOKEN_DIM, POOLED_DIM, CLASSES = 24, 20, 8


def dit(**overrides: Any) -> DiTTransformer2DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 4,
        "patch_size": 2,
        "num_embeds_ada_norm": CLASSES,
        "norm_num_groups": 4,
    }
    return DiTTransformer2DModel(**(config | overrides))


def sd3(**overrides: Any) -> SD3Transformer2DModel:
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": TOKEN_DIM,
        "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED_DIM,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**(config | overrides))


def pixart(**overrides: Any) -> PixArtTransformer2DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "caption_channels": TOKEN_DIM,
        "sample_size": 4,
        "use_additional_conditions": False,
    }
    return PixArtTransformer2DModel(**(config | overrides))


def unet(**overrides: Any) -> UNet2DConditionModel:
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": TOKEN_DIM,
    }
    return UNet2DConditionModel(**(config | overrides))


def sdxl(**overrides: Any) -> UNet2DConditionModel:
    return unet(
        **{
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": POOLED_DIM + 6 * 4,
            **overrides,
        }
    )


def flux(**overrides: Any) -> FluxTransformer2DModel:
    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 4, 8),
        "joint_attention_dim": TOKEN_DIM,
        "pooled_projection_dim": POOLED_DIM,
    }
    return FluxTransformer2DModel(**(config | overrides))


def sana(**overrides: Any) -> SanaTransformer2DModel:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": TOKEN_DIM,
        "sample_size": 4,
        "timestep_scale": 0.5,
    }
    return SanaTransformer2DModel(**(config | overrides))


BACKBONES: dict[str, tuple[Callable[..., nn.Module], type[Denoiser]]] = {
    "DiT": (dit, DiTDenoiser),
    "SD3": (sd3, SD3Denoiser),
    "PixArt": (pixart, PixArtDenoiser),
    "UNet (SD 1.5)": (unet, UNetDenoiser),
    "UNet (SDXL)": (sdxl, UNetDenoiser),
    "Flux": (flux, FluxDenoiser),
    "Sana": (sana, SanaDenoiser),
}


def denoiser(name: str, seed: int = 0, **options: Any) -> Denoiser:
    """One of them, its weights drawn so that no output layer is zero, as some families begin with."""
    make, kind = BACKBONES[name]
    torch.manual_seed(seed)
    backbone = make()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return kind(backbone, **options).eval()
