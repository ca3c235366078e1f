r"""Parts of a trained module, as a diffusers pipeline takes them.

A pipeline decodes :math:`z / scale + shift` with the numbers that it looks for in the autoencoder's config. Where it
looks for none of those that a module trained with, or not for one per channel, they are put into the 1 x 1 convolutions
at the autoencoder's latents, which is the same function.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import diffusers
import torch
from torch import Tensor, nn

from lpl_lightning.backbones import DiTDenoiser, FluxDenoiser, PixArtDenoiser, SanaDenoiser, SD3Denoiser, UNetDenoiser
from lpl_lightning.denoiser import Denoiser
from lpl_lightning.latents import config_of
from lpl_lightning.module import LatentDiffusionModule

__all__ = ["Target", "autoencoder_part", "converted", "copied", "scheduler_part", "target_of"]


@dataclass(frozen=True)
class Target:
    """A pipeline, and what its code expects of its parts.

    Attributes:
        pipeline: Its class.
        part: What it calls the backbone.
        shifts: Whether it adds ``shift_factor`` of the autoencoder's config.
        scales: Whether it scales noise and inputs as the scheduler says, which EDM needs and flow schedulers lack.
        levels: What it counts in the autoencoder's config.
    """

    pipeline: Any
    part: Literal["transformer", "unet"] = "transformer"
    shifts: bool = False
    scales: bool = False
    levels: str = "block_out_channels"


def target_of(denoiser: Denoiser) -> Target | None:
    """The pipeline that fits a denoiser."""
    match denoiser:
        case SD3Denoiser():
            return Target(diffusers.StableDiffusion3Pipeline, shifts=True)
        case FluxDenoiser():
            return Target(diffusers.FluxPipeline, shifts=True)
        case SanaDenoiser():
            return Target(diffusers.SanaPipeline, levels="encoder_block_out_channels")
        case DiTDenoiser():
            return Target(diffusers.DiTPipeline, scales=True)
        case PixArtDenoiser():
            # Only the older of the two tells the backbone its sizes.
            sized = denoiser.backbone.use_additional_conditions
            return Target(diffusers.PixArtAlphaPipeline if sized else diffusers.PixArtSigmaPipeline, scales=True)
        case UNetDenoiser():
            is_xl = denoiser.backbone.config.addition_embed_type == "text_time"
            pipeline = diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
            return Target(pipeline, part="unet", scales=True)
    return None


def converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor on the CPU, as safetensors takes it, in a precision if it holds numbers of some."""
    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", kind).contiguous()


def copied(model: Any, dtype: torch.dtype | None) -> Any:
    """A copy on the CPU in a precision, to be written and not trained; it shares what is so already."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        data = converted(tensor, dtype)
        memo[id(tensor)] = nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
    return copy.deepcopy(model, memo)


def autoencoder_part(module: LatentDiffusionModule, target: Target, dtype: torch.dtype | None, said: list[str]) -> Any:
    """The autoencoder, such that the pipeline scales latents as the module does; None if there is no way."""
    model, config, name = module.autoencoder.model, config_of(module.autoencoder.model), target.pipeline.__name__
    wanted = _as_written(module.autoencoder.scale), _as_written(module.autoencoder.shift)
    if not isinstance(model, diffusers.ModelMixin) or not {"scaling_factor", target.levels} <= set(config):
        said.append(f"{name} cannot decode by a {type(model).__name__}: it is left out, ask for output_type='latent'")
        return None
    vae = copied(model, dtype)
    if target.pipeline is diffusers.StableDiffusionXLPipeline and _matches(wanted, _read_by_sdxl(config)):
        return vae
    (scale, *others), (shift, *more) = (sorted(set(numbers)) for numbers in wanted)
    if not others and not more and (target.shifts or shift == 0):
        numbers = {"scaling_factor": scale, "shift_factor": shift, "latents_mean": None, "latents_std": None}
        vae.register_to_config(**{key: value for key, value in numbers.items() if key in config})
        if "shift_factor" in config or not target.shifts:
            return vae
    elif isinstance(vae, diffusers.AutoencoderKL):
        _fold(vae, *wanted)
        said.append(f"scale and shift of the latents are in the autoencoder's weights: {name} does not read them")
        return vae
    said.append(f"{name} does not scale latents as this module does: no autoencoder, ask for output_type='latent'")
    return None


def _as_written(numbers: Tensor) -> list[float]:
    """Numbers as they were written before float32 rounded them: 0.13025 and not 0.1302500069."""
    return [float(f"{number:.7g}") for number in numbers.flatten().tolist()]


def _read_by_sdxl(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Scale and shift that SDXL's pipeline, alone among these, reads per channel."""
    mean, std, factor = config.get("latents_mean"), config.get("latents_std"), config["scaling_factor"]
    # It has four channels written in.
    if mean is None or std is None or len(mean) != 4:
        return [factor], [0.0]
    return [factor / value for value in std], list(mean)


def _matches(a: tuple[list[float], ...], b: tuple[list[float], ...]) -> bool:
    pairs = (torch.broadcast_tensors(torch.tensor(x), torch.tensor(y)) for x, y in zip(a, b, strict=True))
    return all(torch.allclose(x, y, rtol=1e-6, atol=0.0) for x, y in pairs)


def _fold(vae: Any, scale: list[float], shift: list[float]) -> None:
    """Put scale and shift into the convolutions around the latents, and 1 and 0 in their place into the config."""
    channels = vae.config.latent_channels
    s, b = (torch.tensor(numbers, dtype=torch.float64).expand(channels) for numbers in (scale, shift))
    like = next(vae.parameters())
    # Encoded are means m and logarithms of variances v: s (m - b) and v + 2 ln |s|.
    factor, offset = torch.cat([s, torch.ones_like(s)]), torch.cat([b, -2 * s.abs().log()])
    weight, bias = _pointwise(vae.quant_conv, 2 * channels)
    vae.quant_conv = _convolution(factor[:, None] * weight, factor * (bias - offset), like)
    # Decoded is z / s + b.
    weight, bias = _pointwise(vae.post_quant_conv, channels)
    vae.post_quant_conv = _convolution(weight / s, bias + weight @ b, like)
    vae.register_to_config(
        scaling_factor=1.0,
        shift_factor=0.0,
        latents_mean=None,
        latents_std=None,
        use_quant_conv=True,
        use_post_quant_conv=True,
    )


def _pointwise(convolution: nn.Conv2d | None, channels: int) -> tuple[Tensor, Tensor]:
    """Matrix and bias of a 1 x 1 convolution, or of none."""
    if convolution is None:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    return convolution.weight.detach().double()[:, :, 0, 0], cast(Tensor, convolution.bias).detach().double()


def _convolution(weight: Tensor, bias: Tensor, like: Tensor) -> nn.Conv2d:
    made = nn.Conv2d(weight.shape[1], weight.shape[0], 1, dtype=like.dtype)
    made.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
    return made.requires_grad_(False)


def scheduler_part(module: LatentDiffusionModule, target: Target, said: list[str]) -> Any:
    """The scheduler that the module samples by, or one that the pipeline can call in its place."""
    scheduler = copy.deepcopy(module.sampler.scheduler)
    if scheduler is None:
        scheduler = module.noise.sampling_scheduler()
    name, kind = target.pipeline.__name__, type(scheduler).__name__
    # Flux's pipeline says itself where the steps lie, and how they are shifted for the size of the images.
    if target.pipeline is diffusers.FluxPipeline and not _takes(scheduler.set_timesteps, "sigmas", "mu"):
        said.append(f"{name} cannot sample by a {kind}: sample with `lpl predict`, or by your own loop")
    elif target.scales and not hasattr(scheduler, "scale_model_input"):
        config = scheduler.config
        scheduler = diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=config.num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=config.get("shift", 1.0),
        )
        said.append(f"{name} cannot call a {kind}: the scheduler is a DPMSolverMultistepScheduler along the same flow")
    elif getattr(scheduler, "init_noise_sigma", 1.0) != 1 and (
        not target.scales or target.pipeline is diffusers.DiTPipeline
    ):
        said.append(f"{name} does not scale the noise as {kind} asks: sample with `lpl predict`, or by your own loop")
    elif isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler) and target.pipeline in (
        diffusers.StableDiffusion3Pipeline,
        diffusers.SanaPipeline,
    ):
        said.append(
            f"{name} places the steps otherwise than `lpl predict`, the last at almost no noise: give it "
            "sigmas=[1 - i / n for i in range(n)] for n steps"
        )
    elif isinstance(scheduler, diffusers.DDIMScheduler) and scheduler.config.timestep_spacing != "leading":
        steps, chain = module.sampler.num_steps, scheduler.config.num_train_timesteps
        if scheduler.config.timestep_spacing == "linspace":
            said.append(
                f"{name} samples otherwise than `lpl predict` by timestep_spacing='linspace', at any "
                f"num_inference_steps from 2 to {chain - 1}: export with 'trailing', and sample by steps that divide "
                f"{chain}"
            )
        elif chain % steps:
            said.append(
                f"{name} leaves noise behind by {steps} steps, unlike `lpl predict`: give it num_inference_steps that "
                f"divide {chain}"
            )
    return scheduler


def _takes(function: Callable[..., object], *names: str) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)
