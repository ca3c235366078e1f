"""The ``diffusers`` preset against numbers that the public example gave (huggingface/diffusers, commit 58eb52c)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from lpl_lightning import Autoencoder, LatentPerceptualLoss

STATISTICS = {"default": "separate", "shared": "target", "batch": "none"}


def our_options(case: dict[str, Any]) -> dict[str, Any]:
    """The public example's options by our names."""
    return {
        "depth": 1 + case["num_mid_blocks"],
        "statistics": STATISTICS[case["norm_type"]],
        "depth_weights": "inverse_upscale" if case["pow_law"] else "uniform",
        "mask_outliers": case["remove_outliers"],
        "distance": case["loss_type"],
    }


@pytest.fixture(scope="module")
def folder() -> Path:
    found = Path(__file__).resolve().parents[3] / "shared" / "reference-vectors"
    if not found.is_dir():
        pytest.skip("no ../shared/reference-vectors beside the checkout")
    return found


@pytest.fixture(scope="module")
def vectors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "vectors.safetensors")


@pytest.fixture(scope="module")
def autoencoder(folder: Path, vectors: dict[str, Tensor]) -> Autoencoder:
    model: Any = AutoencoderKL(**json.loads((folder / "cases.json").read_text())["autoencoder"]).double()
    decoder = {name.removeprefix("decoder."): v for name, v in vectors.items() if name.startswith("decoder.")}
    model.decoder.load_state_dict(decoder, strict=True)
    return Autoencoder(model)


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "cases.json").read_text())["cases"]
    assert len(found) == 120
    return found


def by_case(
    vectors: dict[str, Tensor], cases: list[dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any], Tensor, Tensor]]:
    for case in cases:
        name = case["name"]
        yield name, our_options(case), vectors[f"{name}.loss"], vectors[f"{name}.grad"]


def test_values_and_gradients_of_every_case(
    autoencoder: Autoencoder, vectors: dict[str, Tensor], cases: list[dict[str, Any]]
) -> None:
    for name, options, expected, expected_gradient in by_case(vectors, cases):
        z0_hat = vectors["z0_hat"].clone().requires_grad_()
        loss = LatentPerceptualLoss(autoencoder, preset="diffusers", **options)(z0_hat, vectors["z0"])
        (gradient,) = torch.autograd.grad(loss.sum(), z0_hat)
        for ours, theirs in ((loss, expected), (gradient, expected_gradient)):
            assert ours.dtype == torch.float64
            assert (ours - theirs).abs().max() < 1e-9, name
            assert theirs.abs().max() > 1e-6, "there is something to compare"


def test_the_bare_preset_is_the_examples_command_line(autoencoder: Autoencoder, vectors: dict[str, Tensor]) -> None:
    """Own norms, four up blocks, no depth weights, no mask, mean squares."""
    loss = LatentPerceptualLoss(autoencoder, preset="diffusers")
    expected = vectors["default-b4-flat-nomask-mse.loss"]
    ours = loss(vectors["z0_hat"], vectors["z0"], torch.full((3,), 0.1))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    # Timesteps below 200 of 1000 pass, where sigma / alpha is 0.569.
    assert loss(vectors["z0_hat"], vectors["z0"], torch.tensor([0.56, 0.58, 3.0])).ne(0).tolist() == [
        True,
        False,
        False,
    ]


def test_its_mask_is_at_work(autoencoder: Autoencoder, vectors: dict[str, Tensor]) -> None:
    with_mask, without = (vectors[f"shared-b4-pow-{m}-mse.loss"] for m in ("mask", "nomask"))
    assert ((with_mask / without - 1).abs() > 1e-5).all()


def test_the_rgb_preset_is_the_examples_image_loss(autoencoder: Autoencoder, vectors: dict[str, Tensor]) -> None:
    """Mean squared error of what diffusers decodes of both latents."""
    scale, shift = 0.13025, 0.05
    images = [autoencoder.model.decode(vectors[z] / scale + shift).sample for z in ("z0_hat", "z0")]
    expected = (images[0] - images[1]).square().mean(dim=(1, 2, 3))
    ours = LatentPerceptualLoss(autoencoder, preset="rgb")(vectors["z0_hat"], vectors["z0"])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
