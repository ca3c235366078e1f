"""Configs of the pretrained models that the recipes name, at their full size, as folders without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import ROOT

TINY = ROOT / "lpl_lightning" / "weights" / "tiny"
KL = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 1024,
}
CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "vae": {**KL, "latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "layers_per_block": 2,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    },
    "stabilityai/stable-diffusion-3.5-medium": {
        "vae": {
            **KL,
            "latent_channels": 16,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "text_encoder": CLIP_L | {"architectures": ["CLIPTextModelWithProjection"]},
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5_XXL,
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
    },
    "stabilityai/sdxl-vae": {"": {**KL, "latent_channels": 4, "scaling_factor": 0.13025}},
    "cross-attention/asymmetric-autoencoder-kl-x-1-5": {
        "": {
            "_class_name": "AsymmetricAutoencoderKL",
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "down_block_out_channels": [128, 256, 512, 512],
            "layers_per_down_block": 2,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "up_block_out_channels": [192, 384, 768, 768],
            "layers_per_up_block": 3,
            "sample_size": 256,
            "scaling_factor": 0.18215,
        }
    },
}


def stand_ins(root: Path) -> dict[str, str]:
    """Write the folders, with the small tokenizers that ship with the package, and say what they stand in for."""
    for hub_id, parts in MODELS.items():
        for subfolder, config in parts.items():
            folder = root / hub_id / subfolder
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(config))
            if subfolder.startswith("text_encoder"):
                name = subfolder.replace("text_encoder", "tokenizer")
                kind = "sd3" if "3.5" in hub_id else "sdxl"
                shutil.copytree(TINY / kind / name, root / hub_id / name)
    return {hub_id: f"random:{root / hub_id}" for hub_id in MODELS}
