from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_kl, tiny_taesd
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from lpl_lightning import Autoencoder

MODELS = {
    "kl": lambda: tiny_kl(),
    "kl_shift": lambda: tiny_kl(shift_factor=0.3, scaling_factor=1.7),
    "kl_no_quant": lambda: tiny_kl(use_quant_conv=False, use_post_quant_conv=False, latent_channels=16),
    "kl_per_channel": lambda: tiny_kl(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5]),
    "tiny": lambda: tiny_taesd(),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def unscaled(z: Tensor, config: Any) -> Any:
    """What diffusers' pipelines do to a latent before they decode it."""
    if config.get("latents_mean") is not None:
        mean = torch.tensor(config["latents_mean"]).view(1, -1, 1, 1)
        std = torch.tensor(config["latents_std"]).view(1, -1, 1, 1)
        return z * std / config["scaling_factor"] + mean
    return z / config["scaling_factor"] + (config.get("shift_factor") or 0.0)


def test_staged_decode_equals_the_models_own(model: Any) -> None:
    autoencoder = Autoencoder(model)
    z = torch.randn(2, autoencoder.latent_channels, 4, 4)
    expected = model.decode(unscaled(z, model.config)).sample
    torch.testing.assert_close(autoencoder.decode(z), expected, atol=1e-5, rtol=1e-5)


def test_features_equal_forward_hooks_on_the_model(model: Any) -> None:
    autoencoder = Autoencoder(model)
    if isinstance(model, AutoencoderTiny):
        layers = list(model.decoder.layers)
        last_of_stage = [layers[i - 1] for i, layer in enumerate(layers) if isinstance(layer, nn.Upsample)]
        watched = [*last_of_stage, layers[-2]]
    else:
        watched = [model.decoder.mid_block, *model.decoder.up_blocks]
    seen: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _m, _i, out: seen.append(out)) for m in watched]
    z = torch.randn(2, autoencoder.latent_channels, 4, 4)
    model.decode(unscaled(z, model.config))
    for handle in handles:
        handle.remove()
    features = autoencoder.features(z)
    assert len(features) == len(autoencoder.feature_names) == len(seen)
    for feature, expected in zip(features, seen, strict=True):
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-5)


def test_features_stop_after_the_last_one_asked_for() -> None:
    model = tiny_kl()
    autoencoder = Autoencoder(model)
    ran: list[str] = []
    for i, block in enumerate(model.decoder.up_blocks):
        block.register_forward_hook(lambda _m, _i, _o, i=i: ran.append(f"up_{i}"))
    features = autoencoder.features(torch.randn(1, 4, 4, 4), depth=2)
    assert [f.shape[-1] for f in features] == [4, 8]
    assert ran == ["up_0"]
    with pytest.raises(ValueError, match=r"`depth` must lie in 1 \.\. 4"):
        autoencoder.features(torch.randn(1, 4, 4, 4), depth=5)


def test_encode_scales_the_posterior(model: Any) -> None:
    autoencoder = Autoencoder(model, sample_posterior=False)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    encoded = model.encode(images)
    raw = encoded.latents if isinstance(model, AutoencoderTiny) else encoded.latent_dist.mode()
    torch.testing.assert_close(unscaled(autoencoder.encode(images), model.config), raw, atol=1e-5, rtol=1e-5)
    assert images.shape[-1] // autoencoder.downscale == raw.shape[-1]


def test_posterior_is_sampled_from_its_generator() -> None:
    autoencoder = Autoencoder(tiny_kl())
    images = torch.rand(2, 3, 16, 16)
    first, again, other = (autoencoder.encode(images, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_it_stays_frozen_and_in_eval_while_gradients_pass_through() -> None:
    autoencoder = Autoencoder(tiny_kl())
    nn.Sequential(autoencoder).train()
    autoencoder.requires_grad_(True)
    assert not any(module.training for module in autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    z = torch.randn(1, 4, 4, 4, requires_grad=True)
    autoencoder.features(z)[-1].sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0


def test_it_runs_in_float32_under_autocast() -> None:
    autoencoder = Autoencoder(tiny_kl())
    z = torch.randn(1, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        feature = autoencoder.features(z)[-1]
    assert feature.dtype == torch.float32
    torch.testing.assert_close(feature, autoencoder.features(z)[-1])


def test_it_keeps_out_of_the_state_dict_and_loads_strictly() -> None:
    parent = nn.ModuleDict({"autoencoder": Autoencoder(tiny_kl()), "head": nn.Linear(2, 2)})
    state = parent.state_dict()
    assert set(state) == {"head.weight", "head.bias"}
    before = copy.deepcopy(dict(parent["autoencoder"].named_parameters()))
    parent.load_state_dict({name: tensor + 1 for name, tensor in state.items()}, strict=True)
    for name, parameter in parent["autoencoder"].named_parameters():
        assert torch.equal(parameter, before[name])
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        parent.load_state_dict({"head.weight": state["head.weight"]}, strict=True)


def test_a_deep_copy_runs_its_own_weights() -> None:
    autoencoder = Autoencoder(tiny_kl())
    twin = copy.deepcopy(autoencoder)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.zero_()
    assert twin.decode(torch.randn(1, 4, 4, 4)).abs().sum() > 0


@pytest.mark.parametrize("make", [tiny_kl, tiny_taesd])
def test_a_saved_folder_loads_as_what_it_was(make: Any, tmp_path: Path) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path / "vae")
    z = torch.randn(1, 4, 4, 4)
    expected = Autoencoder(model).decode(z)
    torch.testing.assert_close(Autoencoder(str(tmp_path / "vae")).decode(z), expected)
    torch.testing.assert_close(Autoencoder(str(tmp_path), subfolder="vae").decode(z), expected)


def test_a_wrong_source_or_image_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Autoencoder("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        Autoencoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="embedded:autoencoder_shapes"):
        Autoencoder("embedded:nothing")
    with pytest.raises(ValueError, match="can be split into stages, got Linear"):
        Autoencoder(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"divisible by 4, .* got \(1, 3, 18, 16\)"):
        Autoencoder(tiny_kl()).encode(torch.rand(1, 3, 18, 16))


@pytest.mark.parametrize(("name", "channels"), [("taesd", 4), ("taesd3", 16)])
def test_real_small_autoencoders(shared: Path, name: str, channels: int) -> None:
    """Staged decode equals the model's own, and a smooth image comes back."""
    autoencoder = Autoencoder(str(shared / "weights" / name))
    ramp = torch.linspace(-0.8, 0.8, 64)
    image = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, torch.zeros(64, 64)])[None]
    z = autoencoder.encode(image)
    assert z.shape == (1, channels, 8, 8)
    decoded = autoencoder.decode(z)
    torch.testing.assert_close(decoded, autoencoder.model.decode(z).sample, atol=1e-5, rtol=1e-5)
    assert (decoded - image).square().mean() < 0.01
    assert [f.shape[-1] for f in autoencoder.features(z)] == [8, 16, 32, 64]


def test_the_embedded_autoencoder_reconstructs_held_out_shapes() -> None:
    """28 dB or better on images that it was not trained on."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    from lpl_lightning.data import ShapesDataset

    autoencoder = Autoencoder("embedded:autoencoder_shapes", sample_posterior=False)
    held_out = ShapesDataset(64, split="test", seed=7)
    images = torch.stack([held_out[i]["image"] for i in range(64)])
    latents = autoencoder.encode(images)
    psnr = peak_signal_noise_ratio(autoencoder.decode(latents), images, data_range=(-1.0, 1.0))
    assert psnr > 28
    assert autoencoder.downscale == 4
    assert len(autoencoder.feature_names) == 4
    assert latents.mean().abs() < 0.1
    assert abs(latents.std().item() - 1) < 0.1
