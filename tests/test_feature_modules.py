from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compvis import CompVisKL, frozen_as_they_do
from conftest import tiny_kl
from diffusers import AutoencoderKLLTXVideo, ConsistencyDecoderVAE
from families import scrambled, tiny_rae
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from lpl_lightning import Autoencoder, LatentPerceptualLoss


def hooked(model: nn.Module, names: Sequence[str], run: Any) -> tuple[list[Any], Any]:
    """Outputs of the named modules, and of the run, by hooks of our own."""
    seen: list[Any] = []
    handles = [model.get_submodule(n).register_forward_hook(lambda _m, _i, out: seen.append(out)) for n in names]
    result = run()
    for handle in handles:
        handle.remove()
    return seen, result


def hooks_left(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_a_video_of_diffusers() -> None:
    """Frames count for nothing in the threshold, whichever model's they are; a volume's depth does."""
    model = scrambled(
        AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        )
    )
    names = ["decoder.mid_block", "decoder.up_blocks.0"]
    autoencoder = Autoencoder(model, feature_modules=names, sample_posterior=False)
    assert autoencoder.is_video
    z = autoencoder.encode(torch.rand(1, 3, 9, 64, 64) * 2 - 1)
    assert z.shape == (1, 8, 2, 2, 2)
    with pytest.raises(ValueError, match="H and W divisible by 32|sides divisible by 32"):
        autoencoder.encode(torch.zeros(1, 3, 9, 60, 64))
    lpl = LatentPerceptualLoss(autoencoder)
    assert [lpl.tau(torch.zeros(1, 8, frames, 32, 32)) for frames in (1, 4, 32)] == [3.0] * 3
    assert lpl(z + 0.1, z).shape == (1,)
    volume = Autoencoder(nn.Sequential(nn.Conv3d(8, 4, 1), nn.Conv3d(4, 3, 1)), feature_modules=["0"])
    assert not volume.is_video


def test_a_volume_of_monai() -> None:
    """AutoencoderKL of another library, three spatial dimensions, one channel, a posterior as (mean, deviation)."""
    nets = pytest.importorskip("monai.networks.nets")
    model = scrambled(
        nets.AutoencoderKL(
            spatial_dims=3,
            channels=(4, 8),
            latent_channels=3,
            num_res_blocks=1,
            norm_num_groups=4,
            attention_levels=(False, False),  # its attention takes einops
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )
    )
    names = ["decoder.blocks.0", "decoder.blocks.2", "decoder.blocks.4"]
    autoencoder = Autoencoder(model, feature_modules=names, downscale=2, scaling_factor=0.5, sample_posterior=False)
    z = torch.randn(2, 3, 2, 3, 4, requires_grad=True)
    seen, image = hooked(model, names, lambda: model.decode(z / 0.5))
    assert autoencoder.feature_names == tuple(names)
    assert autoencoder.stage_names == (*names, "image")
    for feature, expected in zip(autoencoder.features(z), seen, strict=True):
        torch.testing.assert_close(feature, expected)
        assert feature.ndim == 5
    torch.testing.assert_close(autoencoder.decode(z), image)
    autoencoder.features(z, 2)[-1].sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0

    volume = torch.rand(2, 1, 4, 6, 8)
    mean, deviation = model.encode(volume)
    torch.testing.assert_close(autoencoder.encode(volume), mean * 0.5)
    autoencoder.sample_posterior = True
    drawn = autoencoder.encode(volume, torch.Generator().manual_seed(3))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, (mean + deviation * noise) * 0.5)
    assert (autoencoder.latent_channels, autoencoder.downscale) == (3, 2)
    with pytest.raises(ValueError, match=r"sides divisible by 2.*got \(2, 1, 4, 6, 7\)"):
        autoencoder.encode(torch.rand(2, 1, 4, 6, 7))


def test_a_plain_decoder_is_called_itself() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Conv1d(4, 6, 1), nn.Conv1d(6, 1, 1))
    autoencoder = Autoencoder(model, feature_modules=["1", "2"])
    z = torch.randn(2, 2, 5)
    torch.testing.assert_close(autoencoder.decode(z), model(z))
    torch.testing.assert_close(autoencoder.features(z), [model[:2](z), model[:3](z)])
    both = autoencoder.features(z, ["image", "1"])
    torch.testing.assert_close(both, [model[:2](z), model(z)])
    with pytest.raises(ValueError, match="Give `downscale`, the side of an image"):
        _ = autoencoder.downscale
    with pytest.raises(ValueError, match=r"`latent_channels` is not known: Sequential"):
        _ = autoencoder.latent_channels
    with pytest.raises(ValueError, match="Sequential has none"):
        autoencoder.encode(torch.randn(2, 1, 5))


def test_maps_are_as_their_modules_gave_them_out() -> None:
    """However deep the decoder runs: an activation in place writes over the output before it."""
    model = nn.Sequential(*(part for _ in range(3) for part in (nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True))))
    autoencoder = Autoencoder(model, feature_modules=["0", "2"])
    z = torch.randn(2, 2, 3, 3)
    expected = [model[0](z), model[:3](z)]
    assert expected[0].min() < 0
    for wanted in (["0"], ["0", "2"], ["0", "2", "image"]):
        torch.testing.assert_close(autoencoder.features(z, wanted)[:2], expected[: len(wanted)])


def test_it_stops_after_the_deepest_module_and_leaves_no_hook() -> None:
    ran: list[int] = []
    model = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(4)))
    autoencoder = Autoencoder(model, feature_modules=["0", "1", "2"])
    for i, module in enumerate(model):
        module.register_forward_hook(lambda _m, _i, _o, i=i: ran.append(i))
    z = torch.randn(1, 2, 3, 3)
    autoencoder.features(z, ["1"])
    assert ran == [0, 1]
    autoencoder.features(z)
    assert ran == [0, 1, 0, 1, 2]
    assert hooks_left(model) == len(model)


class Decoder(nn.Module):
    """Tokens (B, N, C), a tuple, a module that runs twice and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, 4, 1)
        self.tokens = nn.Linear(4, 6)
        self.recurrent = nn.GRU(6, 5, batch_first=True)
        self.twice = nn.ReLU()
        self.never = nn.ReLU()
        self.strings = Strings()
        self.image = nn.Identity()
        self.out = nn.Conv2d(5, 3, 1)

    def decode(self, z: Tensor) -> Tensor:
        tokens = self.twice(self.tokens(self.embed(z).flatten(2).transpose(1, 2)))
        self.strings(z)
        hidden = self.twice(self.recurrent(tokens)[0]).transpose(1, 2).unflatten(2, z.shape[2:])
        image: Tensor = self.out(self.image(hidden))
        return image


class Strings(nn.Module):
    def forward(self, z: Tensor) -> str:
        return "no tensor"


def test_tokens_and_tuples_become_maps() -> None:
    model = Decoder()
    names = ["embed", "tokens", "recurrent"]
    z = torch.randn(2, 2, 3, 4)
    (embedded, tokens, recurrent), _ = hooked(model, names, lambda: model.decode(z))
    autoencoder = Autoencoder(model, feature_modules=names)
    features = autoencoder.features(z)
    torch.testing.assert_close(features, [embedded, tokens.transpose(1, 2), recurrent[0].transpose(1, 2)])
    assert [f.shape[1] for f in features] == [4, 6, 5]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"one or more names of modules, got \[\]"),
        ("embed", r"must be a list .*, got 'embed'"),
        (["embed", "embed"], r"each module once, got \['embed'\]"),
        (["tokns"], r"names 'tokns', which Decoder does not have. Names near it: \['tokens'"),
        ([""], r"names '', which Decoder does not have"),
        (["image"], "names 'image', which stands for the decoder's output"),
    ],
)
def test_names_that_cannot_be_are_refused(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Autoencoder(Decoder(), feature_modules=names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["embed", "never"], r"names \['never'\], which did not run during decode"),
        (["embed", "never", "tokens"], "expected 'never' next, but 'tokens' ran first"),
        (["tokens", "embed"], "expected 'tokens' next, but 'embed' ran first"),
        (["twice", "out"], "names 'twice', which runs more than once"),
        (["strings"], "module 'strings' must put out a tensor or a tuple with one, got str"),
    ],
)
def test_modules_that_do_not_run_as_listed_are_refused(names: list[str], message: str) -> None:
    model = Decoder()
    autoencoder = Autoencoder(model, feature_modules=names)
    with pytest.raises(ValueError, match=message):
        autoencoder.features(torch.randn(1, 2, 3, 3))
    assert hooks_left(model) == 0


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(7, 2, 1))
    with pytest.raises(RuntimeError):
        Autoencoder(model, feature_modules=["1"]).features(torch.randn(1, 2, 3, 3))
    assert hooks_left(model) == 0


def test_a_known_family_keeps_its_scaling() -> None:
    """Names in place of stages: the same features, scaled and, for RAE, ranged as ever."""
    model = scrambled(tiny_kl(scaling_factor=0.5, shift_factor=0.3))
    z = torch.randn(1, 4, 3, 3)
    named = Autoencoder(model, feature_modules=["decoder.mid_block", "decoder.up_blocks.0"])
    staged = Autoencoder(model)
    torch.testing.assert_close(named.features(z), staged.features(z, 2))
    torch.testing.assert_close(named.decode(z), staged.decode(z))
    assert named.downscale == staged.downscale
    with pytest.raises(ValueError, match=r"`skip`: \['post_quant_conv'\] cannot be left out with `feature_modules`"):
        named.features(z, skip=("post_quant_conv",))
    rae = scrambled(tiny_rae())
    z = torch.randn(1, 64, 4, 4)
    by_name = Autoencoder(rae, feature_modules=["decoder.decoder_layers.1"])
    torch.testing.assert_close(by_name.decode(z), Autoencoder(rae).decode(z))
    assert by_name.features(z)[0].shape == (1, 32, 17)


class Block(nn.Module):
    """TAESD's block; with ``pool``, the extra branch that the FLUX.2 one has in its middle."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        c = 64
        convs = [nn.Conv2d(c, c, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(c, 4 * c, 1, bias=False),
                nn.GroupNorm(4, 4 * c),
                nn.ReLU(),
                nn.Conv2d(4 * c, c, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / 3) * 3


def resample(up: bool) -> list[nn.Module]:
    conv = nn.Conv2d(64, 64, 3, padding=1, stride=1 if up else 2, bias=False)
    return [nn.Upsample(scale_factor=2), conv] if up else [conv]


class Taef2(nn.Module):
    """FLUX.2's TAESD as its authors release it: images in [0, 1], 32 channels, f = 8."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        down, up = ([resample(u) for _ in range(3)] for u in (False, True))
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, padding=1), Block(), *down[0], Block(), Block(), Block()),
            *(*down[1], Block(), Block(), Block(), *down[2], Block(True), Block(True), Block(True)),
            nn.Conv2d(64, 32, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            *(Clamp(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), Block(True), Block(True), Block(True)),
            *(*up[0], Block(), Block(), Block(), *up[1], Block(), Block(), Block(), *up[2], Block()),
            nn.Conv2d(64, 3, 3, padding=1),
        )
        for part in ("encoder", "decoder"):
            state = torch.load(folder / f"taef2_{part}.pth", map_location="cpu", weights_only=True)
            self.get_submodule(part).load_state_dict(state)
        self.float()

    def encode(self, images: Tensor) -> Tensor:
        z: Tensor = self.encoder(images)
        return z

    def decode(self, z: Tensor) -> Tensor:
        images: Tensor = self.decoder(z)
        return images


@pytest.mark.slow
def test_a_real_autoencoder_that_diffusers_cannot_load(shared: Path) -> None:
    """FLUX.2's tiny one: features by name, and photos that come back as well as its notes say (27.5 dB)."""
    model = Taef2(shared / "weights" / "taef2")
    names = [f"decoder.{i}" for i in (5, 10, 15, 18)]
    autoencoder = Autoencoder(model, feature_modules=names, downscale=8)
    with zipfile.ZipFile(shared / "data" / "imagenette128.zip") as archive:
        files = [name for name in archive.namelist() if name.endswith(".webp")][::2000]
        opened = [Image.open(io.BytesIO(archive.read(name))).convert("RGB").resize((128, 128)) for name in files]
    photos = torch.stack([torch.from_numpy(np.array(photo)) for photo in opened]).permute(0, 3, 1, 2) / 255
    z = autoencoder.encode(photos)
    assert z.shape == (len(photos), 32, 16, 16)
    seen, decoded = hooked(model, names, lambda: model.decode(z))
    for feature, expected, side in zip(autoencoder.features(z), seen, (16, 32, 64, 128), strict=True):
        torch.testing.assert_close(feature, expected)
        assert feature.shape[1:] == (64, side, side)
    torch.testing.assert_close(autoencoder.decode(z), decoded)
    assert peak_signal_noise_ratio(autoencoder.decode(z).clamp(0, 1), photos, data_range=1.0) > 25


def test_slices_and_tiles_are_refused() -> None:
    """A hook would see the first of them alone."""
    names = ["decoder.mid_block", "decoder.up_blocks.0"]
    sliced = tiny_kl()
    sliced.enable_slicing()
    with pytest.raises(ValueError, match=r"put out 1 samples for 3 latents\. Does the model decode in slices"):
        Autoencoder(sliced, feature_modules=names).features(torch.randn(3, 4, 4, 4))
    tiled = tiny_kl()
    tiled.enable_tiling()
    with pytest.raises(ValueError, match=r"decodes in tiles.*disable_tiling"):
        Autoencoder(tiled, feature_modules=names).features(torch.randn(1, 4, 4, 4))


def test_a_class_of_another_project_in_compvis_layout() -> None:
    """Its maps, images, latents and loss are those of diffusers' class, whose weights it has by other names."""
    kl = scrambled(tiny_kl(scaling_factor=0.5))
    theirs = Autoencoder(kl, sample_posterior=False)
    ours = Autoencoder(frozen_as_they_do(CompVisKL(kl)), sample_posterior=False, scaling_factor=0.5)
    assert ours.feature_names == (
        "decoder.mid.block_2",
        "decoder.up.2.upsample",
        "decoder.up.1.upsample",
        "decoder.up.0.block.1",
    )
    z, images = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 16, 16)
    for found, expected in zip(ours.features(z), theirs.features(z), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z))
    torch.testing.assert_close(ours.encode(images), theirs.encode(images))
    ours.sample_posterior = theirs.sample_posterior = True
    same = [a.encode(images, torch.Generator().manual_seed(1)) for a in (ours, theirs)]
    torch.testing.assert_close(*same)
    z0_hat = z + 0.1 * torch.randn_like(z)
    torch.testing.assert_close(LatentPerceptualLoss(ours)(z0_hat, z), LatentPerceptualLoss(theirs)(z0_hat, z))


def test_what_ends_a_level_of_compvis_layout() -> None:
    model: Any = CompVisKL(tiny_kl())
    model.decoder.up[0].attn = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert Autoencoder(model, scaling_factor=1.0).feature_names[-1] == "decoder.up.0.attn.1"
    assert Autoencoder(model.decoder, scaling_factor=1.0).feature_names[0] == "mid.block_2", "a decoder alone"
    for remove in ("block", "attn"):
        delattr(model.decoder.up[0], remove)
    with pytest.raises(ValueError, match="decoder can be split into stages, got CompVisKL"):
        Autoencoder(model, scaling_factor=1.0)


def test_a_scale_that_no_one_gives_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Autoencoder(CompVisKL(tiny_kl()), scaling_factor=0.18)
    Autoencoder(tiny_kl())
    assert "scaled" not in caplog.text
    Autoencoder(CompVisKL(tiny_kl()))
    assert "CompVisKL does not say how its latents are scaled" in caplog.text


def test_a_decoder_that_draws_noise_is_refused() -> None:
    """Its features of one latent differ each time, and with them the loss of a perfect estimate from 0."""
    blocks: dict[str, Any] = {
        "encoder_block_out_channels": (32,),
        "encoder_down_block_types": ("DownEncoderBlock2D",),
        "decoder_block_out_channels": (32,),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",),
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",),
        "decoder_layers_per_block": 1,
    }
    model = ConsistencyDecoderVAE(**blocks)
    with pytest.raises(ValueError, match="ConsistencyDecoderVAE decodes by sampling"):
        Autoencoder(model, feature_modules=["decoder_unet.mid_block"])
