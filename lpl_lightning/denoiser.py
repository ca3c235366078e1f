"""One call over diffusers' backbones: ``(z_t, t, condition) -> prediction``.

A denoiser knows nothing of noise processes. ``backbones`` has those of diffusers' families; for any other, subclass
``Denoiser``, say in ``forward`` how it is called and in ``needs`` what it is conditioned on.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lpl_lightning.arguments import check_sizes
from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.conditioning import ClassTokens, Condition, Conditioner, ConditionShape
from lpl_lightning.model_loading import PRECISIONS, load_model
from lpl_lightning.pretrained import is_untrained

__all__ = ["Denoiser", "check_image_sizes", "outermost"]

_KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}


class Denoiser(nn.Module, ABC):
    """Base of denoisers.

    Args:
        backbone: The network, or where to load a diffusers model: a folder that ``save_pretrained`` wrote or a Hugging
            Face hub id; ``random:`` before either takes the config alone. What its ``config`` says, if it has one as
            diffusers' models have, is checked against the other parts.
        subfolder: Subfolder of the folder or hub repository, such as ``transformer`` in that of a pipeline, the rest
            of which is not loaded.
        dtype: Precision to put the backbone in. By default float32 for a loaded one, a module's own for a module.
            bfloat16 is for frozen weights (LoRA); to train in it choose the trainer's ``precision``.
        gradient_checkpointing: Compute the blocks anew in the backward pass, which saves their activations.
        compile: Compile the repeated blocks, each kind once; a list names the classes of the blocks.
        attention: Attention back end by the name diffusers gives it, such as ``flash``, ``_native_cudnn``, ``sage`` or
            ``xformers``. None leaves the choice to PyTorch.

    Raises:
        FileNotFoundError: ``backbone`` does not exist or holds nothing that loads.
        ValueError: The backbone is of another class, or has no such blocks or attention.
    """

    backbone: Any
    is_pretrained: bool
    """Whether the backbone was loaded with its weights."""
    saved_names: frozenset[str] = frozenset()
    """Names of the weights that a state dict holds, where it does not hold all (LoRA)."""
    family: ClassVar[type[nn.Module]] = nn.Module
    """Class of the backbones that it can call."""
    takes_rectangles: ClassVar[bool] = True
    """Whether the sides of latents may differ."""
    predicts_variance: ClassVar[bool] = False
    """Whether the backbone may predict twice the latents' channels, the second half of which is ignored."""

    def __init__(
        self,
        backbone: str | nn.Module,
        subfolder: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool | list[str] = False,
        attention: str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in PRECISIONS:
            raise ValueError(f"`dtype` must be one of {tuple(PRECISIONS)}, got {dtype!r}.")
        precision = PRECISIONS[dtype]
        self.is_pretrained = isinstance(backbone, str) and not is_untrained(backbone)[0]
        if isinstance(backbone, str):
            backbone = load_model(
                backbone, subfolder, precision or torch.float32, "backbone", unnamed=self.family.__name__
            ).train()
        elif subfolder is not None:
            raise ValueError("`subfolder` says where to load a backbone from, but `backbone` is a module itself.")
        if not isinstance(backbone, self.family):
            raise ValueError(
                f"{type(self).__name__} calls a {self.family.__name__}, got a {type(backbone).__name__}. Choose the "
                "denoiser of its kind (lpl_lightning.*Denoiser), or write one: see lpl_lightning.Denoiser."
            )
        # nn.Module's own `to`: that of diffusers' models warns of float32 parts even where there are none.
        self.backbone = backbone if precision is None else nn.Module.to(backbone, precision)
        if gradient_checkpointing and not hasattr(self.backbone, "enable_gradient_checkpointing"):
            raise ValueError(
                f"`gradient_checkpointing`: {type(backbone).__name__} has no method enable_gradient_checkpointing. "
                "Give it one, or leave the argument out."
            )
        if gradient_checkpointing:
            self.backbone.enable_gradient_checkpointing()
        if attention is not None:
            _choose_attention(self.backbone, attention)
        for block in _regions(self.backbone, compile):
            block.compile()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the backbone's weights."""
        return cast(torch.dtype, next(self.backbone.parameters()).dtype)

    def config_value(self, name: str) -> Any:
        """What the config of the backbone says under a name; None where it says nothing, or there is no config."""
        return getattr(getattr(self.backbone, "config", None), name, None)

    @property
    def latent_channels(self) -> int | None:
        """Channels of the latents that the backbone takes, where it says so."""
        return cast("int | None", self.config_value("in_channels"))

    @property
    def patch(self) -> int:
        """What the side of the latents must be a multiple of."""
        size = self.config_value("patch_size") or 1
        return int(size[-1] if isinstance(size, list | tuple) else size)  # one for each axis, the width last

    @property
    def needs(self) -> ConditionShape:
        """What the backbone is conditioned on; unless a subclass says so, nothing that could be checked."""
        return ConditionShape()

    @abstractmethod
    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict.

        Args:
            z_t: Noisy latents (B, C, h, w).
            t: Times (B,) as the noise process has them: from 0 (clean) to 1000 (noise) for ``DDPM`` and
                ``FlowMatching``, and a quarter of the logarithm of the noise level for ``EDM``.
            condition: What the backbone is conditioned on.

        Returns:
            (B, C, h, w).
        """

    def cast(self, z_t: Tensor, condition: Condition) -> tuple[Tensor, Condition]:
        """Latents, tokens and pooled vectors in the precision of the backbone's weights."""
        tokens, pooled = (None if x is None else x.to(self.dtype) for x in (condition.tokens, condition.pooled))
        return z_t.to(self.dtype), replace(condition, tokens=tokens, pooled=pooled)

    def check(self, latent_channels: int, latent_size: int | None, conditioner: Conditioner) -> None:
        """Refuse latents or conditions that do not fit, before the first step.

        Args:
            latent_channels: Channels C of the latents.
            latent_size: Side of the latents, where it is known.
            conditioner: What will make the conditions.

        Raises:
            ValueError: They do not fit.
        """
        wanted = self.latent_channels or latent_channels
        if wanted != latent_channels:
            raise ValueError(
                f"The denoiser takes latents of {wanted} channels, the autoencoder makes {latent_channels}. Set "
                f"`in_channels` and `out_channels` of the backbone to fit {latent_channels}, or choose an autoencoder "
                f"of {wanted} latent channels."
            )
        given = self.config_value("in_channels") or latent_channels
        predicted = self.config_value("out_channels") or given
        packed = given != latent_channels and predicted == latent_channels  # tokens of several latents, as Qwen-Image's
        if predicted != given and not packed and not (self.predicts_variance and predicted == 2 * given):
            raise ValueError(
                f"The denoiser predicts {predicted} channels for latents of {given}: set the backbone's "
                f"`out_channels` to {given}."
            )
        if latent_size is not None and latent_size % self.patch:
            raise ValueError(
                f"The latents are {latent_size} wide, no multiple of {self.patch} (the backbone's `patch_size`, or "
                "what its levels halve them to). Choose another `image_size` or patch size."
            )
        self._check_condition(conditioner)

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Refuse latents of many sizes, before the first step.

        Args:
            sizes: Their heights and widths, multiples of ``patch``.

        Raises:
            ValueError: The backbone cannot take one of them.
        """
        for height, width in sizes:
            if height != width and not self.takes_rectangles:
                raise ValueError(
                    f"A {type(self.backbone).__name__} takes square latents alone, but the data's `buckets` make "
                    f"some of {height} x {width}. Leave `buckets` of the data out, or choose another backbone."
                )

    def _check_condition(self, conditioner: Conditioner) -> None:
        needs, gives = self.needs, conditioner.gives
        name, made_by = type(self).__name__, type(conditioner).__name__
        if needs.num_classes is not None:
            if gives.num_classes is None:
                raise ValueError(f"A {name} must be conditioned by ClassLabels, got {made_by}.")
            if gives.num_classes != needs.num_classes:
                raise ValueError(
                    f"`num_classes`={gives.num_classes} of the conditioner does not fit the backbone of the {name}, "
                    f"which has {needs.num_classes}. Make them equal."
                )
        elif needs.token_dim is not None and gives.token_dim is None:
            raise ValueError(f"A {name} attends to tokens: condition it by ClassTokens or Captions, not {made_by}.")
        for argument, wanted, given in (
            ("token_dim", needs.token_dim, gives.token_dim),
            ("pooled_dim", needs.pooled_dim, gives.pooled_dim),
        ):
            if wanted is not None and given != wanted:
                hint = "" if isinstance(conditioner, ClassTokens) else " Is a text encoder missing, or another's size?"
                raise ValueError(
                    f"`{argument}`={given} of the conditioner ({made_by}) must be {wanted}, as the backbone of the "
                    f"{name} has it.{hint}"
                )
        if isinstance(conditioner, ClassTokens) and gives.pooled_dim and needs.token_dim and not needs.pooled_dim:
            raise ValueError(f"The backbone of the {name} takes no pooled vector: leave `pooled_dim` out.")
        if needs.time_ids and not gives.time_ids:
            raise ValueError(
                f"The backbone of the {name} is conditioned on sizes: set `size_conditions: true` of "
                f"lpl_lightning.Captions, got {made_by} without."
            )


def check_image_sizes(sizes: Sequence[tuple[int, int]], autoencoder: Autoencoder, denoiser: Denoiser) -> None:
    """Refuse images of many sizes, such as those of aspect-ratio buckets, where one does not fit.

    Args:
        sizes: Their heights and widths; fewer than two are not looked at.
        autoencoder: What encodes them.
        denoiser: What takes their latents.

    Raises:
        ValueError: One of them cannot encode or take one of the sizes.
    """
    if len(sizes) < 2:
        return
    downscale, patch = autoencoder.downscale, denoiser.patch
    if autoencoder.image_size is not None:
        raise ValueError(
            f"The autoencoder takes images of {autoencoder.image_size} x {autoencoder.image_size} alone: "
            "leave `buckets` of the data out."
        )
    why = f"the autoencoder downscales by {downscale}, and sides of latents must be multiples of {patch}"
    check_sizes(sizes, downscale * patch, why)
    denoiser.check_sizes([(height // downscale, width // downscale) for height, width in sizes])


def _regions(backbone: nn.Module, asked: bool | list[str]) -> Iterator[nn.Module]:
    """The blocks to compile: by the names given, or those that the class says are repeated; outermost ones alone."""
    if asked is False:
        return
    known = getattr(backbone, "_repeated_blocks", None) or getattr(backbone, "_no_split_modules", None)
    names: Sequence[str] = asked if isinstance(asked, list) else known or ("BasicTransformerBlock",)
    found = list(outermost(backbone, names))
    yield from found
    if not found:
        raise ValueError(
            f"`compile`: {type(backbone).__name__} has no blocks of the classes {list(names)}. Give `compile` a list "
            "of the class names of its repeated blocks."
        )


def outermost(module: nn.Module, names: Collection[str]) -> Iterator[nn.Module]:
    """Parts of a module whose class has one of these names, and which lie in no other such part."""
    found: list[str] = []
    for name, part in module.named_modules():
        if type(part).__name__ in names and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            yield part


def _choose_attention(backbone: nn.Module, name: str) -> None:
    """Set the attention back end of a diffusers model.

    Newer models dispatch by name. In others attention is PyTorch's own function, whose kernel can be chosen.
    """
    owners = [module for module in backbone.modules() if hasattr(module, "processor")]
    if any(hasattr(owner.processor, "_attention_backend") for owner in owners):
        cast(Any, backbone).set_attention_backend(name)
    elif name == "xformers":
        if any(isinstance(owner.processor, SanaLinearAttnProcessor2_0) for owner in owners):
            raise ValueError(
                f"`attention`='xformers' would put another attention in the place of the linear one of a "
                f"{type(backbone).__name__}. Leave it out to have the fastest that PyTorch finds."
            )
        cast(Any, backbone).enable_xformers_memory_efficient_attention()
    elif owners and name in _KERNELS:
        for owner in owners:
            owner.processor = _with_kernel(cast(Any, owner.processor), _KERNELS[name])
    elif not owners or name != "native":
        raise ValueError(
            f"`attention`={name!r}: {type(backbone).__name__} calls PyTorch's attention itself, for which "
            f"{['native', *_KERNELS, 'xformers']} can be chosen. Leave it out to have the fastest that PyTorch finds."
        )


def _with_kernel(processor: Any, kernel: SDPBackend) -> Any:
    """The processor with PyTorch's attention bound to one kernel, also where checkpointing runs it once more."""
    kind = type(processor)
    plain: Callable[..., Any] = kind.__call__

    @functools.wraps(plain)  # callers look at the signature
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(kernel):
            return plain(self, *args, **kwargs)

    processor.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return processor
