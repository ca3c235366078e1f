"""Denoisers over the backbones of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from lpl_lightning.conditioning import Condition, Conditioner, ConditionShape
from lpl_lightning.denoiser import Denoiser

__all__ = ["DiTDenoiser", "FluxDenoiser", "PixArtDenoiser", "SD3Denoiser", "SanaDenoiser", "UNetDenoiser"]


class DiTDenoiser(Denoiser):
    """Diffusion transformer with class labels (Peebles & Xie, 2023).

    The backbone's own label dropout, which drops a label in some blocks and keeps it in others, is turned off; the
    conditioner's takes its place. Where the backbone predicts a variance as well (twice the channels), that half is
    ignored. Latents larger than its ``sample_size`` have positions between those of that size, so a model trained at
    256 px is post-trained at 512 px with the ``sample_size`` it had.

    Args:
        backbone: A ``DiTTransformer2DModel``, or where to load one.
        options: As for ``Denoiser``.
    """

    family = DiTTransformer2DModel
    takes_rectangles = False  # diffusers' makes a square of its patches, however they lay
    predicts_variance = True

    def __init__(self, backbone: str | nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        for module in self.backbone.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    @property
    def needs(self) -> ConditionShape:
        """Labels."""
        return ConditionShape(num_classes=self.backbone.config.num_embeds_ada_norm)

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict; see the base class."""
        out = self.backbone(z_t.to(self.dtype), timestep=t, class_labels=condition.class_labels).sample
        return cast(Tensor, out[:, : z_t.shape[1]])


class SD3Denoiser(Denoiser):
    """The multi-modal diffusion transformer of Stable Diffusion 3 (MMDiT; Esser et al., 2024).

    Args:
        backbone: An ``SD3Transformer2DModel``, or where to load one.
        options: As for ``Denoiser``.
    """

    family = SD3Transformer2DModel

    def __init__(self, backbone: str | nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        config = self.backbone.config
        width = config.num_attention_heads * config.attention_head_dim
        if config.caption_projection_dim != width:
            raise ValueError(
                f"`caption_projection_dim`={config.caption_projection_dim} must equal num_attention_heads x "
                f"attention_head_dim = {width}."
            )

    @property
    def needs(self) -> ConditionShape:
        """Tokens and a pooled vector."""
        config = self.backbone.config
        return ConditionShape(token_dim=config.joint_attention_dim, pooled_dim=config.pooled_projection_dim)

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict; see the base class."""
        z_t, condition = self.cast(z_t, condition)
        out = self.backbone(
            z_t, encoder_hidden_states=condition.tokens, pooled_projections=condition.pooled, timestep=t
        ).sample
        return cast(Tensor, out)

    def check(self, latent_channels: int, latent_size: int | None, conditioner: Conditioner) -> None:
        """Refuse latents or conditions that do not fit."""
        super().check(latent_channels, latent_size, conditioner)
        if latent_size is not None:
            self._check_reach(latent_size)

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Refuse latents that are longer than positions reach."""
        super().check_sizes(sizes)
        self._check_reach(max(map(max, sizes)))

    def _check_reach(self, side: int) -> None:
        config = self.backbone.config
        if config.pos_embed_max_size is None:  # positions are made for each size
            return
        largest = config.pos_embed_max_size * config.patch_size
        if side > largest:
            raise ValueError(
                f"The latents are {side} wide, the backbone's positions reach {largest}: set "
                f"`pos_embed_max_size` to {side // config.patch_size} or more."
            )


class PixArtDenoiser(Denoiser):
    """PixArt-alpha and PixArt-Sigma (Chen et al., 2024): DiT blocks with cross-attention to text.

    The half of the output that predicts a variance is ignored. Where the backbone is conditioned on resolution and
    aspect ratio (those for 1024 px), it gets the size in pixels for an autoencoder that downscales by 8, as its own.

    Args:
        backbone: A ``PixArtTransformer2DModel``, or where to load one.
        options: As for ``Denoiser``.
    """

    family = PixArtTransformer2DModel
    predicts_variance = True

    @property
    def needs(self) -> ConditionShape:
        """Tokens."""
        config = self.backbone.config
        return ConditionShape(token_dim=config.caption_channels or config.cross_attention_dim)

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict; see the base class."""
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.backbone.use_additional_conditions:
            side = torch.tensor(z_t.shape[-2:], dtype=torch.float32).mul(8).to(z_t.device, non_blocking=True)
            sizes = {
                "resolution": side.expand(len(z_t), 2),
                "aspect_ratio": (side[0] / side[1]).expand(len(z_t), 1),
            }
        z_t, condition = self.cast(z_t, condition)
        out = self.backbone(
            z_t,
            encoder_hidden_states=condition.tokens,
            encoder_attention_mask=condition.mask,
            timestep=t,
            added_cond_kwargs=sizes,
        ).sample
        return cast(Tensor, out[:, : z_t.shape[1]])


class SanaDenoiser(Denoiser):
    """Sana (Xie et al., 2025): linear attention over strongly compressed latents.

    Args:
        backbone: A ``SanaTransformer2DModel``, or where to load one.
        options: As for ``Denoiser``.
    """

    family = SanaTransformer2DModel

    def __init__(self, backbone: str | nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        if self.backbone.config.guidance_embeds:
            raise ValueError(
                "A distilled Sana (`guidance_embeds`) has no loss that this package trains: take its base."
            )

    @property
    def needs(self) -> ConditionShape:
        """Tokens."""
        return ConditionShape(token_dim=self.backbone.config.caption_channels)

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict; see the base class."""
        z_t, condition = self.cast(z_t, condition)
        out = self.backbone(
            z_t,
            encoder_hidden_states=condition.tokens,
            encoder_attention_mask=condition.mask,
            timestep=t * self.backbone.config.timestep_scale,
        ).sample
        return cast(Tensor, out)


class UNetDenoiser(Denoiser):
    """The UNet of Stable Diffusion 1.5, 2 and XL (Rombach et al., 2022; Podell et al., 2024).

    Args:
        backbone: A ``UNet2DConditionModel``, or where to load one: with text alone, or as SDXL with pooled
            text and sizes too.
        options: As for ``Denoiser``.
    """

    family = UNet2DConditionModel

    def __init__(self, backbone: str | nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        config = self.backbone.config
        others = {
            "addition_embed_type": (None, "text_time"),
            "class_embed_type": (None,),
            "num_class_embeds": (None,),
            "encoder_hid_dim_type": (None,),
            "time_cond_proj_dim": (None,),
        }
        for key, known in others.items():
            if config.get(key) not in known:
                raise ValueError(
                    f"The UNet has {key}={config[key]!r}, known are {known}: for any other write your own Denoiser."
                )

    @property
    def patch(self) -> int:
        """Each level but the last halves the latents."""
        return int(2 ** (len(self.backbone.config.down_block_types) - 1))

    @property
    def needs(self) -> ConditionShape:
        """Tokens; for SDXL a pooled vector and sizes too."""
        config = self.backbone.config
        width = config.cross_attention_dim
        token_dim = int(width if isinstance(width, int) else max(width))
        if config.addition_embed_type is None:
            return ConditionShape(token_dim=token_dim)
        pooled_dim = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return ConditionShape(token_dim=token_dim, pooled_dim=pooled_dim, time_ids=True)

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict; see the base class."""
        z_t, condition = self.cast(z_t, condition)
        added = None
        if self.backbone.config.addition_embed_type == "text_time":
            added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
        out = self.backbone(
            z_t,
            t,
            encoder_hidden_states=condition.tokens,
            encoder_attention_mask=condition.mask,
            added_cond_kwargs=added,
        ).sample
        return cast(Tensor, out)


class FluxDenoiser(Denoiser):
    """FLUX.1: two kinds of transformer blocks over patches of 2 x 2 latents, with rotary positions.

    Args:
        backbone: A ``FluxTransformer2DModel``, or where to load one. Its ``in_channels`` are four times the latents'.
        guidance: Guidance scale that a guidance-distilled backbone (dev) is given, in training and sampling.
        options: As for ``Denoiser``.
    """

    family = FluxTransformer2DModel

    def __init__(self, backbone: str | nn.Module, guidance: float = 3.5, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.guidance = guidance
        config = self.backbone.config
        if config.out_channels not in (None, config.in_channels):
            raise ValueError(
                f"`out_channels`={config.out_channels} must equal in_channels = {config.in_channels}, since tokens "
                "hold four latents each. Leave it out."
            )
        if sum(config.axes_dims_rope) != config.attention_head_dim:
            raise ValueError(
                f"`axes_dims_rope`={list(config.axes_dims_rope)} must add up to attention_head_dim = "
                f"{config.attention_head_dim}."
            )

    @property
    def latent_channels(self) -> int:
        """A token holds the channels of four latents."""
        return int(self.backbone.config.in_channels) // 4

    @property
    def patch(self) -> int:
        """Tokens are patches of 2 x 2 latents."""
        return 2

    @property
    def needs(self) -> ConditionShape:
        """Tokens and a pooled vector."""
        config = self.backbone.config
        return ConditionShape(token_dim=config.joint_attention_dim, pooled_dim=config.pooled_projection_dim)

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict; see the base class."""
        z_t, condition = self.cast(z_t, condition)
        size, rows, columns = len(z_t), z_t.shape[2] // 2, z_t.shape[3] // 2
        # (B, C, rows, 2, columns, 2) -> (B, rows * columns, C * 4)
        patches = z_t.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 2, 4, 1, 3, 5)
        positions = torch.zeros(rows, columns, 3, device=z_t.device, dtype=z_t.dtype)
        positions[..., 1] += torch.arange(rows, device=z_t.device)[:, None]
        positions[..., 2] += torch.arange(columns, device=z_t.device)[None]
        tokens = cast(Tensor, condition.tokens)
        scale = torch.full((size,), self.guidance, device=z_t.device) if self.backbone.config.guidance_embeds else None
        out = self.backbone(
            patches.reshape(size, rows * columns, -1),
            encoder_hidden_states=tokens,
            pooled_projections=condition.pooled,
            timestep=t / 1000,
            img_ids=positions.flatten(0, 1),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=z_t.device, dtype=z_t.dtype),
            guidance=scale,
        ).sample
        image = cast(Tensor, out).unflatten(1, (rows, columns)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        return cast(Tensor, image.reshape(size, -1, 2 * rows, 2 * columns))
