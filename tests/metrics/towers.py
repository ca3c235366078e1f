"""Small models of open_clip and transformers, and images for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

TOWER: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def save_tower(folder: Path, **preprocessing: Any) -> Any:
    """A small model of open_clip's with random weights, saved as its hub repositories are."""
    open_clip: Any = pytest.importorskip("open_clip")
    folder.mkdir(parents=True)
    config = {
        "model_cfg": TOWER,
        "preprocess_cfg": {"interpolation": "bicubic", "resize_mode": "shortest"} | preprocessing,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    with torch.no_grad():
        model.visual.proj.mul_(20)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return model


def photos(count: int, height: int, width: int) -> Tensor:
    """Smooth images of 8 bits."""
    coarse = torch.rand(count, 3, 5, 5)
    images = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (images * 255).round() / 127.5 - 1


def as_pil(images: Tensor) -> list[Image.Image]:
    eight = ((images + 1) * 127.5).round().to(torch.uint8).movedim(1, 3)
    return [Image.fromarray(image.numpy()) for image in eight]


def tiny_dino() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model: nn.Module = transformers.Dinov2Model(config)
    return model
