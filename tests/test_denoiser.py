from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_dit, tiny_sd3
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from lpl_lightning import ClassLabels, ClassTokens, Denoiser
from lpl_lightning.conditioning import Condition


def test_sd3_passes_all_on_to_the_backbone() -> None:
    denoiser = tiny_sd3()
    z, t = torch.randn(3, 4, 4, 4), torch.tensor([0.0, 500.0, 999.0])
    tokens, pooled = torch.randn(3, 2, 8), torch.randn(3, 8)
    expected = denoiser.backbone(
        hidden_states=z, timestep=t, encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False
    )[0]
    torch.testing.assert_close(denoiser(z, t, Condition(tokens=tokens, pooled=pooled)), expected)


def test_dit_gives_the_mean_and_ignores_the_variance() -> None:
    denoiser = tiny_dit().eval()
    z, t, labels = torch.randn(3, 4, 4, 4), torch.tensor([0.0, 500.0, 999.0]), torch.tensor([0, 2, 3])
    expected = denoiser.backbone(z, timestep=t, class_labels=labels).sample
    out = denoiser(z, t, Condition(class_labels=labels))
    assert expected.shape[1] == 8
    torch.testing.assert_close(out, expected[:, :4])


def test_dit_drops_no_labels_on_its_own() -> None:
    """In training mode too, the same input gives the same output: the conditioner alone drops labels."""
    denoiser = tiny_dit().train()
    z, t = torch.randn(64, 4, 4, 4), torch.full((64,), 500.0)
    condition = Condition(class_labels=torch.zeros(64, dtype=torch.long))
    torch.testing.assert_close(denoiser(z, t, condition), denoiser(z, t, condition))


def test_a_backbone_of_ones_own_is_a_few_lines() -> None:
    class Mine(Denoiser):
        def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            scale: Tensor = self.backbone(t[:, None] / 1000)
            return z_t * scale[:, :, None, None]

    class Net(nn.Linear):
        config: Any = nn.Module()

    mine = Mine(Net(1, 4))
    mine.check(4, 8, ClassLabels(3))
    assert mine(torch.randn(2, 4, 8, 8), torch.rand(2), Condition()).shape == (2, 4, 8, 8)
    mine.backbone.config = SimpleNamespace(patch_size=(1, 2, 2))  # as diffusers' backbones of video say it
    with pytest.raises(ValueError, match="latents are 7 wide, no multiple of 2"):
        mine.check(4, 7, ClassLabels(3))


def test_a_backbone_of_packed_latents_may_say_its_output_unpacked() -> None:
    """As Qwen-Image's: tokens of four latents go in, and its ``out_channels`` are one latent's."""

    class Packed(Denoiser):
        @property
        def latent_channels(self) -> int:
            return int(self.config_value("in_channels")) // 4

        def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return z_t

    class Net(nn.Linear):
        config = SimpleNamespace(in_channels=64, out_channels=16)

    packed = Packed(Net(1, 1))
    packed.check(16, 8, ClassLabels(3))
    with pytest.raises(ValueError, match="takes latents of 16 channels, the autoencoder makes 4"):
        packed.check(4, 8, ClassLabels(3))
    packed.backbone.config = SimpleNamespace(in_channels=64, out_channels=8)
    with pytest.raises(ValueError, match="predicts 8 channels for latents of 64"):
        packed.check(16, 8, ClassLabels(3))


def test_sd3_without_stored_positions_takes_any_size() -> None:
    """diffusers then makes them for the size at hand."""
    sd3 = tiny_sd3(pos_embed_max_size=None)
    sd3.check(4, 32, ClassTokens(3, 8, 8))
    condition = Condition(tokens=torch.randn(1, 2, 8), pooled=torch.randn(1, 8))
    assert sd3(torch.randn(1, 4, 32, 32), torch.tensor([500.0]), condition).shape == (1, 4, 32, 32)


def test_what_does_not_fit_is_refused() -> None:
    sd3, tokens = tiny_sd3(), ClassTokens(3, 8, 8)
    sd3.check(4, 4, tokens)
    cases = [
        (sd3, 16, 4, tokens, "takes latents of 4 channels, the autoencoder makes 16"),
        (sd3, 4, 5, tokens, "latents are 5 wide, no multiple of 2"),
        (sd3, 4, 32, tokens, "set `pos_embed_max_size` to 16 or more"),
        (sd3, 4, 4, ClassTokens(3, 6, 8), "`token_dim`=6 of the conditioner .ClassTokens. must be 8"),
        (sd3, 4, 4, ClassTokens(3, 8, 6), "`pooled_dim`=6 of the conditioner .ClassTokens. must be 8"),
        (sd3, 4, 4, ClassLabels(3), "condition it by ClassTokens"),
        (tiny_dit(), 4, 4, ClassLabels(5), r"`num_classes`=5 .* has 3"),
        (tiny_dit(), 4, 4, tokens, "must be conditioned by ClassLabels, got ClassTokens"),
        (tiny_sd3(out_channels=8), 4, 4, tokens, "predicts 8 channels"),
        (tiny_dit(out_channels=3), 4, 4, ClassLabels(3), "predicts 3 channels"),
    ]
    for denoiser, channels, size, conditioner, message in cases:
        with pytest.raises(ValueError, match=message):
            denoiser.check(channels, size, conditioner)
    with pytest.raises(ValueError, match=r"`caption_projection_dim`=1152 must equal .* = 16"):
        type(sd3)(SD3Transformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8))
