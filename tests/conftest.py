"""Small real models that the tests share."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The tests' models are tiny: threads would wait for each other longer than they work. Processes of tests follow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel, SD3Transformer2DModel
from forked import FORKED

from lpl_lightning import (
    DDPM,
    Autoencoder,
    ClassLabels,
    ClassTokens,
    DiTDenoiser,
    FlowMatching,
    LatentDiffusionModule,
    Sampler,
    SD3Denoiser,
)

# Here, since it has no effect once a test has started such processes in a way of its own.
FORKED.set_forkserver_preload(["lightning.pytorch", "torchvision", "diffusers", "lpl_lightning.cli"])

# Lightning 2.6 calls what jsonargparse 4.49 calls deprecated.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

# Lightning's logs stay with it where nothing listened when it was imported, which depends on pytest's version.
logging.getLogger("lightning.pytorch").propagate = True

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    # What an earlier test's `seed_everything` left there, processes of this one would be seeded by.
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quiet_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns where both sys.argv and args hold arguments."""
    monkeypatch.setattr(sys, "argv", ["lpl"])


@pytest.fixture
def shared() -> Path:
    """The folder of real weights and photos, beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside the checkout: real weights and photos are not at hand")
    return SHARED


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is there once code has run. Questions on the terminal are answered with yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "ran"


def tiny_kl(**overrides: Any) -> AutoencoderKL:
    """An untrained AutoencoderKL with three decoder blocks, f = 4."""
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**(config | overrides))


def tiny_taesd(**overrides: Any) -> AutoencoderTiny:
    """An untrained AutoencoderTiny, f = 8."""
    config: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "num_encoder_blocks": (1, 1, 1, 1),
        "num_decoder_blocks": (1, 1, 1, 1),
    }
    return AutoencoderTiny(**(config | overrides))


def tiny_sd3(**overrides: Any) -> SD3Denoiser:
    """A two-block MMDiT over 4 x 4 latents of 4 channels."""
    config: dict[str, Any] = {
        "sample_size": 4,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 8,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 4,
    }
    return SD3Denoiser(SD3Transformer2DModel(**(config | overrides)))


def tiny_dit(**overrides: Any) -> DiTDenoiser:
    """A two-block DiT over 4 x 4 latents of 4 channels, 3 classes."""
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 4,
        "patch_size": 2,
        "num_embeds_ada_norm": 3,
        "norm_num_groups": 4,
    }
    return DiTDenoiser(DiTTransformer2DModel(**(config | overrides)))


@pytest.fixture
def autoencoder() -> Autoencoder:
    """A frozen f = 4 autoencoder that makes 4 x 4 latents of 16 px images."""
    return Autoencoder(tiny_kl(scaling_factor=0.5, shift_factor=0.1))


@pytest.fixture
def make_module() -> Callable[..., LatentDiffusionModule]:
    """A class-conditional MMDiT with flow matching, or with ``dit=True`` a DiT with DDPM; 3 classes."""

    def make(dit: bool = False, **overrides: Any) -> LatentDiffusionModule:
        parts: dict[str, Any] = {
            "autoencoder": Autoencoder(tiny_kl(scaling_factor=0.5, shift_factor=0.1)),
            "noise": DDPM() if dit else FlowMatching(),
            "denoiser": tiny_dit() if dit else tiny_sd3(),
            "conditioner": ClassLabels(3) if dit else ClassTokens(3, token_dim=8, pooled_dim=8),
            "sampler": Sampler(num_steps=2, guidance_scale=1.5),
        }
        return LatentDiffusionModule(**(parts | overrides))

    return make


def image_batch(size: int = 6, side: int = 16, num_classes: int = 3) -> dict[str, Any]:
    """A batch of random images with labels."""
    return {"image": torch.rand(size, 3, side, side) * 2 - 1, "label": torch.arange(size) % num_classes}


@pytest.fixture(autouse=True)
def fold_narrow_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests' decoders are narrow; what wide ones run is to be tested."""
    monkeypatch.setattr("lpl_lightning.folded_convolution.NARROWEST", 1)
