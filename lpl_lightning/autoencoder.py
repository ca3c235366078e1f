r"""The frozen autoencoder: images to latents and back, and what the decoder makes of a latent on its way.

Latents are scaled as the diffusion model sees them, :math:`z = (F^e(x) - shift) \cdot scale`, with ``shift_factor``
and ``scaling_factor``, or ``latents_mean`` and ``latents_std`` per channel, from the wrapped model's config.

The decoder runs as a list of *stages*, so that it can stop early: :math:`\phi_l` of the Latent Perceptual Loss
(Berrada et al., ICLR 2025, eq. 2) is the output of its stage l.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any, Self, cast

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from lpl_lightning.pretrained import locate

__all__ = ["Autoencoder", "Stage", "decoder_stages"]


@dataclass(frozen=True)
class Stage:
    """One step of a decoder.

    Attributes:
        name: Its name in configs and logs.
        run: Takes the output of the stage before, (B, C, h, w), and gives its own.
        is_feature: Whether its output is a feature map that the Latent Perceptual Loss may compare. The stage that
            makes the image out of the last features is none.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    is_feature: bool = True


@singledispatch
def decoder_stages(model: nn.Module) -> list[Stage]:
    """Split a model's decoder into stages, from the unscaled latent to the image.

    Register a function for another class of autoencoder with ``@decoder_stages.register``.

    Args:
        model: An autoencoder as diffusers makes it.

    Returns:
        Stages which run one after another equal the model's own ``decode``.
    """
    raise ValueError(
        f"`model` must be an autoencoder whose decoder can be split into stages, got {type(model).__name__}. "
        "AutoencoderKL and AutoencoderTiny are known; for another, register a function that lists its stages with "
        "lpl_lightning.autoencoder.decoder_stages.register."
    )


@decoder_stages.register
def _(model: AutoencoderKL) -> list[Stage]:
    decoder = model.decoder

    def middle(z: Tensor) -> Tensor:
        z = model.post_quant_conv(z) if model.post_quant_conv is not None else z
        return cast(Tensor, decoder.mid_block(decoder.conv_in(z), None))

    def up(block: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda features: cast(Tensor, block(features, None))

    def image(features: Tensor) -> Tensor:
        return cast(Tensor, decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(features))))

    ups = [Stage(f"up_{i}", up(block)) for i, block in enumerate(decoder.up_blocks)]
    return [Stage("mid", middle), *ups, Stage("image", image, is_feature=False)]


@decoder_stages.register
def _(model: AutoencoderTiny) -> list[Stage]:
    layers = list(model.decoder.layers)
    starts = [0, *(i for i, layer in enumerate(layers) if isinstance(layer, nn.Upsample))]
    blocks = [nn.Sequential(*layers[a:b]) for a, b in zip(starts, [*starts[1:], len(layers) - 1], strict=True)]
    to_rgb = layers[-1]

    def first(z: Tensor) -> Tensor:
        return cast(Tensor, blocks[0](torch.tanh(z / 3) * 3))

    def image(features: Tensor) -> Tensor:
        return cast(Tensor, to_rgb(features).mul(2).sub(1))

    ups = [Stage(f"up_{i}", block) for i, block in enumerate(blocks[1:])]
    return [Stage("mid", first), *ups, Stage("image", image, is_feature=False)]


def _load(source: str, subfolder: str | None) -> nn.Module:
    """Load an autoencoder, of the class that its config names, from what ``locate`` finds."""
    found = locate(source, "model")
    where: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    if isinstance(found, Path):
        where["local_files_only"] = True
        if not (found / (subfolder or "") / "config.json").is_file():
            raise FileNotFoundError(
                f"`model`={source!r} holds no config.json: expected a folder that save_pretrained wrote"
                + (f", in its subfolder {subfolder!r}." if subfolder else "; is it in a subfolder (`subfolder`)?")
            )
    config = AutoencoderKL.load_config(str(found), **where)
    name = config.get("_class_name", "AutoencoderKL")
    family = getattr(diffusers, name, None)
    if family is None:
        raise ValueError(f"`model`={source!r} is a {name!r}, which the installed diffusers does not have.")
    # low_cpu_mem_usage needs accelerate, which nothing else here does.
    model = family.from_pretrained(str(found), torch_dtype=torch.float32, low_cpu_mem_usage=False, **where)
    return cast(nn.Module, model)


class Autoencoder(nn.Module):
    """A frozen diffusers autoencoder: ``encode``, ``decode`` and the decoder's ``features``.

    It never leaves eval mode, its parameters take no gradient (gradients pass through it to its input), it runs
    outside autocast in the precision it came in, and it keeps itself out of the state dict of any module it is part of,
    so that checkpoints hold only what was trained.

    Args:
        model: An autoencoder module, or where to load one: a folder that ``save_pretrained`` wrote, a Hugging Face
            hub id, or ``embedded:autoencoder_shapes`` (f = 4, four channels, 64 px shapes).
        subfolder: Subfolder of the folder or hub repository, such as ``vae`` in that of a pipeline.
        sample_posterior: Whether ``encode`` draws from the posterior, where there is one, or takes its mode.
    """

    model: Any  # a diffusers autoencoder
    shift: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module | str, subfolder: str | None = None, sample_posterior: bool = True) -> None:
        super().__init__()
        module = _load(model, subfolder) if isinstance(model, str) else model
        decoder_stages(module)  # an unknown kind is refused here rather than at the first step
        self.model = module.eval().requires_grad_(False)
        self.sample_posterior = sample_posterior
        config = cast(Mapping[str, Any], module.config)
        self._config = config
        # At least float32: a model in half precision does not make its latents so.
        shift, scale = (value.to(torch.promote_types(self.dtype, torch.float32)) for value in _latent_affine(config))
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        cast(Any, self).register_load_state_dict_pre_hook(_keep_own_weights)
        self.train(False)

    @property
    def stages(self) -> list[Stage]:
        """The decoder's stages. Not kept: they close over the model, and a deep copy must run its own."""
        return decoder_stages(self.model)

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents."""
        return int(self._config["latent_channels"])

    @property
    def downscale(self) -> int:
        """Side of an image over the side of its latent."""
        return int(2 ** (len(self._config["block_out_channels"]) - 1))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the stages whose outputs are features, shallow to deep."""
        return tuple(stage.name for stage in self.stages if stage.is_feature)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map images to scaled latents.

        Args:
            images: (B, 3, H, W) in [-1, 1]; H and W divisible by ``downscale``.
            generator: Source of the posterior's noise.

        Returns:
            z0: (B, C, H / downscale, W / downscale).
        """
        if images.ndim != 4 or any(side % self.downscale for side in images.shape[-2:]):
            raise ValueError(
                f"`images` must be (B, 3, H, W) with H and W divisible by {self.downscale}, the autoencoder's "
                f"downscaling; got {tuple(images.shape)}. Choose another `image_size`."
            )
        with torch.autocast(images.device.type, enabled=False):
            encoded = self.model.encode(images.to(self.dtype))
            if hasattr(encoded, "latent_dist"):
                posterior = encoded.latent_dist
                z = posterior.sample(generator) if self.sample_posterior else posterior.mode()
            else:
                z = encoded.latents
            return cast(Tensor, (z.to(self.scale.dtype) - self.shift) * self.scale)

    def decode(self, z: Tensor) -> Tensor:
        """Map scaled latents (B, C, h, w) to images (B, 3, h * downscale, w * downscale), about [-1, 1]."""
        return self._run(z, self.stages)[-1]

    def features(self, z: Tensor, depth: int | None = None) -> list[Tensor]:
        """Run the decoder as far as its stage ``depth`` and keep each stage's output.

        Args:
            z: Scaled latents (B, C, h, w). Gradients flow back to it.
            depth: How many feature maps; all by default.

        Returns:
            ``depth`` maps (B, C_l, h_l, w_l), shallow to deep, in the autoencoder's precision.
        """
        stages = [stage for stage in self.stages if stage.is_feature]
        if depth is not None and not 1 <= depth <= len(stages):
            raise ValueError(f"`depth` must lie in 1 .. {len(stages)} for {self.feature_names}, got {depth}.")
        return self._run(z, stages[:depth])

    def _run(self, z: Tensor, stages: Sequence[Stage]) -> list[Tensor]:
        outputs: list[Tensor] = []
        with torch.autocast(z.device.type, enabled=False):
            current = (z.to(self.scale.dtype) / self.scale + self.shift).to(self.dtype)
            for stage in stages:
                current = stage.run(current)
                outputs.append(current)
        return outputs

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the wrapped model."""
        return cast(torch.dtype, next(self.model.parameters()).dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow to another device but keep the precision, which a trainer would change with that of all else."""
        apply: Callable[..., Self] = super()._apply
        return apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever is asked."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Stay frozen whatever is asked."""
        return super().requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Add nothing: the autoencoder is an input of the training, not a result."""
        destination: dict[str, Any] | None = args[0] if args else kwargs.get("destination")
        return {} if destination is None else destination


def _latent_affine(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Shift and scale of the latents, each (1, C or 1, 1, 1)."""

    def channels(value: float | Sequence[float]) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32).reshape(1, -1, 1, 1)

    scale = channels(config.get("scaling_factor") or 1.0)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return channels(config["latents_mean"]), scale / channels(config["latents_std"])
    return channels(config.get("shift_factor") or 0.0), scale


def _keep_own_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Offer the autoencoder's own weights to a strict load, since a checkpoint holds none of them."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        state_dict[prefix + name] = tensor
