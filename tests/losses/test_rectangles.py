"""Latents whose sides differ, as aspect-ratio buckets make them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from backbones import BACKBONES, CLASSES, POOLED_DIM, denoiser, dit, pixart, sd3, unet
from conftest import tiny_kl
from diffusers import FluxPipeline
from families import tiny_rae
from naive import naive_loss
from PIL import Image
from test_combinations import WITHOUT_POOLED, Letters
from test_module import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lpl_lightning import (
    Autoencoder,
    AutoencoderModule,
    Captions,
    ClassLabels,
    ClassTokens,
    DiTDenoiser,
    FlowMatching,
    ImageFolderDataModule,
    LatentDiffusionModule,
    LatentPerceptualLoss,
    LPLCallback,
    PixArtDenoiser,
    SD3Denoiser,
    UNetDenoiser,
)
from lpl_lightning.conditioning import Condition
from lpl_lightning.noise import NoisyLatents

DEPTH = 2
RECTANGULAR = [name for name in BACKBONES if name != "DiT"]
B, H, W = 4, 4, 6
"""Samples, and sides of latents: of images of 16 x 24, downscaled by 4."""


def test_one_backbone_takes_squares_alone() -> None:
    """The others take rectangles; a new one must say which it does."""
    assert [name for name in BACKBONES if not BACKBONES[name][1].takes_rectangles] == ["DiT"]


class Kept(FlowMatching):
    """Keeps what it drew."""

    noisy: NoisyLatents

    def sample(self, *args: Any, **kwargs: Any) -> NoisyLatents:
        self.noisy = super().sample(*args, **kwargs)
        return self.noisy


def by_hand(name: str, net: Any, z_t: Tensor, t: Tensor, c: Condition) -> Tensor:
    """The call that the family's pipeline makes, written out for latents of any shape."""
    out: Any
    assert c.tokens is not None
    mask = None if c.mask is None else c.mask.float()
    match name:
        case "SD3":
            out = net(z_t, c.tokens, c.pooled, t, return_dict=False)[0]
        case "PixArt":
            sizes = {"resolution": None, "aspect_ratio": None}
            out = net(z_t, c.tokens, timestep=t, encoder_attention_mask=mask, added_cond_kwargs=sizes).sample
            out = out.chunk(2, dim=1)[0]
        case "UNet (SD 1.5)":
            out = net(z_t, t, c.tokens, encoder_attention_mask=mask, return_dict=False)[0]
        case "UNet (SDXL)":
            added = {"text_embeds": c.pooled, "time_ids": torch.tensor([[40.0, 64.0, 3.0, 5.0, 16.0, 24.0]] * B)}
            out = net(z_t, t, c.tokens, encoder_attention_mask=mask, added_cond_kwargs=added).sample
        case "Sana":
            out = net(z_t, c.tokens, timestep=t * net.config.timestep_scale, encoder_attention_mask=mask).sample
        case "Flux":
            places = FluxPipeline._prepare_latent_image_ids(B, H // 2, W // 2, "cpu", torch.float32)
            text = torch.zeros(c.tokens.shape[1], 3)
            packed = FluxPipeline._pack_latents(z_t, B, 4, H, W)
            out = net(packed, c.tokens, c.pooled, timestep=t / 1000, img_ids=places, txt_ids=text).sample
            out = FluxPipeline._unpack_latents(out, 8 * H, 8 * W, 8)
    return cast(Tensor, out)


def conditioner(kind: str, backbone: str) -> Any:
    if kind == "classes":
        return ClassTokens(CLASSES, 24, None if backbone in WITHOUT_POOLED else POOLED_DIM, tokens_per_class=2)
    return Captions([Letters()], dropout=0.0, size_conditions=True)


def batch(height: int = 4 * H, width: int = 4 * W) -> dict[str, Any]:
    return {
        "image": torch.rand(B, 3, height, width) * 2 - 1,
        "label": torch.tensor([1, 5, 2, 5]),
        "caption": ["a red star", "a ring", "a blue square on dots", ""],
        "original_size": torch.tensor([[40, 64]] * B),
        "crop_top_left": torch.tensor([[3, 5]] * B),
    }


def masked(autoencoder: Autoencoder) -> LatentPerceptualLoss:
    """With small maps' outliers masked too, by the same windows on all of them."""
    options: dict[str, Any] = {"mask_upscale": 0.5, "quantile": 0.2, "widening": 0.5, "dilation": 3, "erosion": 5}
    sizes: dict[str, Any] = {"dilation": [3] * DEPTH, "erosion": [5] * DEPTH}
    return LatentPerceptualLoss(autoencoder, threshold=1.5, reference_side=8, depth=DEPTH, **(options | sizes))


@pytest.mark.parametrize(("name", "kind"), [("SD3", "classes"), *((name, "captions") for name in RECTANGULAR)])
def test_a_step_is_what_its_parts_make_of_it_by_hand(name: str, kind: str, tmp_path: Path) -> None:
    """The family's own call on the noisy latent; its error; and equation 3 in loops over the decoder's maps."""
    noise, model = Kept(), denoiser(name).train()
    callback = LPLCallback(weight=2.0, loss=masked)
    module = LatentDiffusionModule(
        Autoencoder(tiny_kl(scaling_factor=0.5)),
        noise,
        model,
        conditioner(kind, name),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )
    module.conditioner.dropout = 0.0
    images = batch()
    run = trainer(tmp_path, max_steps=1, callbacks=[callback], limit_val_batches=0)
    loader: Any = DataLoader(cast(Any, [images]), batch_size=None)
    run.fit(module, loader, loader)
    found = {key: float(value) for key, value in run.callback_metrics.items()}
    noisy = noise.noisy
    assert noisy.z_t.shape == (B, 4, H, W)
    with torch.no_grad():
        prediction = by_hand(name, model.backbone, noisy.z_t, noisy.t, module.conditioner(images, B))
        assert found["loss_diffusion"] == pytest.approx(
            float((prediction - (noisy.noise - noisy.z0)).square().mean()), rel=1e-4
        )
        z0_hat = noisy.z_t - (noisy.t / 1000).view(-1, 1, 1, 1) * prediction
        # tau is 1.5 for a side of 8, and the latents have the area of a square of side sqrt(24).
        passes = (noisy.t / (1000 - noisy.t)) <= 1.5 * (H * W) ** 0.5 / 8
        maps = [module.autoencoder.features(z, module.autoencoder.feature_names[:DEPTH]) for z in (z0_hat, noisy.z0)]
        assert 0 < passes.sum() < B
        kernels = {1: (3, 5), 2: (3, 5), 4: (3, 5)}
        options: dict[str, Any] = {"kernels": kernels, "mask_upscale": 0.5, "quantile": 0.2, "widening": 0.5}
        each = naive_loss(maps[0], maps[1], W, **options)
        expected = float((each * passes).mean())
    assert found["loss_lpl"] == pytest.approx(expected, rel=1e-4)
    assert found["loss"] == pytest.approx(found["loss_diffusion"] + 2 * expected, rel=1e-4)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("name", RECTANGULAR)
def test_gradients_reach_every_weight(name: str) -> None:
    """Of the losses of a rectangular batch, with LPL."""
    module = LatentDiffusionModule(
        Autoencoder(tiny_kl()), FlowMatching(), denoiser(name).train(), conditioner("captions", name)
    )
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    loss = LatentPerceptualLoss(module.autoencoder, threshold=float("inf"))
    module.add_loss_term("lpl", lambda z0_hat, z0, nsr, **_: loss(z0_hat, z0, nsr).mean())
    module.training_step(batch(), 0).backward()
    without = [key for key, value in module.denoiser.named_parameters() if value.grad is None or not value.grad.any()]
    square = _without_gradient(name)
    assert set(without) == square


def _without_gradient(name: str) -> set[str]:
    """Weights that a square batch leaves alone too, such as biases of keys."""
    module = LatentDiffusionModule(
        Autoencoder(tiny_kl()), FlowMatching(), denoiser(name).train(), conditioner("captions", name)
    )
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    module.training_step(batch(32, 32), 0).backward()
    return {key for key, value in module.denoiser.named_parameters() if value.grad is None or not value.grad.any()}


def alone(name: str) -> Any:
    """A transformer without blocks, in which no patch knows of another."""
    model = denoiser(name)
    for part in ("transformer_blocks", "single_transformer_blocks"):
        if hasattr(model.backbone, part):
            setattr(model.backbone, part, nn.ModuleList())
    return model


@pytest.mark.parametrize("shape", [(H, W), (W, H)])
@pytest.mark.parametrize("name", ["SD3", "PixArt", "Flux", "Sana"])
def test_patches_come_back_where_they_were(name: str, shape: tuple[int, int]) -> None:
    """Without blocks, what changes in one place of the latent changes there alone: patches are not shuffled."""
    model, patch = alone(name), max(2, denoiser(name).patch) if name != "Sana" else 1
    c = Condition(
        tokens=torch.randn(1, 5, 24), mask=torch.ones(1, 5, dtype=torch.bool), pooled=torch.randn(1, POOLED_DIM)
    )
    z_t, t = torch.randn(1, 4, *shape), torch.tensor([300.0])
    with torch.no_grad():
        before = model(z_t, t, c)
        for row, column in np.ndindex(*shape):
            changed = z_t.clone()
            changed[..., row, column] += 1.0
            places = (model(changed, t, c) - before).abs().sum(dim=(0, 1)).nonzero().tolist()
            assert {(r // patch, k // patch) for r, k in places} == {(row // patch, column // patch)}


def test_sizes_reach_sdxl_height_first() -> None:
    images = batch()
    found = conditioner("captions", "UNet (SDXL)")(images, B).time_ids
    assert found.tolist() == [[40.0, 64.0, 3.0, 5.0, 16.0, 24.0]] * B


# Before a run


def write(root: Path, count: int = 6) -> Path:
    root.mkdir()
    for index in range(count):
        image = Image.new("RGB", (40, 24) if index % 2 else (24, 40), (index * 20, 99, 99))
        image.save(root / f"{index}.png")
        (root / f"{index}.txt").write_text(f"number {index}")
    return root


def data(root: Path, divisor: int = 8, **options: Any) -> ImageFolderDataModule:
    settings: dict[str, Any] = {
        "image_size": 32,
        "captions": "sidecar",
        "num_workers": 0,
        "batch_size": 2,
        "val_root": root,
        "buckets": {"divisor": divisor, "max_aspect": 2.0},
    }
    return ImageFolderDataModule(root, **(settings | options))


def module_of(model: Any, autoencoder: Any = None) -> LatentDiffusionModule:
    kind = ClassLabels(CLASSES) if isinstance(model, DiTDenoiser) else Captions([Letters()], size_conditions=True)
    return LatentDiffusionModule(Autoencoder(autoencoder or tiny_kl()), FlowMatching(), model, kind)


REFUSED: dict[str, tuple[Callable[[], LatentDiffusionModule], dict[str, Any], str]] = {
    "DiT": (
        lambda: module_of(DiTDenoiser(dit())),
        {"captions": None},
        "A DiTTransformer2DModel takes square latents alone, but the data's `buckets` make some of 10 x 6. Leave",
    ),
    "patches": (
        lambda: module_of(SD3Denoiser(sd3())),
        {"divisor": 4},
        "`buckets` make images of 36 x 28, but both sides must be multiples of 8: the autoencoder downscales by 4",
    ),
    "levels": (
        lambda: module_of(
            UNetDenoiser(
                unet(
                    down_block_types=("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
                    up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
                    block_out_channels=(16,) * 4,
                )
            )
        ),
        {},
        "make images of 40 x 24, but both sides must be multiples of 32: the autoencoder downscales by 4, and sides of "
        "latents must be multiples of 8. Set `divisor` of `buckets` to 32, or to a multiple of it.",
    ),
    "positions": (
        lambda: module_of(SD3Denoiser(sd3(pos_embed_max_size=4))),
        {},
        "The latents are 10 wide, the backbone's positions reach 8: set `pos_embed_max_size` to 5 or more.",
    ),
    "one size": (
        lambda: module_of(SD3Denoiser(sd3(in_channels=64, out_channels=64)), tiny_rae()),
        {},
        "The autoencoder takes images of",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_take_buckets_says_so_before_an_image_is_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options, message = REFUSED[case]

    def never(*_: Any) -> None:
        raise AssertionError("an image was read")

    for name in ("in_threads", "upright_sizes"):
        monkeypatch.setattr(f"lpl_lightning.data.folder.{name}", never)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path).fit(make(), data(write(tmp_path / "photos"), **options))


def test_an_autoencoder_in_training_says_its_divisor(tmp_path: Path) -> None:
    module = AutoencoderModule(tiny_kl())
    root = write(tmp_path / "photos")
    trainer(tmp_path).fit(module, data(root))
    with pytest.raises(ValueError, match="must be multiples of 4: the autoencoder downscales by 4. Set `divisor`"):
        trainer(tmp_path).fit(module, data(root, divisor=2))


@pytest.mark.parametrize(
    "model", [SD3Denoiser(sd3()), PixArtDenoiser(pixart()), UNetDenoiser(unet())], ids=["SD3", "PixArt", "UNet"]
)
def test_a_run_on_buckets_trains_validates_and_draws_squares(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, photos = module_of(model), data(write(tmp_path / "photos"))
    shapes: list[tuple[bool, torch.Size]] = []
    encode = module.autoencoder.encode

    def watched(images: Tensor, *args: Any) -> Tensor:
        shapes.append((module.training, images.shape[2:]))
        return encode(images, *args)

    monkeypatch.setattr(module.autoencoder, "encode", watched)
    run = trainer(tmp_path, max_steps=4, callbacks=[LPLCallback(weight=1.0)], limit_val_batches=1.0, max_epochs=-1)
    run.fit(module, photos)
    assert {shape for training, shape in shapes if training} == {(40, 24), (24, 40)}
    assert {shape for training, shape in shapes if not training} == {(40, 24), (24, 40)}
    assert run.callback_metrics["val_loss"].isfinite()
    assert module.generate([0], captions=["a star"]).shape == (1, 3, 32, 32)
