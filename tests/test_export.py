"""Exported folders, loaded by diffusers' pipelines and run next to the modules they came from."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import ROOT, tiny_dit, tiny_kl, tiny_sd3, tiny_taesd
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from families import scrambled, tiny_dc
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strangers import EVIL, Runs, pickled, refused
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint

from lpl_lightning import (
    DDPM,
    EDM,
    EMA,
    Autoencoder,
    AutoencoderModule,
    ClassLabels,
    ClassTokens,
    Denoiser,
    DiTDenoiser,
    FlowMatching,
    FluxDenoiser,
    LatentDiffusionModule,
    LoRA,
    PixArtDenoiser,
    Sampler,
    SanaDenoiser,
    SD3Denoiser,
    ShapesDataModule,
    UNetDenoiser,
)
from lpl_lightning.callbacks.saving import SaveDiffusers, SaveWeights
from lpl_lightning.captions import Captions
from lpl_lightning.cli import main
from lpl_lightning.conditioning import Condition
from lpl_lightning.export import export_checkpoint, export_diffusers
from lpl_lightning.rebuilding import INSTANTIATORS, check_config
from lpl_lightning.text_encoders import SideBySide, TextEncoder, TransformersText
from lpl_lightning.times import shifted

LABELS = torch.tensor([0, 2])
STEPS, SCALE = 4, 1.5
"""Steps whose number divides the chain, as DDIM needs in diffusers' pipelines."""
SIGMAS = [1.0, 0.75, 0.5, 0.25]
TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


def without(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def module_of(denoiser: Denoiser, conditioner: Any, **parts: Any) -> LatentDiffusionModule:
    """With weights none of which is as it was made."""
    defaults: dict[str, Any] = {
        "autoencoder": Autoencoder(scrambled(tiny_kl(scaling_factor=0.5))),
        "noise": FlowMatching(),
        "sampler": Sampler(num_steps=STEPS, guidance_scale=SCALE),
    }
    module = LatentDiffusionModule(denoiser=denoiser, conditioner=conditioner, **(defaults | parts))
    scrambled(denoiser)
    scrambled(conditioner)
    return module.eval()


def load(pipeline: Any, folder: Path, **options: Any) -> Any:
    pipe = pipeline.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(folder: Path, pooled: str | None = None, mask: bool = False) -> dict[str, Tensor]:
    """What a pipeline is given for LABELS, out of the exported file alone."""
    tables = load_file(folder / "class_embeddings.safetensors")
    null = torch.full_like(LABELS, len(tables["tokens"]) - 1)
    given = {"prompt_embeds": tables["tokens"][LABELS], "negative_prompt_embeds": tables["tokens"][null]}
    if pooled is not None:
        given |= {"pooled_prompt_embeds": tables["pooled"][LABELS], f"negative_{pooled}": tables["pooled"][null]}
    if mask:
        ones = torch.ones(given["prompt_embeds"].shape[:2], dtype=torch.long)
        given |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    return given


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.05, "numbers that a mistake would change"
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def images(module: LatentDiffusionModule, latents: Tensor) -> Tensor:
    return (module.autoencoder.decode(latents) / 2 + 0.5).clamp(0, 1)


def sd3_module(**parts: Any) -> LatentDiffusionModule:
    return module_of(tiny_sd3(), ClassTokens(3, token_dim=8, pooled_dim=8, tokens_per_class=2), **parts)


def unet(**config: Any) -> UNetDenoiser:
    shape: dict[str, Any] = {
        "sample_size": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
    }
    return UNetDenoiser(UNet2DConditionModel(**(shape | config)))


@pytest.mark.parametrize(
    "autoencoder",
    [{}, {"scaling_factor": 0.7, "shift_factor": -0.2}, {"scaling_factor": [0.5, 1, 2, -3.0], "shift_factor": 0.3}],
    ids=["its_own", "overridden", "per_channel"],
)
def test_sd3_of_classes(tmp_path: Path, autoencoder: dict[str, Any]) -> None:
    model = scrambled(tiny_kl(scaling_factor=0.5, shift_factor=0.1))
    module = sd3_module(autoencoder=Autoencoder(model, sample_posterior=False, **autoencoder))
    folder = export_diffusers(module, tmp_path / "out")
    pipe = load(StableDiffusion3Pipeline, folder, **without(*TEXT))
    z = torch.randn(2, 4, 4, 4)
    asked: dict[str, Any] = embeddings(folder, "pooled_prompt_embeds") | {"latents": z, "sigmas": SIGMAS}
    asked |= {"guidance_scale": SCALE, "num_inference_steps": STEPS}
    expected = module.sample_latents(z, {"label": LABELS})
    assert_same(pipe(**asked, output_type="latent").images, expected)
    assert_same(pipe(**asked, output_type="pt").images, images(module, expected))
    photos = torch.rand(2, 3, 16, 16) * 2 - 1
    again = Autoencoder(str(folder), subfolder="vae", sample_posterior=False)
    assert_same(again.encode(photos), module.autoencoder.encode(photos))
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".safetensors", ".json"}


def test_folded_scales_keep_the_posterior(tmp_path: Path) -> None:
    """Its standard deviation is scaled along with its mean."""
    model = scrambled(tiny_kl(use_quant_conv=False, use_post_quant_conv=False))
    autoencoder = Autoencoder(model, scaling_factor=[0.5, 1, 2, -3.0], shift_factor=[0.0, 1, 2, 3])
    folder = export_diffusers(sd3_module(autoencoder=autoencoder), tmp_path / "out")
    photos = torch.rand(64, 3, 16, 16) * 2 - 1
    posterior = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False).encode(photos).latent_dist
    own = model.encode(photos).latent_dist
    scale = torch.tensor([0.5, 1, 2, 3]).view(1, 4, 1, 1)
    torch.testing.assert_close(posterior.std, own.std * scale, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shift", [0.0, 0.1], ids=["scale_alone", "shift_that_the_pipeline_does_not_read"])
def test_dit(tmp_path: Path, shift: float) -> None:
    module = module_of(
        tiny_dit(num_embeds_ada_norm=1000, attention_head_dim=4),
        ClassLabels(1000),
        noise=DDPM("v_prediction"),
        autoencoder=Autoencoder(scrambled(tiny_kl(scaling_factor=0.5, shift_factor=shift))),
    )
    pipe = load(DiTPipeline, export_diffusers(module, tmp_path / "out"))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    got = pipe(
        [7, 900],
        guidance_scale=SCALE,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    expected = images(module, module.sample_latents(noise, {"label": torch.tensor([7, 900])}))
    assert_same(torch.from_numpy(got).movedim(-1, 1), expected)


def flux(**config: Any) -> FluxDenoiser:
    shape: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 4, 8),
    }
    return FluxDenoiser(FluxTransformer2DModel(**(shape | config)), guidance=2.0)


@pytest.mark.parametrize("distilled", [False, True])
def test_flux(tmp_path: Path, distilled: bool, caplog: pytest.LogCaptureFixture) -> None:
    module = module_of(
        flux(guidance_embeds=distilled),
        ClassTokens(3, token_dim=8, pooled_dim=8, tokens_per_class=2),
        noise=FlowMatching(shift=2.0),
        autoencoder=Autoencoder(scrambled(tiny_kl(scaling_factor=0.5, shift_factor=0.1))),
    )
    with caplog.at_level("INFO"):
        folder = export_diffusers(module, tmp_path / "out")
    assert ("give guidance_scale=2, which the model was trained with" in caplog.text) == distilled
    assert "FluxPipeline calls true_cfg_scale" in caplog.text
    pipe = load(FluxPipeline, folder, **without(*TEXT[:4]))
    z = torch.randn(2, 4, 4, 6)
    expected = module.sample_latents(z, {"label": LABELS})
    got = pipe(
        **embeddings(folder, "pooled_prompt_embeds"),
        latents=FluxPipeline._pack_latents(z, 2, 4, 4, 6),
        height=16,
        width=24,
        guidance_scale=2.0,
        true_cfg_scale=SCALE,
        num_inference_steps=STEPS,
        output_type="pt",
    ).images
    assert_same(got, images(module, expected))


@pytest.mark.parametrize("noise", [DDPM(), EDM(), FlowMatching()], ids=["ddpm", "edm", "flow"])
def test_a_flux_that_its_pipeline_cannot_sample_is_said_to_be_one(
    tmp_path: Path, noise: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The pipeline loads with any scheduler, and runs with that of a flow alone."""
    module = module_of(flux(), ClassTokens(3, token_dim=8, pooled_dim=8), noise=noise)
    with caplog.at_level("INFO"):
        folder = export_diffusers(module, tmp_path / "out")
    pipe = load(FluxPipeline, folder, **without(*TEXT[:4]))
    given = {name: value for name, value in embeddings(folder, "pooled_prompt_embeds").items() if name[:3] != "neg"}
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    runs = True
    try:
        pipe(**given, **options)
    except (TypeError, ValueError):  # the scheduler's, of `mu`, or the pipeline's, of `sigmas`
        runs = False
    assert runs == isinstance(noise, FlowMatching)
    said = f"FluxPipeline cannot sample by a {type(pipe.scheduler).__name__}: sample with `lpl predict`"
    assert (said in caplog.text) == (not runs)


def test_sana(tmp_path: Path) -> None:
    backbone = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
        timestep_scale=0.5,
    )
    module = module_of(
        SanaDenoiser(backbone),
        ClassTokens(3, token_dim=8, tokens_per_class=2),
        autoencoder=Autoencoder(scrambled(tiny_dc(latent_channels=4)), scaling_factor=0.7),
    )
    folder = export_diffusers(module, tmp_path / "out")
    pipe = load(SanaPipeline, folder, **without(*TEXT[:2]))
    z = torch.randn(2, 4, 8, 8)
    asked: dict[str, Any] = embeddings(folder, mask=True) | {
        "latents": z,
        "sigmas": SIGMAS,
        "num_inference_steps": STEPS,
    }
    asked |= {"guidance_scale": SCALE, "height": 32, "width": 32, "use_resolution_binning": False}
    asked |= {"negative_prompt": None}
    expected = module.sample_latents(z, {"label": LABELS})
    assert_same(pipe(**asked, output_type="latent").images, expected)
    side = 8 * module.autoencoder.downscale
    decoded = pipe.vae.decode(expected / pipe.vae.config.scaling_factor).sample
    assert decoded.shape[-1] == side
    assert_same(decoded, module.autoencoder.decode(expected))


def pixart(**config: Any) -> PixArtDenoiser:
    shape: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "caption_channels": 8,
        "sample_size": 4,
    }
    return PixArtDenoiser(PixArtTransformer2DModel(**(shape | config)))


@pytest.mark.parametrize("sized", [False, True], ids=["sigma", "alpha_with_sizes"])
def test_pixart(tmp_path: Path, sized: bool) -> None:
    eighth = tiny_kl(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.5,
    )
    module = module_of(
        pixart(sample_size=128 if sized else 4),
        ClassTokens(3, token_dim=8, tokens_per_class=2),
        noise=DDPM(),
        autoencoder=Autoencoder(scrambled(eighth)),
    )
    folder = export_diffusers(module, tmp_path / "out")
    pipe = load(PixArtAlphaPipeline if sized else PixArtSigmaPipeline, folder)
    z = torch.randn(2, 4, 4, 6)
    asked: dict[str, Any] = embeddings(folder, mask=True) | {"latents": z, "num_inference_steps": STEPS}
    asked |= {"guidance_scale": SCALE, "height": 32, "width": 48, "use_resolution_binning": False}
    asked |= {"negative_prompt": None}
    expected = module.sample_latents(z, {"label": LABELS})
    assert_same(pipe(**asked, output_type="latent").images, expected)
    assert_same(pipe(**asked, output_type="pt").images, images(module, expected))


@pytest.mark.parametrize("noise", [DDPM("v_prediction"), FlowMatching(shift=2.0)], ids=["v", "flow"])
def test_unet_of_text_alone(tmp_path: Path, noise: Any) -> None:
    module = module_of(unet(), ClassTokens(3, token_dim=8, tokens_per_class=2), noise=noise)
    folder = export_diffusers(module, tmp_path / "out")
    pipe = load(StableDiffusionPipeline, folder, **without(*TEXT[:2]))
    z = torch.randn(2, 4, 4, 4)
    asked: dict[str, Any] = embeddings(folder) | {"latents": z, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    # Its pipeline cannot call the flow's own scheduler; the one in its place the module takes too.
    module.sampler = Sampler(STEPS, SCALE, scheduler=None if noise.prediction_type != "flow" else pipe.scheduler)
    expected = module.sample_latents(z, {"label": LABELS})
    assert_same(pipe(**asked, output_type="latent").images, expected)
    assert_same(pipe(**asked, output_type="pt").images, images(module, expected))


def test_the_scheduler_in_the_place_of_the_flows_own_goes_the_same_way(tmp_path: Path) -> None:
    """Over times shifted alike, and in small steps to the same end."""
    noise = FlowMatching(shift=2.0)
    module = module_of(unet(), ClassTokens(3, token_dim=8), noise=noise, sampler=Sampler(200, SCALE))
    pipe = load(StableDiffusionPipeline, export_diffusers(module, tmp_path / "out"), **without(*TEXT[:2]))
    z, asked = torch.randn(2, 4, 4, 4), {"label": LABELS}
    end = module.sample_latents(z, asked)
    module.sampler = Sampler(200, SCALE, scheduler=pipe.scheduler)
    torch.testing.assert_close(module.sample_latents(z, asked), end, atol=0.02, rtol=0.0)
    pipe.scheduler.set_timesteps(4)
    times = shifted(torch.linspace(0.999, 0, 5)[:-1], 2.0)
    torch.testing.assert_close(pipe.scheduler.sigmas[:-1], times, atol=1e-6, rtol=0.0)


PROMPTS = ["a red square", "two blue circles on grass"]
TINY = "random:embedded:tiny"


def text(source: str, number: int, **options: Any) -> TransformersText:
    encoder = TransformersText(f"{TINY}/{source}", f"text_encoder{f'_{number}' if number > 1 else ''}", **options)
    scrambled(encoder.model)
    return encoder


def towers(source: str, pooled: tuple[bool, bool], **options: Any) -> SideBySide:
    return SideBySide([text(source, n, layer=-2, pooled=p, **options) for n, p in enumerate(pooled, start=1)])


def sd3_of_text(with_t5: bool = True, **options: Any) -> LatentDiffusionModule:
    encoders: list[TextEncoder] = [towers("sd3", (True, True))]
    if with_t5:
        encoders.append(text("sd3", 3, max_length=12))
    conditioner = Captions(encoders, token_dim=96, **options)
    denoiser = SD3Denoiser(f"{TINY}/sd3", subfolder="transformer")
    return module_of(denoiser, conditioner, autoencoder=Autoencoder(f"{TINY}/sd3", subfolder="vae"))


@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3_of_captions(tmp_path: Path, with_t5: bool, caplog: pytest.LogCaptureFixture) -> None:
    module = sd3_of_text(with_t5)
    with caplog.at_level("INFO"):
        folder = export_diffusers(module, tmp_path / "out")
    length = 12 if with_t5 else 0
    assert f"give max_sequence_length={length}, as in training" in caplog.text
    pipe = load(StableDiffusion3Pipeline, folder, **({} if with_t5 else without(*TEXT[4:])))
    z = torch.randn(2, 16, 8, 8)
    asked: dict[str, Any] = {"prompt": PROMPTS, "latents": z, "sigmas": SIGMAS, "num_inference_steps": STEPS}
    asked |= {"guidance_scale": SCALE, "max_sequence_length": length}
    expected = module.sample_latents(z, {"caption": PROMPTS})
    assert_same(pipe(**asked, output_type="latent").images, expected)
    assert_same(pipe(**asked, output_type="pt").images, images(module, expected))


@pytest.mark.parametrize("clip_first", [True, False])
def test_flux_of_captions(tmp_path: Path, clip_first: bool) -> None:
    """The tower that gives the pooled vector alone may stand anywhere."""
    encoders: list[TextEncoder] = [text("sdxl", 1, tokens=False, pooled=True), text("sd3", 3, max_length=12)]
    conditioner = Captions(encoders if clip_first else encoders[::-1])
    module = module_of(flux(joint_attention_dim=96, pooled_projection_dim=32), conditioner)
    pipe = load(FluxPipeline, export_diffusers(module, tmp_path / "out"))
    z = torch.randn(2, 4, 4, 4)
    got = pipe(
        PROMPTS,
        negative_prompt="",
        latents=FluxPipeline._pack_latents(z, 2, 4, 4, 4),
        height=16,
        width=16,
        true_cfg_scale=SCALE,
        num_inference_steps=STEPS,
        max_sequence_length=12,
        output_type="pt",
    ).images
    assert_same(got, images(module, module.sample_latents(z, {"caption": PROMPTS})))


@pytest.mark.parametrize("kind", ["pixart", "stable_diffusion"])
def test_one_encoder(tmp_path: Path, kind: str) -> None:
    """PixArt's masks its padding, Stable Diffusion's does not."""
    z = torch.randn(2, 4, 4, 4)
    asked: dict[str, Any] = {"latents": z, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    pipeline: Any = StableDiffusionPipeline
    if kind == "pixart":
        pipeline = PixArtSigmaPipeline
        conditioner = Captions([text("sd3", 3, max_length=12, use_mask=True)])
        denoiser: Denoiser = pixart(caption_channels=96)
        asked |= {"max_sequence_length": 12, "clean_caption": False, "use_resolution_binning": False}
    else:
        conditioner, denoiser = Captions([text("sdxl", 1, max_length=20)]), unet(cross_attention_dim=32)
    module = module_of(denoiser, conditioner, noise=DDPM())
    pipe = load(pipeline, export_diffusers(module, tmp_path / "out"))
    expected = module.sample_latents(z, {"caption": PROMPTS})
    assert_same(pipe(PROMPTS, height=16, width=16, **asked, output_type="latent").images, expected)


def sdxl_module(conditioner: Any = None, **parts: Any) -> LatentDiffusionModule:
    if conditioner is None:
        conditioner = Captions([towers("sdxl", (False, True))], size_conditions=True, null_is_zero=True)
    vae = Autoencoder(f"{TINY}/sdxl", subfolder="vae")
    denoiser = UNetDenoiser(f"{TINY}/sdxl", subfolder="unet")
    return module_of(denoiser, conditioner, **({"noise": DDPM(), "autoencoder": vae} | parts))


@pytest.mark.parametrize("null_is_zero", [True, False])
def test_sdxl(tmp_path: Path, null_is_zero: bool) -> None:
    text_towers = Captions([towers("sdxl", (False, True))], size_conditions=True, null_is_zero=null_is_zero)
    module = sdxl_module(text_towers)
    pipe = load(StableDiffusionXLPipeline, export_diffusers(module, tmp_path / "out")).to(torch.float64)
    module.double()  # in single precision rounding alone comes to 1e-5
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    sizes = {"original_size": (90, 70), "crop_top_left": (3, 5), "target_size": (64, 64)}
    asked: dict[str, Any] = {"prompt": PROMPTS, "latents": z, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    asked |= {"original_size": (90, 70), "crops_coords_top_left": (3, 5), "target_size": (64, 64)}
    expected = module.sample_latents(z, {"caption": PROMPTS} | {k: torch.tensor(v) for k, v in sizes.items()})
    assert_same(pipe(**asked, output_type="latent").images.to(expected), expected)
    decoded = images(module, expected)
    assert_same(pipe(**asked, output_type="pt").images.to(decoded), decoded)


@pytest.mark.parametrize(
    ("statistics", "scale", "folded"),
    [
        ({"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 0.7]}, None, False),
        ({"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 0.7]}, 0.3, True),
        ({}, None, False),
    ],
    ids=["statistics_that_it_reads", "statistics_overridden", "none"],
)
def test_sdxl_decodes_by_statistics_of_channels(
    tmp_path: Path, statistics: dict[str, Any], scale: float | None, folded: bool
) -> None:
    vae = Autoencoder(scrambled(tiny_kl(scaling_factor=0.5, **statistics)), scaling_factor=scale)
    module = sdxl_module(autoencoder=vae)
    pipe = load(StableDiffusionXLPipeline, export_diffusers(module, tmp_path / "out"))
    z = torch.randn(2, 4, 8, 8)
    asked: dict[str, Any] = {"prompt": PROMPTS, "latents": z, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    expected = module.sample_latents(z, {"caption": PROMPTS, "target_size": torch.tensor([32, 32])})
    assert_same(pipe(**asked, output_type="pt").images, images(module, expected))
    assert (pipe.vae.config.scaling_factor == 1) == folded


@pytest.mark.parametrize(
    "encoders",
    [
        lambda: [towers("sdxl", (False, True)), text("sd3", 3, max_length=8)],
        lambda: [SideBySide([text("sdxl", 1), text("sdxl", 2, pooled=True)])],
        lambda: [text("sdxl", 1, layer=-2), text("sdxl", 2, layer=-2, pooled=True)],
        lambda: [SideBySide([text("sdxl", 2, layer=-2, pooled=True), text("sdxl", 1, layer=-2)])],
        lambda: [SideBySide([text("sdxl", 1, layer=-2), text("sdxl", 2, layer=-2, pooled=True, use_mask=True)])],
    ],
    ids=["another_class", "last_layer", "in_a_row", "the_other_way_round", "masked"],
)
def test_text_encoders_that_a_pipeline_reads_in_another_way_are_left_out(
    tmp_path: Path, encoders: Callable[[], list[TextEncoder]], caplog: pytest.LogCaptureFixture
) -> None:
    """Rather than to make other images than the module does."""
    conditioner = Captions(encoders(), token_dim=96, size_conditions=True)
    module = sdxl_module(conditioner)
    with caplog.at_level("INFO"):
        folder = export_diffusers(module, tmp_path / "out")
    assert "give it prompt_embeds instead" in caplog.text
    assert not list(folder.glob("text_encoder*")) + list(folder.glob("tokenizer*"))
    load(StableDiffusionXLPipeline, folder)


class Scaled(Denoiser):
    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return z_t


def test_another_denoiser_gives_its_backbone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = UNet2DConditionModel(**dict(unet().backbone.config))
    plain = nn.Linear(2, 3)
    plain.config = nn.Module()
    with caplog.at_level("INFO"):
        folder = export_diffusers(module_of(Scaled(backbone), ClassLabels(3)), tmp_path / "out")
        other = export_diffusers(module_of(Scaled(plain), ClassLabels(3)), tmp_path / "other")
    assert "no pipeline is known for a Scaled" in caplog.text
    loaded = UNet2DConditionModel.from_pretrained(folder / "backbone", low_cpu_mem_usage=False).state_dict()
    torch.testing.assert_close(dict(loaded), dict(backbone.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(load_file(other / "backbone.safetensors"), dict(plain.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("noise", "sampler", "denoiser", "said"),
    [
        (EDM(), None, tiny_sd3, "does not scale the noise as EDMEulerScheduler asks"),
        (FlowMatching(shift=3.0), None, unet, "cannot call a FlowMatchEulerDiscreteScheduler"),
        (DDPM(), None, tiny_dit, "DiTPipeline takes 1000 for the null class, here it is 3"),
    ],
    ids=["edm", "flow", "classes"],
)
def test_what_a_pipeline_would_do_otherwise_is_said(
    tmp_path: Path, noise: Any, sampler: Any, denoiser: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    conditioner = ClassLabels(3) if denoiser is tiny_dit else ClassTokens(3, 8, 8 if denoiser is tiny_sd3 else None)
    with caplog.at_level("INFO"):
        export_diffusers(module_of(denoiser(), conditioner, noise=noise), tmp_path / "out")
    assert said in caplog.text


def test_the_schedulers_of_the_sampler_goes_along(tmp_path: Path) -> None:
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    module = sdxl_module(sampler=Sampler(STEPS, SCALE, scheduler=scheduler))
    pipe = load(StableDiffusionXLPipeline, export_diffusers(module, tmp_path / "out"))
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler
    assert pipe.scheduler.config.beta_end == 0.012


@pytest.mark.parametrize(("spacing", "n"), [("trailing", 3), ("trailing", 4), ("linspace", 3), ("linspace", 4)])
def test_steps_by_which_the_pipeline_samples_otherwise_are_said(
    tmp_path: Path, spacing: str, n: int, caplog: pytest.LogCaptureFixture
) -> None:
    noise = DDPM("v_prediction")
    scheduler = DDIMScheduler(**noise.schedule, clip_sample=False, timestep_spacing=spacing)
    sampler = Sampler(n, SCALE, scheduler)
    module = module_of(unet(), ClassTokens(3, token_dim=8, tokens_per_class=2), noise=noise, sampler=sampler)
    with caplog.at_level("INFO"):
        folder = export_diffusers(module, tmp_path / "out")
    pipe = load(StableDiffusionPipeline, folder, **without(*TEXT[:2]))
    z = torch.randn(2, 4, 4, 4)
    asked: dict[str, Any] = embeddings(folder) | {"latents": z, "num_inference_steps": n, "guidance_scale": SCALE}
    got, own = pipe(**asked, output_type="latent").images, module.sample_latents(z, {"label": LABELS})
    assert torch.allclose(got, own, atol=1e-5) == (spacing == "trailing" and n == 4)
    assert ("leaves noise behind by 3 steps, unlike `lpl predict`" in caplog.text) == (spacing == "trailing" and n == 3)
    said = "by timestep_spacing='linspace', at any num_inference_steps from 2 to 999: export with 'trailing'"
    assert (said in caplog.text) == (spacing == "linspace")


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_how_the_steps_of_a_flow_are_placed_is_said(
    tmp_path: Path, shift: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The scheduler left to itself, as pipelines leave it, takes its last step at a level of almost no noise."""
    module = sd3_module(noise=FlowMatching(shift=shift))
    with caplog.at_level("INFO"):
        folder = export_diffusers(module, tmp_path / "out")
    (said,) = re.findall(r"StableDiffusion3Pipeline places the steps otherwise .* sigmas=(.*) for n steps", caplog.text)
    pipe = load(StableDiffusion3Pipeline, folder, **without(*TEXT))
    z = torch.randn(2, 4, 4, 4)
    asked: dict[str, Any] = embeddings(folder, "pooled_prompt_embeds") | {"latents": z, "guidance_scale": SCALE}
    asked |= {"num_inference_steps": STEPS, "output_type": "latent"}
    own = module.sample_latents(z, {"label": LABELS})
    assert (pipe(**asked).images - own).norm() > 0.05 * own.norm()
    assert_same(pipe(**asked, sigmas=eval(said, {"n": STEPS})).images, own)


@pytest.mark.parametrize("kind", ["other_channels", "no_diffusers_model"])
def test_an_autoencoder_that_the_pipeline_cannot_use_is_left_out(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """TAESD has no convolution that a shift per channel could be put into."""
    if kind == "other_channels":
        autoencoder = Autoencoder(tiny_taesd(), shift_factor=[0.1, 0.2, 0.3, 0.4])
    else:
        model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Upsample(scale_factor=4))
        model.latent_channels = 4  # type: ignore[assignment]
        autoencoder = Autoencoder(model, feature_modules=["0"], downscale=4)
    module = sd3_module(autoencoder=autoencoder)
    with caplog.at_level("INFO"):
        folder = export_diffusers(module, tmp_path / "out")
    assert "output_type='latent'" in caplog.text
    pipe = load(StableDiffusion3Pipeline, folder, vae=None, **without(*TEXT))
    z = torch.randn(2, 4, 4, 4)
    got = pipe(
        **embeddings(folder, "pooled_prompt_embeds"),
        latents=z,
        sigmas=SIGMAS,
        guidance_scale=SCALE,
        num_inference_steps=STEPS,
        output_type="latent",
    ).images
    assert_same(got, module.sample_latents(z, {"label": LABELS}))


LORA: dict[str, Any] = {"rank": 4, "alpha": 10.0}


def trained_lora(module: LatentDiffusionModule) -> LatentDiffusionModule:
    """With B no longer zero."""
    with torch.no_grad():
        for name, parameter in module.denoiser.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return module


def out_of(denoiser: Denoiser, base: nn.Module, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """What the module's denoiser makes of an input, and what it makes with another backbone."""
    t = torch.tensor([100.0, 900.0])
    with torch.no_grad():
        own = denoiser(z, t, condition)
        twin = copy.deepcopy(denoiser)
        twin.backbone = base.eval()
        return own, twin(z, t, condition)


@pytest.mark.parametrize("targets", [["to_q", "add_k_proj", "proj"], r"transformer_blocks\.0\.attn\.to_[qk]"])
def test_a_lora_of_sd3(tmp_path: Path, targets: Any) -> None:
    pytest.importorskip("peft")
    base = scrambled(tiny_sd3().backbone)
    conditioner = ClassTokens(3, token_dim=8, pooled_dim=8)
    plain = module_of(SD3Denoiser(copy.deepcopy(base)), conditioner)
    base.load_state_dict(plain.denoiser.backbone.state_dict())
    module = LatentDiffusionModule(
        plain.autoencoder,
        plain.noise,
        SD3Denoiser(copy.deepcopy(base)),
        conditioner,
        fine_tuning=LoRA(**LORA, targets=targets),
    )
    trained_lora(module).eval()
    pipeline = export_diffusers(plain, tmp_path / "base")
    folder = export_diffusers(module, tmp_path / "lora")
    assert sorted(path.name for path in folder.iterdir()) == [
        "class_embeddings.safetensors",
        "pytorch_lora_weights.safetensors",
        "scheduler",
    ]
    pipe = load(StableDiffusion3Pipeline, pipeline, **without(*TEXT))
    pipe.load_lora_weights(folder)
    condition = conditioner({"label": LABELS}, 2)
    z = torch.randn(2, 4, 4, 4)
    own, loaded = out_of(module.denoiser, pipe.transformer, z, condition)
    assert_same(loaded, own)
    assert (own - out_of(module.denoiser, base, z, condition)[1]).abs().max() > 0.05


def test_a_lora_of_sdxl(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plain = sdxl_module()
    denoiser = copy.deepcopy(plain.denoiser)
    module = LatentDiffusionModule(
        plain.autoencoder,
        plain.noise,
        denoiser,
        plain.conditioner,
        fine_tuning=LoRA(**LORA, targets=["to_q", "to_out.0", "conv1", "proj_in"]),
    )
    trained_lora(module).eval()
    pipe = load(StableDiffusionXLPipeline, export_diffusers(plain, tmp_path / "base"))
    pipe.load_lora_weights(export_diffusers(module, tmp_path / "lora"))
    condition = plain.conditioner({"caption": PROMPTS, "target_size": torch.tensor([64, 64])}, 2)
    z = torch.randn(2, 4, 8, 8)
    own, loaded = out_of(module.denoiser, pipe.unet, z, condition)
    assert_same(loaded, own)
    assert (own - plain.denoiser(z, torch.tensor([100.0, 900.0]), condition)).abs().max() > 0.05


@pytest.mark.parametrize("noise", [DDPM(), DDPM("v_prediction"), FlowMatching()], ids=["epsilon", "v", "flow"])
def test_a_lora_of_another_noise_process_samples_by_its_own_scheduler(
    tmp_path: Path, noise: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("peft")
    plain = sdxl_module()
    parts = (plain.autoencoder, noise, copy.deepcopy(plain.denoiser), plain.conditioner)
    module = LatentDiffusionModule(*parts, fine_tuning=LoRA(**LORA), sampler=Sampler(STEPS, SCALE))
    trained_lora(module).eval()
    pipe = load(StableDiffusionXLPipeline, export_diffusers(plain, tmp_path / "base"))
    with caplog.at_level("INFO"):
        folder = export_diffusers(module, tmp_path / "lora")
    (kind, where) = re.findall(r"diffusers\.(\w+)\.from_pretrained\('(.*)', subfolder='scheduler'\)", caplog.text)[-1]
    assert where == str(folder)
    pipe.load_lora_weights(folder)
    pipe.scheduler = getattr(diffusers, kind).from_pretrained(where, subfolder="scheduler")
    z = torch.randn(2, 4, 8, 8)
    own = module.sample_latents(z, {"caption": PROMPTS, "target_size": torch.tensor([64, 64])})
    asked: dict[str, Any] = {"prompt": PROMPTS, "latents": z, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    sizes = dict.fromkeys(("original_size", "target_size"), (64, 64)) | {"height": 64, "width": 64}
    got = pipe(**asked, **sizes, output_type="latent").images
    # A flow is sampled by DPM++ in that pipeline, which goes another way.
    if isinstance(noise, FlowMatching):
        assert (got - own).norm() < 0.5 * own.norm()
    else:
        assert_same(got, own)


def test_a_lora_of_a_backbone_whose_pipeline_loads_none(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = scrambled(tiny_dit().backbone)
    module = module_of(DiTDenoiser(copy.deepcopy(base)), ClassLabels(3), noise=DDPM())
    base.load_state_dict(module.denoiser.backbone.state_dict())
    LoRA(**LORA).prepare(module.denoiser)
    module.fine_tuning = LoRA(**LORA)
    trained_lora(module).eval()
    loaded_base = peft.PeftModel.from_pretrained(base, export_diffusers(module, tmp_path / "lora", "float32"))
    own, loaded = out_of(module.denoiser, loaded_base, torch.randn(2, 4, 4, 4), Condition(class_labels=LABELS))
    assert_same(loaded, own)
    half = load_file(export_diffusers(module, tmp_path / "half", "float16") / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


def test_the_module_is_left_as_it_was_and_files_are_in_the_precision_asked_for(tmp_path: Path) -> None:
    module = sd3_module(autoencoder=Autoencoder(tiny_kl(), scaling_factor=0.3, shift_factor=[0.1, 0.2, 0.3, 0.4]))
    module.train()
    watched = {"denoiser": module.denoiser.backbone, "autoencoder": module.autoencoder.model}
    before = {name: (dict(model.config), copy.deepcopy(model.state_dict())) for name, model in watched.items()}
    folder = export_diffusers(module, tmp_path / "out", "bfloat16")
    for name, model in watched.items():
        assert dict(model.config) == before[name][0]
        torch.testing.assert_close(dict(model.state_dict()), dict(before[name][1]), rtol=0, atol=0)
    assert module.training
    assert module.denoiser.backbone.training
    assert all(parameter.requires_grad for parameter in module.denoiser.parameters())
    for path in folder.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    assert json.loads((folder / "model_index.json").read_text())["text_encoder"] == [None, None]


def test_compiled_and_checkpointed_backbones_are_written_too(tmp_path: Path) -> None:
    backbone = tiny_sd3().backbone
    state = copy.deepcopy(backbone.state_dict())
    denoiser = SD3Denoiser(backbone, compile=True, gradient_checkpointing=True, attention="_native_math")
    module = LatentDiffusionModule(Autoencoder(tiny_kl()), FlowMatching(), denoiser, ClassTokens(3, 8, 8))
    found = exported(export_diffusers(module, tmp_path / "out"))
    torch.testing.assert_close(found, dict(state), rtol=0, atol=0)


class Failing(DDIMScheduler):  # type: ignore[misc]
    def save_pretrained(self, *args: Any, **options: Any) -> None:
        raise OSError("the disk is full")


def test_a_failed_export_leaves_nothing_and_a_full_folder_is_refused(tmp_path: Path) -> None:
    failing = module_of(
        tiny_dit(),
        ClassLabels(3),
        noise=DDPM(),
        sampler=Sampler(scheduler=Failing(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")),
    )
    with pytest.raises(OSError, match="the disk is full"):
        export_diffusers(failing, tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())
    (tmp_path / "empty").mkdir()
    given = (tmp_path / "empty").stat().st_ino
    folder = export_diffusers(sd3_module(), tmp_path / "empty")
    assert (folder / "model_index.json").is_file()
    assert folder.stat().st_ino == given, "a mounted volume cannot be replaced"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    # Safetensors leaves its files to their owner alone.
    assert len({path.stat().st_mode for path in folder.rglob("*.*") if path.is_file()}) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    for taken in (folder, folder / "model_index.json"):
        with pytest.raises(ValueError, match="`folder`=.* is there already and not empty"):
            export_diffusers(sd3_module(), taken)
    with pytest.raises(ValueError, match="`dtype` must be one of .*, got 'int8'"):
        export_diffusers(sd3_module(), tmp_path / "new", "int8")  # type: ignore[arg-type]


SHORT: dict[str, Any] = {
    "max_steps": 2,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


def shapes() -> ShapesDataModule:
    return ShapesDataModule(image_size=16, train_images=16, val_images=8, batch_size=8)


def fit(module: pl.LightningModule, folder: Path, ckpt_path: Path | None = None, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(**(SHORT | {"default_root_dir": folder} | options))
    trainer.fit(module, shapes(), ckpt_path=ckpt_path)
    return trainer


def exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_the_callback_writes_what_the_run_ends_with(make_module: Any, tmp_path: Path) -> None:
    for _ in range(2):  # the second replaces what the first one wrote
        module = make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8))
        fit(module, tmp_path, callbacks=[EMA(decay=0.5), SaveDiffusers(dtype="float32")])
        for name, tensor in exported(tmp_path / "diffusers").items():
            assert torch.equal(tensor, module.denoiser.backbone.state_dict()[name])
    fit(module, tmp_path / "fast", callbacks=[SaveDiffusers()], fast_dev_run=True)
    assert not (tmp_path / "fast").exists()
    with pytest.raises(ValueError, match="SaveDiffusers writes a LatentDiffusionModule, got AutoencoderModule"):
        fit(AutoencoderModule(tiny_kl()), tmp_path / "other", callbacks=[SaveDiffusers()])


def fit_by_command(config: str, folder: Path, *options: str, callbacks: str = "", steps: int = 1) -> Path:
    """A checkpoint of the command line."""
    checkpoint = f"class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {{every_n_train_steps: {steps}}}"
    main(
        ["fit", "-c", str(ROOT / "configs" / config), f"--trainer.max_steps={steps}", "--data.batch_size=4"]
        + ["--trainer.limit_val_batches=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        + [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.log_every_n_steps=1"]
        + [f"--trainer.callbacks=[{callbacks}{{{checkpoint}}}]", *options]
    )
    return next(folder.rglob("*.ckpt"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the command line, with weights averaged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lpl"])
        return fit_by_command(
            "quickstart.yaml",
            tmp_path_factory.mktemp("run"),
            "--model.weights=null",
            f"--model.sampler.num_steps={STEPS}",
            callbacks="{class_path: lpl_lightning.EMA, init_args: {decay: 0.5}}, ",
            steps=2,
        )


def test_a_lora_of_the_command_line(tmp_path: Path) -> None:
    """Its checkpoint holds A and B alone, and the rest is where its config says."""
    pytest.importorskip("peft")
    options = ["--model.fine_tuning=lpl_lightning.LoRA", "--model.fine_tuning.rank=2", "--model.fine_tuning.alpha=3"]
    checkpoint = fit_by_command("quickstart.yaml", tmp_path, *options)
    folder = export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    file = folder / "pytorch_lora_weights.safetensors"
    found = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    trained = {n.replace(".default", ""): t for n, t in weights(checkpoint, False).items()}
    torch.testing.assert_close(found, trained, rtol=0, atol=0)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 3
        assert opened.metadata()["step"] == "1"


def of_run(checkpoint: Path, is_average: bool) -> dict[str, Tensor]:
    found = torch.load(checkpoint, weights_only=True)
    averages = found.get("lpl_lightning_averages", {}).get("0.5", {})  # a run without EMA has none
    return {name: averages[name] if is_average and name in averages else t for name, t in found["state_dict"].items()}


def weights(checkpoint: Path, is_average: bool) -> dict[str, Tensor]:
    state = of_run(checkpoint, is_average)
    prefix = "denoiser.backbone."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize(("options", "is_average"), [([], False), (["--ema=0.5"], True)])
def test_the_command_exports_trained_or_averaged_weights(
    run: Path, tmp_path: Path, options: list[str], is_average: bool
) -> None:
    assert not torch.equal(*(weights(run, which)["proj_out.weight"] for which in (False, True)))
    main(["export", f"--ckpt={run}", "--out", str(tmp_path / "out"), *options])
    found = exported(tmp_path / "out")
    for name, tensor in weights(run, is_average).items():
        assert torch.equal(found[name], tensor)
    module = LatentDiffusionModule.load_from_checkpoint(run, weights_only=True)
    module.load_state_dict(of_run(run, is_average))
    pipe = load(StableDiffusion3Pipeline, tmp_path / "out", **without(*TEXT))
    side, scale = module.latent_size, module.sampler.guidance_scale
    z = torch.randn(2, module.autoencoder.latent_channels, side, side)
    got = pipe(
        **embeddings(tmp_path / "out", "pooled_prompt_embeds"),
        latents=z,
        sigmas=SIGMAS,
        guidance_scale=scale,
        num_inference_steps=STEPS,
        output_type="latent",
    ).images
    assert_same(got, module.sample_latents(z, {"label": LABELS}))


def as_shards(run: Path, folder: Path) -> Path:
    """The same checkpoint as a folder, as a strategy that shards weights writes it."""
    whole = torch.load(run, weights_only=True)
    states = {"state_dict": whole.pop("state_dict"), "optimizer_0": whole.pop("optimizer_states")[0]}
    save: Any = vars(distributed_checkpoint)["save"]
    save(states, checkpoint_id=folder, no_dist=True)
    torch.save(whole, folder / "meta.pt")
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize(("options", "is_average"), [([], False), (["--ema=0.5"], True)])
def test_a_folder_of_shards_is_exported_too(run: Path, tmp_path: Path, options: list[str], is_average: bool) -> None:
    shards = as_shards(run, tmp_path / "shards")
    main(["export", f"--ckpt={shards}", "--out", str(tmp_path / "out"), *options])
    found = exported(tmp_path / "out")
    for name, tensor in weights(run, is_average).items():
        assert torch.equal(found[name], tensor)
    module = LatentDiffusionModule.load_from_checkpoint(shards)
    for name, tensor in of_run(run, False).items():
        assert torch.equal(module.state_dict()[name], tensor)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize(("name", "said"), [(".metadata", "damaged"), ("meta.pt", "could run code")])
def test_a_folder_of_a_stranger_runs_no_code(run: Path, tmp_path: Path, ran: Path, name: str, said: str) -> None:
    shards = as_shards(run, tmp_path / "shards")
    out, made = str(tmp_path / "out"), Path(pickled(tmp_path / "evil.pt", ran)).read_bytes()
    for content, message in ((pickle.dumps(Runs(ran)), "could run code"), (made, said)):
        (shards / name).write_bytes(content)
        message = f"(?s)shards' cannot be read as a checkpoint: .*{message}"
        refused(ran, message, lambda: export_checkpoint(str(shards), out))


@pytest.mark.slow
def test_the_command_takes_a_precision_and_comes_from_the_shell(run: Path, tmp_path: Path) -> None:
    arguments = ["export", f"--ckpt={run}", f"--out={tmp_path / 'out'}", "--dtype=float16", "--ema=0.5"]
    subprocess.run([sys.executable, "-m", "lpl_lightning", *arguments], check=True, capture_output=True)
    assert {tensor.dtype for tensor in exported(tmp_path / "out").values()} == {torch.float16}


def test_the_commands_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    said = capsys.readouterr().out
    assert "lpl export" in said
    for option in ("--ckpt", "--out", "--ema", "--dtype"):
        assert option in said
    assert "moving average" in said
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "export" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export", "--out=there"])
    assert "ckpt" in capsys.readouterr().err


def test_what_cannot_be_exported_is_one_clear_error(run: Path, make_module: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out")

    def refused(kind: type[Exception], message: str, checkpoint: Path, ema: float | None = None) -> None:
        with pytest.raises(kind, match=message) as raised:
            export_checkpoint(str(checkpoint), out, ema)
        assert len(str(raised.value)) < 500
        assert not (tmp_path / "out").exists()

    refused(
        FileNotFoundError, "`ckpt`=.*nowhere.ckpt' must be a checkpoint .* there is none", tmp_path / "nowhere.ckpt"
    )
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    refused(ValueError, "text.ckpt' cannot be read as a checkpoint", tmp_path / "text.ckpt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.ckpt")
    refused(ValueError, "weights.ckpt' is no Lightning checkpoint", tmp_path / "weights.ckpt")
    refused(ValueError, r"`ema`=0.9: .* has those of decay \[0.5\]", run, 0.9)
    fit(AutoencoderModule(tiny_kl()), tmp_path).save_checkpoint(tmp_path / "autoencoder.ckpt")
    refused(ValueError, "must be of a LatentDiffusionModule, got one of another module", tmp_path / "autoencoder.ckpt")
    module = make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8))
    fit(module, tmp_path).save_checkpoint(tmp_path / "by_hand.ckpt")
    refused(ValueError, "trained from Python, .* lpl_lightning.export_diffusers", tmp_path / "by_hand.ckpt")
    refused(ValueError, "`ema`=0.5: .* has none", tmp_path / "by_hand.ckpt", 0.5)

    for kind, message, part, change in (
        (FileNotFoundError, "'./gone' does not exist", "autoencoder", {"model": "./gone"}),
        (ValueError, "Option 'num_stepz' is not accepted", "sampler", {"num_stepz": 3}),
        (ValueError, "`num_classes` must be 0 .unconditional. or more, got -1", "conditioner", {"num_classes": -1}),
    ):
        changed = torch.load(run, weights_only=True)
        changed["hyper_parameters"][part]["init_args"].update(change)
        torch.save(changed, tmp_path / "changed.ckpt")
        refused(kind, f"(?s)its model cannot be built again. .*{message}", tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match="`out`=.* is there already and not empty"):
        export_checkpoint(str(run), str(tmp_path))


def test_a_checkpoint_of_the_command_line_of_an_autoencoder_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = fit_by_command("autoencoder_shapes.yaml", tmp_path)
    with pytest.raises(ValueError, match="got one of lpl_lightning.*AutoencoderModule.*SaveAutoencoder"):
        export_checkpoint(str(checkpoint), str(tmp_path / "out"))


def over(backbone: Any) -> tuple[str, Any]:
    return "denoiser", {"class_path": "lpl_lightning.SD3Denoiser", "init_args": {"backbone": backbone}}


FIDELITY = "torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3"
READS = {"name": "x", "features_list": ["64"], "feature_extractor_weights_path": "evil.pth"}
SCRIPT = "lpl_lightning.metrics.TorchScriptFeatures"
PROGRAMS: dict[str, tuple[str, Any]] = {
    "os.system": ("_instantiator", "os.system"),
    "evil.Denoiser": ("denoiser", {"class_path": "evil.Denoiser"}),
    "evil.Backbone": over("evil.Backbone"),
    FIDELITY: over({"class_path": FIDELITY, "init_args": READS}),
    SCRIPT: over({"class_path": SCRIPT, "init_args": {"path": "evil.pt", "trusted": True}}),
    "lpl_lightning.checkpoints.os.mkdir": ("sampler", {"class_path": "lpl_lightning.checkpoints.os.mkdir"}),
    "subprocess.Popen": ("fine_tuning", {"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", "ran"]}}),
    "evil.Module": ("_class_path", "evil.Module"),
    "os.mkdir": ("anything", [{"class_path": "os.mkdir", "init_args": {"path": "ran"}}]),
}


def written(path: str, value: Any) -> str:
    """The name that a file is known by in its folder."""
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(json.dumps(value))
    return path


HIDDEN: dict[str, Callable[[Any], Any]] = {
    "as text": json.dumps,
    "as text in text": lambda value: json.dumps({"class_path": value["class_path"], "init_args": json.dumps(value)}),
    "with tabs": lambda value: json.dumps(value, indent="\t"),
    "as YAML": yaml.safe_dump,
    "in a file": lambda value: written("hidden/config.txt", value),
    "beside a file": lambda value: written("hidden/config.txt", [Path(written("hidden/b.txt", value)).name]),
}
"""How a config that names a program may lie in a checkpoint's, which a parser reads nevertheless."""


@pytest.fixture
def beside_evil(run: Path, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A checkpoint to be changed, where one stands beside a module that nothing may import."""
    (tmp_path / "evil.py").write_text(EVIL.format(str(ran)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield torch.load(run, weights_only=True)
    assert "evil" not in sys.modules


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_checkpoints_config_runs_no_program(
    program: str, beside_evil: dict[str, Any], tmp_path: Path, ran: Path
) -> None:
    """Plain values alone, which ``weights_only`` lets through, name what is imported and called."""
    pickled(tmp_path / "evil.pth", ran)
    key, value = PROGRAMS[program]
    beside_evil["hyper_parameters"][key] = value
    torch.save(beside_evil, "changed.ckpt")
    message = f"would run '{program}': .*Set `trusted` to true if you trust"
    refused(ran, message, lambda: main(["export", "--ckpt", "changed.ckpt", "--out", "out"]))
    refused(ran, message, lambda: LatentDiffusionModule.load_from_checkpoint("changed.ckpt"))


@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_program_in_a_text_is_not_built(hidden: str, beside_evil: dict[str, Any], ran: Path) -> None:
    beside_evil["hyper_parameters"]["denoiser"] = HIDDEN[hidden](over("evil.Backbone")[1])
    torch.save(beside_evil, "changed.ckpt")
    message = "would run 'evil.Backbone'"
    refused(ran, message, lambda: LatentDiffusionModule.load_from_checkpoint("changed.ckpt"))


@pytest.mark.parametrize("kind", ["device", "pipe", "long text"])
def test_a_file_that_is_not_read_to_its_end_is_no_config(kind: str, beside_evil: dict[str, Any], ran: Path) -> None:
    """A device would be read until memory is gone, and a pipe for ever; a parser takes pipes and long texts."""
    name = {"device": "/dev/zero", "pipe": "pipe.yaml", "long text": "long.yaml"}[kind]
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "long text":
        Path(name).write_text("#" * 2**20 + "\nclass_path: evil.Backbone\n")
    beside_evil["hyper_parameters"]["denoiser"] = name
    torch.save(beside_evil, "changed.ckpt")
    message = f"would run '{name}'"
    refused(ran, message, lambda: LatentDiffusionModule.load_from_checkpoint("changed.ckpt"))


@pytest.mark.parametrize("of", ["text", "values"])
def test_aliases_are_looked_through_once(of: str, beside_evil: dict[str, Any], ran: Path) -> None:
    """A part that stands twice in one that stands twice, and so on, stands in more places than one could look at."""
    if of == "text":
        lines = ["a0: &a0 nothing", *(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]" for n in range(60))]
        beside_evil["hyper_parameters"]["denoiser"] = "\n".join([*lines, "last: {class_path: evil.Backbone}"])
    else:
        part: Any = "nothing"
        for _ in range(60):
            part = [part, part]
        beside_evil["hyper_parameters"]["denoiser"] = [part, {"class_path": "evil.Backbone"}]
    torch.save(beside_evil, "changed.ckpt")
    message = "would run 'evil.Backbone'"
    refused(ran, message, lambda: LatentDiffusionModule.load_from_checkpoint("changed.ckpt"))


@pytest.mark.parametrize("name", ["evil.ckpt", "evil.safetensors"])
def test_weights_that_are_called_like_a_module_are_no_program(
    name: str, beside_evil: dict[str, Any], ran: Path
) -> None:
    """A file of weights stands at ``weights``, and nothing is imported for it; elsewhere the name is refused."""
    if name.endswith(".ckpt"):
        torch.save(beside_evil, name)
    else:
        save_file(beside_evil["state_dict"], name)
    beside_evil["hyper_parameters"]["weights"] = name
    torch.save(beside_evil, "changed.ckpt")
    assert exported(export_checkpoint("changed.ckpt", "out"))
    assert not ran.exists()
    for key, value in (("denoiser", name), over(name), ("fine_tuning", {"weights": name})):
        torch.save({**beside_evil, "hyper_parameters": beside_evil["hyper_parameters"] | {key: value}}, "other.ckpt")
        refused(ran, f"would run '{name}'", lambda: LatentDiffusionModule.load_from_checkpoint("other.ckpt"))


def test_a_program_in_the_place_of_an_optimizer_is_not_built(run: Path, tmp_path: Path, ran: Path) -> None:
    changed = torch.load(run, weights_only=True)
    changed["hyper_parameters"]["optimizer"] = {"class_path": "os.mkdir", "init_args": {"path": str(ran)}}
    torch.save(changed, tmp_path / "changed.ckpt")
    message = "would run 'os.mkdir': .*Set `trusted`"
    refused(ran, message, lambda: LatentDiffusionModule.load_from_checkpoint(tmp_path / "changed.ckpt"))
    export_checkpoint(str(tmp_path / "changed.ckpt"), str(tmp_path / "out"))
    assert not ran.exists()
    assert exported(tmp_path / "out")


def test_a_checkpoint_of_ones_own_parts_is_trusted_by_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_parts.py").write_text("from lpl_lightning import FlowMatching\n\nclass Own(FlowMatching): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    changed = torch.load(run, weights_only=True)
    changed["hyper_parameters"]["noise"] = {"class_path": "own_parts.Own"}
    torch.save(changed, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match="would run 'own_parts.Own'"):
        main(["export", f"--ckpt={tmp_path / 'changed.ckpt'}", f"--out={tmp_path / 'out'}"])
    main(["export", f"--ckpt={tmp_path / 'changed.ckpt'}", f"--out={tmp_path / 'out'}", "--trusted=true"])
    assert exported(tmp_path / "out")
    module = LatentDiffusionModule.load_from_checkpoint(tmp_path / "changed.ckpt", trusted=True)
    assert type(module.noise).__name__ == "Own"
    (tmp_path / "own_module.py").write_text(
        "from lpl_lightning import LatentDiffusionModule\n\nclass Own(LatentDiffusionModule): pass\n"
    )
    changed["hyper_parameters"]["_class_path"] = "own_module.Own"
    torch.save(changed, tmp_path / "changed.ckpt")
    main(["export", f"--ckpt={tmp_path / 'changed.ckpt'}", f"--out={tmp_path / 'whole'}", "--trusted=true"])
    assert exported(tmp_path / "whole")
    given: tuple[dict[str, Any], ...] = ({"weights_only": False}, {"hparams_file": "a.yaml"})
    for options in given:
        with pytest.raises(ValueError, match="`weights_only` and `hparams_file` left alone"):
            LatentDiffusionModule.load_from_checkpoint(run, **options)


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_models_of_the_configs_may_be_rebuilt(config: str) -> None:
    model = (yaml.safe_load((ROOT / "configs" / config).read_text()) or {}).get("model")
    if not model or "class_path" not in model:
        pytest.skip("an overlay")
    parameters = {"_class_path": model["class_path"], "_instantiator": INSTANTIATORS[0], **model["init_args"]}
    modules: dict[str, type[torch.nn.Module]] = {
        "LatentDiffusionModule": LatentDiffusionModule,
        "AutoencoderModule": AutoencoderModule,
    }
    check_config(parameters, modules[model["class_path"].split(".")[-1]], config)


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("ema", [None, 0.5])
def test_exported_files_say_where_they_are_from(run: Path, tmp_path: Path, ema: float | None) -> None:
    folder = export_checkpoint(str(run), str(tmp_path / "out"), ema)
    for file in (
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        folder / "class_embeddings.safetensors",
    ):
        said = metadata(file)
        assert said["step"] == "2"
        assert said["epoch"] == "0"
        assert said["weights"] == ("as they were trained" if ema is None else "moving average of decay 0.5")
        assert f"torch {torch.__version__.split('+')[0]}" in said["versions"]
        assert json.loads(said["config"])["denoiser"]["class_path"] == "lpl_lightning.SD3Denoiser"
        model = json.loads(said["model"])
        assert (model["denoiser"], model["prediction_type"]) == ("SD3Denoiser", "flow")
        assert "base" not in said, "its weights were drawn"
    assert metadata(folder / "transformer" / "diffusion_pytorch_model.safetensors")["format"] == "pt"
    trained: Any = SD3Transformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
    for name, tensor in weights(run, ema is not None).items():
        assert torch.equal(trained.state_dict()[name], tensor)
    assert "step" not in (metadata(folder / "vae" / "diffusion_pytorch_model.safetensors")), "it was not trained"


def test_what_weights_were_trained_from_is_kept(make_module: Any, tmp_path: Path) -> None:
    options = {"conditioner": ClassTokens(8, token_dim=8, pooled_dim=8)}
    base = tmp_path / "base.safetensors"
    save_file(make_module(**copy.deepcopy(options)).state_dict(), base)
    first = fit(make_module(**copy.deepcopy(options), weights=str(base)), tmp_path, callbacks=[EMA(decay=0.5)])
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = make_module(**copy.deepcopy(options))
    callbacks = [EMA(decay=0.5), SaveDiffusers(), SaveWeights()]
    fit(again, tmp_path / "run", ckpt_path=tmp_path / "a.ckpt", max_steps=3, callbacks=callbacks)
    for file in ("weights.safetensors", "diffusers/transformer/diffusion_pytorch_model.safetensors"):
        said = metadata(tmp_path / "run" / file)
        assert said["base"] == str(base)
        assert said["step"] == "3"
        assert said["weights"] == "moving average of decay 0.5"
        assert "config" not in said, "it was built by hand"
    for name, tensor in load_file(tmp_path / "run" / "weights.safetensors").items():
        assert torch.equal(tensor, again.state_dict()[name])
