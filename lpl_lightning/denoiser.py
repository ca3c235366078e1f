"""One call over diffusers' backbones: ``(z_t, t, condition) -> prediction``.

A denoiser knows nothing of noise processes. For a backbone that is not here, subclass ``Denoiser`` and say in
``forward`` how it is called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from lpl_lightning.conditioning import ClassLabels, ClassTokens, Condition, Conditioner

__all__ = ["Denoiser", "DiTDenoiser", "SD3Denoiser"]


class Denoiser(nn.Module, ABC):
    """Base of denoisers.

    Args:
        backbone: The network, with the attributes of a diffusers model (``config``).
    """

    backbone: Any
    predicts_variance: ClassVar[bool] = False
    """Whether the backbone may predict twice the latents' channels, the second half of which is ignored."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the backbone's weights."""
        return cast(torch.dtype, next(self.backbone.parameters()).dtype)

    @abstractmethod
    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict.

        Args:
            z_t: Noisy latents (B, C, h, w).
            t: Times (B,) from 0 (clean) to 1000 (noise).
            condition: What the backbone is conditioned on.

        Returns:
            (B, C, h, w).
        """

    def check(self, latent_channels: int, latent_size: int | None, conditioner: Conditioner) -> None:
        """Refuse latents or conditions that do not fit, before the first step.

        Args:
            latent_channels: Channels C of the latents.
            latent_size: Side of the latents, where it is known.
            conditioner: What will make the conditions.

        Raises:
            ValueError: They do not fit.
        """
        config = self.backbone.config
        wanted = getattr(config, "in_channels", latent_channels)
        if wanted != latent_channels:
            raise ValueError(
                f"The denoiser takes latents of {wanted} channels, the autoencoder makes {latent_channels}. Set "
                f"`in_channels` and `out_channels` of the backbone to {latent_channels}, or choose an autoencoder "
                f"of {wanted} latent channels."
            )
        predicted = getattr(config, "out_channels", None) or wanted
        if predicted != latent_channels and not (self.predicts_variance and predicted == 2 * latent_channels):
            raise ValueError(
                f"The denoiser predicts {predicted} channels for latents of {latent_channels}: set the backbone's "
                f"`out_channels` to {latent_channels}."
            )
        patch = getattr(config, "patch_size", None) or 1
        if latent_size is not None and latent_size % patch:
            raise ValueError(
                f"The latents are {latent_size} wide, which the backbone's `patch_size`={patch} does not divide. "
                "Choose another `image_size` or patch size."
            )


class DiTDenoiser(Denoiser):
    """Diffusion transformer with class labels (Peebles & Xie, 2023).

    Args:
        backbone: A ``DiTTransformer2DModel``. Its own label dropout, which drops a label in some blocks and keeps it
            in others, is turned off; the conditioner's takes its place. Where it predicts a variance as well
            (twice the channels), that half is ignored.
    """

    predicts_variance = True

    def __init__(self, backbone: DiTTransformer2DModel) -> None:
        super().__init__(backbone)
        for module in backbone.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict; see the base class."""
        out = self.backbone(z_t.to(self.dtype), timestep=t, class_labels=condition.class_labels).sample
        return cast(Tensor, out[:, : z_t.shape[1]])

    def check(self, latent_channels: int, latent_size: int | None, conditioner: Conditioner) -> None:
        """Refuse latents, conditions or a number of classes that do not fit."""
        super().check(latent_channels, latent_size, conditioner)
        known = self.backbone.config.num_embeds_ada_norm
        if not isinstance(conditioner, ClassLabels):
            raise ValueError(f"A DiTDenoiser is conditioned by ClassLabels, got {type(conditioner).__name__}.")
        if known != conditioner.num_classes:
            raise ValueError(
                f"`num_classes`={conditioner.num_classes} of the conditioner does not fit the DiT, whose "
                f"`num_embeds_ada_norm` is {known}. Make them equal."
            )


class SD3Denoiser(Denoiser):
    """The multi-modal diffusion transformer of Stable Diffusion 3 (MMDiT; Esser et al., 2024).

    Args:
        backbone: An ``SD3Transformer2DModel``.
    """

    def __init__(self, backbone: SD3Transformer2DModel) -> None:
        super().__init__(backbone)
        config = backbone.config
        width = config.num_attention_heads * config.attention_head_dim
        if config.caption_projection_dim != width:
            raise ValueError(
                f"`caption_projection_dim`={config.caption_projection_dim} must equal num_attention_heads x "
                f"attention_head_dim = {width}."
            )

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict; see the base class."""
        out = self.backbone(
            z_t.to(self.dtype), encoder_hidden_states=condition.tokens, pooled_projections=condition.pooled, timestep=t
        ).sample
        return cast(Tensor, out)

    def check(self, latent_channels: int, latent_size: int | None, conditioner: Conditioner) -> None:
        """Refuse latents or conditions that do not fit."""
        super().check(latent_channels, latent_size, conditioner)
        config = self.backbone.config
        largest = config.pos_embed_max_size * config.patch_size
        if latent_size is not None and latent_size > largest:
            raise ValueError(
                f"The latents are {latent_size} wide, the backbone's positions reach {largest}: set "
                f"`pos_embed_max_size` to {latent_size // config.patch_size} or more."
            )
        if isinstance(conditioner, ClassLabels):
            raise ValueError("An SD3Denoiser attends to tokens: condition it by ClassTokens, not ClassLabels.")
        if isinstance(conditioner, ClassTokens):
            for name, given, wanted in (
                ("token_dim", conditioner.token_dim, config.joint_attention_dim),
                ("pooled_dim", conditioner.pooled_dim, config.pooled_projection_dim),
            ):
                if given != wanted:
                    raise ValueError(f"`{name}`={given} of the conditioner must be {wanted}, as the backbone has it.")
