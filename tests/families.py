"""One tiny model of each family of autoencoders, with what diffusers' pipelines do to its latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from conftest import tiny_kl, tiny_taesd
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderRAE,
    VQModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """A tiny model and how to check it.

    ``modules`` are those whose outputs are the features, in the order they run; ``read`` makes a map of their output.
    """

    make: Callable[[], Any]
    z: tuple[int, ...]
    images: tuple[int, ...]
    names: tuple[str, ...]
    modules: Callable[[Any], Sequence[nn.Module]]
    unscale: Callable[[Tensor, Any], Tensor]
    read: Callable[[Tensor], Tensor] = lambda output: output
    from_unit: bool = False

    def model(self) -> Any:
        return scrambled(self.make())

    def decode(self, model: Any, z: Tensor) -> Tensor:
        """What the pipelines get out of a scaled latent, in [-1, 1]."""
        decoded: Tensor = model.decode(self.unscale(z, model)).sample
        return decoded * 2 - 1 if self.from_unit else decoded


def scrambled(model: Any) -> Any:
    """No weight and no running statistic stays as it was made: zeros and ones would hide what is left out."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model.eval()


def plain(z: Tensor, model: Any) -> Tensor:
    """pipeline_stable_diffusion_xl.py, pipeline_stable_diffusion_3.py, pipeline_flux.py, pipeline_sana.py."""
    config = model.config
    if config.get("latents_mean") is not None:
        mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return z * std / float(config["scaling_factor"]) + mean
    return z / float(config["scaling_factor"]) + float(config.get("shift_factor") or 0.0)


def flux2(z: Tensor, model: Any) -> Tensor:
    """pipeline_flux2.py."""
    mean = model.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
    unpatchified: Tensor = Flux2Pipeline._unpatchify_latents(z * std + mean)
    return unpatchified


def video(z: Tensor, model: Any) -> Tensor:
    """pipeline_wan.py, pipeline_qwenimage.py."""
    mean = torch.tensor(model.config.latents_mean).view(1, model.config.z_dim, 1, 1, 1)
    std = 1.0 / torch.tensor(model.config.latents_std).view(1, model.config.z_dim, 1, 1, 1)
    return z / std + mean


def kl_modules(model: Any) -> Sequence[nn.Module]:
    return [model.decoder.mid_block, *model.decoder.up_blocks]


def tiny_modules(model: Any) -> Sequence[nn.Module]:
    """The last module of each resolution."""
    layers = list(model.decoder.layers)
    return [*(layers[i - 1] for i, layer in enumerate(layers) if isinstance(layer, nn.Upsample)), layers[-2]]


def dc_modules(model: Any) -> Sequence[nn.Module]:
    return [block for block in reversed(model.decoder.up_blocks) if len(block)]


def tiny_asymmetric() -> Any:
    """A decoder wider and deeper than the encoder, as in the paper."""
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        down_block_out_channels=(8, 8, 16),
        layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 3,
        up_block_out_channels=(16, 24, 32),
        layers_per_up_block=2,
        norm_num_groups=4,
    )


def tiny_flux2(**overrides: Any) -> Any:
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKLFlux2(**(config | overrides))


def tiny_vq(**overrides: Any) -> Any:
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "latent_channels": 4,
        "vq_embed_dim": 3,
        "num_vq_embeddings": 16,
        "norm_num_groups": 4,
        "scaling_factor": 0.7,
    }
    return VQModel(**(config | overrides))


# Spatial normalization has 32 groups whatever the config says.
SPATIAL: dict[str, Any] = {
    "norm_type": "spatial",
    "block_out_channels": (32, 32),
    "vq_embed_dim": None,
    "latent_channels": 3,
}


def tiny_dc(**overrides: Any) -> Any:
    """Three levels; the shallowest is empty where its number of layers is 0, as in DC-AE's f = 64 models."""
    config: dict[str, Any] = {
        "latent_channels": 4,
        "attention_head_dim": 4,
        "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (4, 8, 16),
        "decoder_block_out_channels": (4, 8, 16),
        "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 2, 1),
        "encoder_qkv_multiscales": ((), (), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,)),
        "scaling_factor": 0.41407,
    }
    return AutoencoderDC(**(config | overrides))


def tiny_rae(**overrides: Any) -> Any:
    """DINOv2 tokens of a 4 x 4 grid, decoded to 2 px patches."""
    config: dict[str, Any] = {
        "encoder_hidden_size": 64,
        "encoder_num_hidden_layers": 1,
        "encoder_patch_size": 2,
        "encoder_input_size": 8,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 3,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 48,
        "patch_size": 2,
        "latents_mean": torch.randn(64, 1, 1),
        "latents_std": torch.rand(64, 1, 1) + 0.5,
        "scaling_factor": 1.5,
    }
    return AutoencoderRAE(**(config | overrides))


def tiny_wan(**overrides: Any) -> Any:
    """Both temporal upsamplings, f = 8 (16 with patches), four frames from a latent one."""
    config: dict[str, Any] = {
        "base_dim": 4,
        "z_dim": 3,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.3, -0.2, 0.1],
        "latents_std": [1.5, 0.7, 2.0],
    }
    return AutoencoderKLWan(**(config | overrides))


def tiny_wan22() -> Any:
    return tiny_wan(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)


def tiny_qwen() -> Any:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=3,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, False],
        latents_mean=[0.3, -0.2, 0.1],
        latents_std=[1.5, 0.7, 2.0],
    )


def _kl(make: Callable[[], Any], channels: int = 4, ups: int = 3) -> Family:
    names = ("mid", *(f"up_{i}" for i in range(ups)))
    return Family(make, (2, channels, 3, 4), (2, 3, 12, 16), names, kl_modules, plain)


def _dc(make: Callable[[], Any], ups: int) -> Family:
    names = ("mid", *(f"up_{i}" for i in range(ups)))
    return Family(make, (2, 4, 3, 4), (2, 3, 12, 16), names, dc_modules, plain)


def _vq(**overrides: Any) -> Family:
    return Family(lambda: tiny_vq(**overrides), (2, 3, 3, 4), (2, 3, 6, 8), ("mid", "up_0", "up_1"), kl_modules, plain)


IMAGE_FAMILIES = {
    "sd15": _kl(lambda: tiny_kl(scaling_factor=0.18215)),
    "sdxl": _kl(lambda: tiny_kl(scaling_factor=0.13025, force_upcast=True)),
    "sd3": _kl(
        lambda: tiny_kl(
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        channels=16,
    ),
    "flux_with_quant": _kl(
        lambda: tiny_kl(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159), channels=16
    ),
    "per_channel": _kl(
        lambda: tiny_kl(
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5], scaling_factor=0.5, shift_factor=9.0
        )
    ),
    "asymmetric": _kl(tiny_asymmetric),
    "flux2": Family(tiny_flux2, (2, 16, 3, 4), (2, 3, 12, 16), ("mid", "up_0", "up_1"), kl_modules, flux2),
    "flux2_no_quant": Family(
        lambda: tiny_flux2(use_quant_conv=False, use_post_quant_conv=False),
        (2, 16, 3, 4),
        (2, 3, 12, 16),
        ("mid", "up_0", "up_1"),
        kl_modules,
        flux2,
    ),
    "vq": _vq(),
    "vq_spatial": _vq(**SPATIAL),
    "tiny": Family(
        lambda: tiny_taesd(scaling_factor=1.3),
        (2, 4, 3, 4),
        (2, 3, 24, 32),
        ("mid", "up_0", "up_1", "up_2"),
        tiny_modules,
        plain,
    ),
    "dc": _dc(tiny_dc, ups=2),
    "dc_no_shortcut": _dc(lambda: tiny_dc(decoder_in_shortcut=False, upsample_block_type="interpolate"), ups=2),
    "dc_empty_block": _dc(
        lambda: tiny_dc(encoder_layers_per_block=(0, 1, 1), decoder_layers_per_block=(0, 1, 2)), ups=1
    ),
    "rae": Family(
        tiny_rae,
        (2, 64, 4, 4),
        (2, 3, 8, 8),
        ("layer_0", "layer_1", "layer_2"),
        lambda model: list(model.decoder.decoder_layers),
        lambda z, model: z,
        read=lambda tokens: torch.stack([tokens[:, 1 + i] for i in range(16)], dim=2).reshape(2, -1, 4, 4),
        from_unit=True,
    ),
}

VIDEO_FAMILIES = {
    "wan": Family(
        tiny_wan, (2, 3, 3, 2, 1), (2, 3, 9, 16, 8), ("mid", "up_0", "up_1", "up_2", "up_3"), kl_modules, video
    ),
    "wan22": Family(
        tiny_wan22, (2, 3, 3, 2, 1), (2, 3, 9, 32, 16), ("mid", "up_0", "up_1", "up_2", "up_3"), kl_modules, video
    ),
    "qwen": Family(tiny_qwen, (2, 3, 3, 2, 1), (2, 3, 5, 8, 4), ("mid", "up_0", "up_1", "up_2"), kl_modules, video),
}
FAMILIES = IMAGE_FAMILIES | VIDEO_FAMILIES
