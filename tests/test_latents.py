from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_kl
from diffusers import AutoencoderKLLTXVideo, AutoencoderKLMochi
from families import FAMILIES, scrambled, tiny_flux2
from torch import nn

from lpl_lightning import Autoencoder
from lpl_lightning.latents import LatentSpace, latent_space
from lpl_lightning.posterior import drawn

LTX: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "spatio_temporal_scaling": (True, False),
    "decoder_spatio_temporal_scaling": (True, False),
    "decoder_inject_noise": (False, False, False),
    "upsample_residual": (False, False),
    "upsample_factor": (1, 1),
    "patch_size": 2,
    "down_block_types": ("LTXVideoDownBlock3D",) * 2,
}


@pytest.mark.parametrize(
    ("name", "channels", "downscale", "rank"),
    [
        ("sdxl", 4, 4, 4),
        ("asymmetric", 4, 4, 4),
        ("flux2", 16, 4, 4),
        ("vq", 3, 2, 4),
        ("tiny", 4, 8, 4),
        ("dc", 4, 4, 4),
        ("rae", 64, 2, 4),
        ("wan", 3, 8, 5),
        ("wan22", 3, 16, 5),
        ("qwen", 3, 4, 5),
    ],
)
def test_each_family_says_what_its_latents_are(name: str, channels: int, downscale: int, rank: int) -> None:
    space = latent_space(FAMILIES[name].make())
    assert (space.channels, space.downscale, space.rank, space.image_channels) == (channels, downscale, rank, 3)


def test_flux2_latents_are_normalized() -> None:
    """Latents with bn's running statistics come out with mean 0 and deviation 1."""
    model = scrambled(tiny_flux2())
    space = latent_space(model)
    patches = model.bn.running_mean.view(1, -1, 1, 1) + model.bn.running_var.sqrt().view(1, -1, 1, 1) * torch.randn(
        4000, 16, 2, 2
    )
    model.bn.eval()
    scaled = (patches - torch.tensor(space.shift).view(1, -1, 1, 1)) * torch.tensor(space.scale).view(1, -1, 1, 1)
    torch.testing.assert_close(scaled, model.bn(patches), atol=1e-4, rtol=1e-4)
    z = torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(space.unpack(space.pack(z)), z)
    row, column = 1, 0
    packed = space.pack(z)
    assert torch.equal(packed[:, 4 * 3 + 2 * row + column], z[:, 3, row::2, column::2])


def test_statistics_in_buffers_and_other_configs_are_read() -> None:
    """Models of no known family: LTX keeps its statistics in buffers, Mochi in its config."""
    ltx = AutoencoderKLLTXVideo(**LTX)
    ltx.latents_mean.normal_()
    ltx.latents_std.uniform_(0.5, 2)
    space = latent_space(ltx)
    assert space.shift == tuple(ltx.latents_mean.double().tolist())
    assert space.scale == tuple(1 / value for value in ltx.latents_std.double().tolist())
    assert (space.channels, space.downscale) == (4, ltx.spatial_compression_ratio)
    mochi = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1,) * 5,
    )
    assert latent_space(mochi).shift == tuple(mochi.config.latents_mean)
    assert latent_space(mochi).scale == tuple(1 / value for value in mochi.config.latents_std)


@pytest.mark.parametrize(
    ("statistics", "said"),
    [
        (
            {"latents_mean": [0.0, 0.0], "latents_std": [1.0] * 4},
            "`shift_factor` must be .* each of the 4 channels .* got 2, of the model's config",
        ),
        (
            {"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]},
            "`scaling_factor` must be finite and not 0, got .*inf.*, of the model's config",
        ),
    ],
)
def test_statistics_that_do_not_fit_the_channels_are_refused(statistics: dict[str, list[float]], said: str) -> None:
    model: Any = tiny_kl()
    model.register_to_config(**statistics)
    with pytest.raises(ValueError, match=said):
        Autoencoder(model)
    assert Autoencoder(model, scaling_factor=2.0, shift_factor=0.0).space.scale == (2.0,)


def test_pixels_of_whole_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`images` must be floating-point in \[-1, 1\], got torch.uint8"):
        LatentSpace().check_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_a_module_without_a_config_is_taken_as_it_is() -> None:
    space = latent_space(nn.Linear(1, 1))
    assert space == LatentSpace()
    odd = nn.Linear(1, 1)
    odd.config = SimpleNamespace(scaling_factor=3.0)  # type: ignore[assignment]
    assert latent_space(odd) == LatentSpace()


def test_what_an_encoder_gives_is_understood() -> None:
    z, deviation = torch.randn(2, 3), torch.rand(2, 3)
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    posterior = SimpleNamespace(sample=lambda generator: z + 1, mode=lambda: z)
    cases: list[tuple[Any, bool, torch.Tensor]] = [
        (z, True, z),
        (SimpleNamespace(latents=z), True, z),
        (SimpleNamespace(latent=z), True, z),
        (SimpleNamespace(latent_dist=posterior), False, z),
        (SimpleNamespace(latent_dist=posterior), True, z + 1),
        ((z, deviation), False, z),
        ((z, deviation), True, z + deviation * noise),
    ]
    for encoded, sample, expected in cases:
        torch.testing.assert_close(drawn(encoded, sample, torch.Generator().manual_seed(5)), expected)


@pytest.mark.parametrize("make", [lambda z: (z, z, z), lambda z: {"z": z}, lambda z: (z, 1.0), lambda z: None])
def test_what_is_no_latent_is_refused(make: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"`model.encode` must give a tensor, a pair .* got (tuple|dict|NoneType)"):
        drawn(make(torch.zeros(1)), True)
