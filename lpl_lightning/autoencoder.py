r"""The frozen autoencoder: images to latents and back, and what the decoder makes of a latent on its way.

Latents are scaled as the diffusion model sees them, :math:`z = (F^e(x) - shift) \cdot scale`, as the model's config
says (``latents``). The decoder runs as a list of stages (``stages``, ``video_stages``), or as it is with hooks on
modules named by the user (``feature_modules``); either way it stops after the last output asked for.
:math:`\phi_l` of the Latent Perceptual Loss (Berrada et al., ICLR 2025, eq. 2) is the l-th feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

import lpl_lightning.video_stages  # noqa: F401  registers its families
from lpl_lightning.arguments import at_least
from lpl_lightning.autoencoder_loading import load_autoencoder
from lpl_lightning.draws import Generators
from lpl_lightning.execution import StageRunner
from lpl_lightning.feature_modules import check_feature_modules, compvis_modules, note_unknown_scale, run_to_modules
from lpl_lightning.frozen import FrozenModule
from lpl_lightning.latents import config_of, latent_space
from lpl_lightning.memory import Halving
from lpl_lightning.model_loading import PRECISIONS
from lpl_lightning.posterior import ImageEncoder, drawn, moments
from lpl_lightning.stages import Stage, check_stages, decoder_stages

__all__ = ["Autoencoder", "Stage", "decoder_stages"]


class Autoencoder(FrozenModule):
    """A frozen autoencoder: ``encode``, ``decode`` and the decoder's ``features``.

    Its parameters take no gradient (gradients pass through it to its input) and stay out of the state dict of any
    module it is part of, so that checkpoints hold only what was trained; it keeps its precision when the module around
    it is put in a lower one, and follows it to a higher one.

    Known are AutoencoderKL, AsymmetricAutoencoderKL (decoding without image and mask), AutoencoderTiny, AutoencoderDC,
    AutoencoderKLFlux2 (whose latents are the patchified and normalized ones of FLUX.2), VQModel (latents before
    quantization), AutoencoderRAE, and AutoencoderKLWan and AutoencoderKLQwenImage for video; classes of other projects
    with CompVis's decoder (``compvis_modules``); any other model, of images, volumes or (where it has a
    ``temporal_compression_ratio``) video, by ``feature_modules``.

    Args:
        model: An autoencoder module, or where to load one: a folder that ``save_pretrained`` wrote, a .safetensors
            file, a Hugging Face hub id, or ``embedded:autoencoder_shapes`` (f = 4, four channels, 64 px shapes).
        subfolder: Subfolder of the folder or hub repository, such as ``vae`` in that of a pipeline. With a single
            file, that of ``config``.
        sample_posterior: Whether ``encode`` draws from the posterior, where there is one, or takes its mode.
        config: For a single file: where the config of its model is, a folder with config.json, a JSON file or a hub
            id. By default config.json beside the file.
        feature_modules: Names of modules of ``model``, such as "decoder.blocks.3", in the order they run, whose
            outputs are the features: a tensor or the first one of a tuple. The model then decodes by its own ``decode``
            or, if it has none, by being called.
        scaling_factor: Replaces the config's, or what ``latents_std`` makes of it: one number or one per channel.
        shift_factor: Replaces the config's, or its ``latents_mean``: one number or one per channel.
        downscale: Replaces what the config says of the side of an image over the side of its latent.
        dtype: Precision to put the model in. By default float32 for a loaded model, a module's own for a module.
        autocast: Whether decoding follows the autocast around it. By default it runs in the model's precision, as
            encoding always does, and in float16 a decoder that overflows in it (``force_upcast`` of its config).

    Raises:
        FileNotFoundError: ``model`` or ``config`` does not exist or holds nothing that loads.
        ValueError: The decoder is of no known family and there are no ``feature_modules``; they are not modules of it;
            numbers do not fit its channels; float16 for a decoder that overflows in it; a file that does not fit.
    """

    model: Any  # an autoencoder: nn.Module would give its attributes the type of modules
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        model: str | nn.Module,
        subfolder: str | None = None,
        sample_posterior: bool = True,
        config: str | None = None,
        feature_modules: Sequence[str] | None = None,
        scaling_factor: float | Sequence[float] | None = None,
        shift_factor: float | Sequence[float] | None = None,
        downscale: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in PRECISIONS:
            raise ValueError(f"`dtype` must be one of {tuple(PRECISIONS)}, got {dtype!r}.")
        precision = PRECISIONS[dtype]
        if isinstance(model, str):
            model = load_autoencoder(model, subfolder, config, precision or torch.float32)
        elif subfolder is not None or config is not None:
            raise ValueError("`subfolder` and `config` say where to load a model from, but `model` is a module itself.")
        space = latent_space(model)  # reads the numbers before a lower precision rounds them
        # nn.Module's own `to`: that of diffusers' models warns of float32 parts even where there are none.
        self.model = model if precision is None else nn.Module.to(model, precision)
        self.train(False).requires_grad_(False)
        self.sample_posterior = sample_posterior
        self.autocast = autocast
        self._encoder, self._halving = ImageEncoder(), Halving()
        settings = config_of(model)
        # Where a config does not say it, as Stable Diffusion 1.5's, diffusers' default says nothing of the model.
        is_said = "force_upcast" not in settings.get("_use_default_values", ())
        self._overflows = is_said and bool(settings.get("force_upcast"))
        if self._overflows and self.dtype == torch.float16:
            raise ValueError(
                f"`dtype`: {type(model).__name__} must run in float32 or bfloat16, got float16, in which its decoder "
                "overflows (force_upcast in its config). Give dtype='bfloat16', or weights made for float16; of a "
                "module that a loop runs in float16 give a copy, copy.deepcopy(vae).float()."
            )
        if feature_modules is None and decoder_stages.dispatch(type(model)) is decoder_stages.dispatch(object):
            feature_modules = compvis_modules(model)
        self._feature_modules = None if feature_modules is None else tuple(feature_modules)
        if feature_modules is None:
            check_stages(model)
        else:
            check_feature_modules(model, feature_modules)
        if downscale is not None:
            at_least(1, downscale=downscale)
            space = replace(space, downscale=downscale)
        note_unknown_scale(model, space, scaling_factor)
        self.space = space.rescaled(scaling_factor, shift_factor)  # what its latents are
        for name in ("shift", "scale"):
            self.register_buffer(name, torch.empty(0))
        self._set_affine()

    @property
    def stages(self) -> list[Stage]:
        """The decoder's stages. Not kept: they close over the model, and a deep copy must run its own."""
        return decoder_stages(self.model)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names that ``features`` can be asked for, in the order they run: ``feature_names``, then "image"."""
        return (*self.feature_names, "image")

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the outputs that are feature maps, shallow to deep."""
        return self._feature_modules or tuple(stage.name for stage in self.stages if stage.is_feature)

    @property
    def in_stages(self) -> bool:
        """Whether the decoder runs as ``stages``, and not as it is, with hooks on ``feature_modules``."""
        return self._feature_modules is None

    @property
    def is_video(self) -> bool:
        """Whether latents are (B, C, T, h, w) with frames first."""
        return self.space.is_video

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents; ValueError if the model does not say."""
        if self.space.channels is None:
            raise ValueError(
                f"`latent_channels` is not known: {type(self.model).__name__} has no such config or attribute. Set "
                "`model.latent_channels` before wrapping it."
            )
        return self.space.channels

    @property
    def image_size(self) -> int | None:
        """The one side that images may have; None where that is free."""
        return self.space.image_size

    @property
    def downscale(self) -> int:
        """Side of an image over the side of its latent; ValueError if neither argument nor model says."""
        if self.space.downscale is None:
            raise ValueError(
                f"`downscale` is not known: the config of {type(self.model).__name__} does not say. Give `downscale`, "
                "the side of an image over the side of its latent, to Autoencoder."
            )
        return self.space.downscale

    @torch.no_grad()
    def encode(self, images: Tensor, generator: Generators | None = None) -> Tensor:
        """Map images to scaled latents.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W divisible by ``downscale``; video is (B, 3, 1 + 4n, H, W), and
                models with ``feature_modules`` may take other shapes.
            generator: Source of the posterior's noise, one or one a sample.

        Returns:
            z0: (B, C, H / downscale, W / downscale); of video (B, C, T, h, w).

        Raises:
            ValueError: Images of another shape or on another device, or a model that cannot encode.
        """
        return self.space.checked(self._scaled(drawn(self._encoded(images), self.sample_posterior, generator)), images)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of images' scaled latents; arguments and errors are those of ``encode``.

        Returns:
            Two tensors as ``encode`` gives one; None for the latter where the latent is certain.
        """
        mean, deviation = moments(self._encoded(images))
        if deviation is None:
            return self._scaled(mean), None
        _, scale = self._affine(mean.ndim)
        return self._scaled(mean), self.space.pack(deviation).to(scale.dtype) * scale.abs()

    def _encoded(self, images: Tensor) -> Any:
        self._check_device("images", images)
        self.space.check_images(images)
        return self._encoder(self.model, self.space.images_in(images).to(self.dtype))

    def _scaled(self, z: Tensor) -> Tensor:
        shift, scale = self._affine(z.ndim)
        return (self.space.pack(z).to(scale.dtype) - shift) * scale

    def decode(self, z: Tensor) -> Tensor:
        """Map scaled latents (B, C, h, w) to images (B, 3, h * downscale, w * downscale), about [-1, 1].

        Raises:
            ValueError: Latents of another shape or on another device.
        """
        return self._halving("Decoder", lambda part: self._run(part, ("image",), ())[0], z, torch.cat)

    def features(
        self,
        z: Tensor,
        depth: int | Sequence[str] | None = None,
        skip: Collection[str] = (),
        runner: StageRunner | None = None,
    ) -> list[Tensor]:
        """Run the decoder as far as the deepest output asked for and give back those asked for.

        Args:
            z: Scaled latents (B, C, h, w), or (B, C, ...) as the model has them. Gradients flow back to it.
            depth: How many feature maps, or names out of ``stage_names``; all feature maps by default.
            skip: Stages that are neither features nor "image" to leave out, such as "post_quant_conv". Names of
                stages that this decoder does not have are passed over.
            runner: What runs the stages; by default they run as they are.

        Returns:
            Maps (B, C_l, h_l, w_l), shallow to deep, in the autoencoder's precision.

        Raises:
            ValueError: ``depth`` out of range, an unknown name, a stage that cannot be left out, or latents of another
                shape or on another device.
        """
        names = self.feature_names
        if depth is None:
            return self._run(z, names, skip, runner)
        if isinstance(depth, int):
            if not 1 <= depth <= len(names):
                raise ValueError(f"`depth` must lie in 1 .. {len(names)} for {names}, got {depth}.")
            return self._run(z, names[:depth], skip, runner)
        wanted = (depth,) if isinstance(depth, str) else tuple(depth)
        unknown = [name for name in wanted if name not in (*names, "image")]
        if unknown or not wanted:
            raise ValueError(
                f"`depth` must be a number or name one or more of {self.stage_names}, got {unknown or wanted}."
            )
        return self._run(z, wanted, skip, runner)

    def _run(
        self, z: Tensor, wanted: Collection[str], skip: Collection[str], runner: StageRunner | None = None
    ) -> list[Tensor]:
        self._check_device("z", z)
        self.space.check_latents(z)
        with self._precision(z.device.type):
            shift, scale = self._affine(z.ndim)
            current = self.space.unpack(z.to(scale.dtype) / scale + shift).to(self.dtype)
            if runner is not None:
                current = runner.prepare(current, self.model)
            if self._feature_modules is None:
                outputs = self._run_stages(current, wanted, skip, runner)
            else:
                with nullcontext() if runner is None else runner.operations(current.device):
                    outputs = run_to_modules(self.model, self._feature_modules, wanted, current, skip)
            if "image" in wanted:
                outputs[-1] = self.space.images_out(outputs[-1])
        return outputs

    def _run_stages(
        self, z: Tensor, wanted: Collection[str], skip: Collection[str], runner: StageRunner | None
    ) -> list[Tensor]:
        stages = self.stages
        kept = [stage.name for stage in stages if stage.name in skip and (stage.is_feature or stage.name == "image")]
        if kept:
            raise ValueError(f"`skip`: {kept} are features or the image, and cannot be left out of the decoder.")
        outputs: list[Tensor] = []
        current: Any = z
        for stage in stages:
            if stage.name in skip:
                continue
            current = stage.run(current) if runner is None else runner(stage, current, z)
            if stage.name in wanted:
                outputs.append(stage.read(current))
                if len(outputs) == len(set(wanted)):
                    break
        return outputs

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        """Autocast off, unless it is asked for and the decoder stands it."""
        follow = self.autocast and not (self._overflows and torch.get_autocast_dtype(device) == torch.float16)
        return nullcontext() if follow else torch.autocast(device, enabled=False)

    def _check_device(self, argument: str, tensor: Tensor) -> None:
        if self.scale.device != self._device:  # the model was moved by itself, as loops do that share it
            self._set_affine()
        if tensor.device != self.scale.device:
            raise ValueError(
                f"`{argument}` must be on {self.scale.device}, where the autoencoder is; got {tensor.device}. "
                "Move one of them with `.to(device)`."
            )

    def _affine(self, rank: int) -> tuple[Tensor, Tensor]:
        """Shift and scale, each (1, C or 1, 1, ...) of this many dimensions."""
        shape = (1, -1, *[1] * (rank - 2))
        return self.shift.view(shape), self.scale.view(shape)

    def _set_affine(self) -> None:
        """Make the buffers ``shift`` and ``scale``, (C or 1), out of exact numbers.

        At least float32: a model in half precision does not make its latents so.
        """
        dtype = torch.promote_types(self.dtype, torch.float32)
        # Those made in inference mode, as of a `to` in a validation, could take part in no graph later.
        with torch.inference_mode(False):
            self.shift = torch.tensor(self.space.shift, dtype=dtype, device=self._device)
            self.scale = torch.tensor(self.space.scale, dtype=dtype, device=self._device)

    def _floating(self) -> Iterator[Tensor]:
        return (tensor for tensor in chain(self.model.parameters(), self.model.buffers()) if tensor.is_floating_point())

    @property
    def _device(self) -> torch.device:
        return next((tensor.device for tensor in self._floating()), self.scale.device)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the wrapped model."""
        return next((tensor.dtype for tensor in self._floating()), torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Make shift and scale anew out of exact numbers after a move or a higher precision."""
        super()._apply(fn, recurse)
        self._set_affine()
        return self
