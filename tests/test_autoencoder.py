from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_kl, tiny_taesd
from diffusers import AutoencoderKL
from families import scrambled, tiny_flux2, tiny_rae
from torch import nn

from lpl_lightning import Autoencoder, LatentPerceptualLoss


def test_posterior_is_sampled_from_its_generator() -> None:
    autoencoder = Autoencoder(tiny_kl())
    images = torch.rand(2, 3, 16, 16)
    first, again, other = (autoencoder.encode(images, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_it_stays_frozen_and_in_eval_while_gradients_pass_through() -> None:
    autoencoder = Autoencoder(tiny_kl())
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    nn.Sequential(autoencoder).train()
    autoencoder.requires_grad_(True)
    assert not any(module.training for module in autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    z = torch.randn(1, 4, 4, 4, requires_grad=True)
    autoencoder.features(z)[-1].sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0


def test_it_runs_in_its_own_precision_under_autocast() -> None:
    autoencoder = Autoencoder(tiny_kl())
    z = torch.randn(1, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        feature = autoencoder.features(z)[-1]
    assert feature.dtype == torch.float32
    torch.testing.assert_close(feature, autoencoder.features(z)[-1])


@pytest.mark.parametrize(
    ("autocast", "force_upcast", "expected"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float16, False, torch.float16),
        (torch.float16, True, torch.float32),
    ],
)
def test_autocast_is_followed_where_asked_and_the_decoder_stands_it(
    autocast: torch.dtype, force_upcast: bool, expected: torch.dtype
) -> None:
    autoencoder = Autoencoder(tiny_kl(force_upcast=force_upcast), autocast=True, sample_posterior=False)
    z, images = torch.randn(1, 4, 4, 4), torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", autocast):
        image = autoencoder.decode(z)
        encoded = autoencoder.encode(images)
    assert image.dtype == expected
    torch.testing.assert_close(encoded, autoencoder.encode(images))
    torch.testing.assert_close(image.float(), autoencoder.decode(z), atol=0.05, rtol=0.05)


def test_shift_and_scale_are_exact_in_float64() -> None:
    """0.13025 is not the float32 next to it, whichever way the model came to float64."""
    std = [0.1, 0.2, 0.3, 0.7]
    for doubled in (False, True):
        model = scrambled(tiny_kl(scaling_factor=0.13025, latents_mean=[0.1, -0.2, 0.3, 0.6], latents_std=std))
        autoencoder = Autoencoder(model).double() if doubled else Autoencoder(model, dtype="float64")
        assert autoencoder.dtype == torch.float64
        assert autoencoder.shift.tolist() == [0.1, -0.2, 0.3, 0.6]
        assert autoencoder.scale.tolist() == [0.13025 / value for value in std]
        z = torch.randn(2, 4, 4, 4, dtype=torch.float64)
        shift, scale = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in ([0.1, -0.2, 0.3, 0.6], std))
        expected = model.decode(z * scale / 0.13025 + shift).sample
        torch.testing.assert_close(autoencoder.decode(z), expected, atol=1e-12, rtol=1e-12)
        images = torch.rand(1, 3, 16, 16, dtype=torch.float64)
        raw = model.encode(images).latent_dist.mode()
        autoencoder.sample_posterior = False
        torch.testing.assert_close(
            autoencoder.encode(images), (raw - shift) * (0.13025 / scale), atol=1e-12, rtol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lower_precision_around_it_does_not_lower_it(dtype: torch.dtype) -> None:
    autoencoder, head = Autoencoder(tiny_kl()), nn.Linear(2, 2)
    z = torch.randn(1, 4, 4, 4)
    before = autoencoder.decode(z)
    nn.Sequential(autoencoder, head).to(dtype)
    assert head.weight.dtype == dtype
    assert autoencoder.dtype == torch.float32
    assert torch.equal(autoencoder.decode(z), before)


def test_it_follows_a_higher_precision_and_a_memory_format() -> None:
    autoencoder = Autoencoder(tiny_kl(), dtype="bfloat16")
    assert autoencoder.dtype == torch.bfloat16
    assert autoencoder.scale.dtype == autoencoder.encode(torch.rand(1, 3, 16, 16)).dtype == torch.float32
    assert autoencoder.decode(torch.randn(1, 4, 4, 4)).dtype == torch.bfloat16
    assert autoencoder.half().dtype == torch.bfloat16
    assert autoencoder.float().dtype == torch.float32
    weight = autoencoder.to(memory_format=torch.channels_last).model.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_a_module_is_put_in_the_precision_asked_for() -> None:
    model = tiny_flux2()
    with torch.no_grad():
        model.bn.running_mean.fill_(0.1)
    mean = model.bn.running_mean[0].item()
    autoencoder = Autoencoder(model, dtype="bfloat16")
    assert model.decoder.conv_in.weight.dtype == torch.bfloat16
    assert autoencoder.shift[0].item() == mean  # read before bfloat16 rounds it
    assert Autoencoder(tiny_taesd(), dtype="float16").dtype == torch.float16
    assert Autoencoder(tiny_kl(force_upcast=False).half()).dtype == torch.float16


def test_float16_is_refused_where_the_decoder_overflows() -> None:
    message = "AutoencoderKL must run in float32 or bfloat16, got float16"
    with pytest.raises(ValueError, match=message):
        Autoencoder(tiny_kl(force_upcast=True), dtype="float16")
    shared = tiny_kl(force_upcast=True).half()
    with pytest.raises(ValueError, match=message + r".* give a copy, copy.deepcopy\(vae\).float\(\)"):
        Autoencoder(shared)
    assert Autoencoder(copy.deepcopy(shared).float()).dtype == torch.float32
    assert shared.dtype == torch.float16
    assert Autoencoder(shared, dtype="float32").dtype == torch.float32


def test_a_config_that_does_not_say_it_may_run_in_float16(tmp_path: Path) -> None:
    """Stable Diffusion 1.5's is older than the key, for which diffusers takes true."""
    tiny_kl(force_upcast=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["force_upcast"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    vae = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert vae.config.force_upcast
    autoencoder = Autoencoder(vae, autocast=True)
    assert autoencoder.dtype == torch.float16
    with torch.autocast("cpu", torch.float16):
        assert autoencoder.decode(torch.randn(1, 4, 4, 4)).dtype == torch.float16
    assert Autoencoder(str(tmp_path), dtype="float16").dtype == torch.float16


def test_an_unknown_precision_is_refused() -> None:
    dtype: Any = "fp32"
    with pytest.raises(ValueError, match=r"`dtype` must be one of \(None, 'float32'.* got 'fp32'"):
        Autoencoder(tiny_kl(), dtype=dtype)


def test_a_decoder_without_weights_follows_a_device() -> None:
    autoencoder = Autoencoder(nn.Sequential(nn.Upsample(scale_factor=2)), feature_modules=["0"], shift_factor=1.0)
    torch.testing.assert_close(autoencoder.decode(torch.zeros(1, 2, 1, 1)), torch.ones(1, 2, 2, 2))
    assert autoencoder.to("meta").shift.device == torch.device("meta")


def test_a_model_that_a_loop_moves_by_itself_is_followed() -> None:
    model = tiny_kl(shift_factor=0.5)
    autoencoder = Autoencoder(model)
    model.to("meta")
    with pytest.raises(ValueError, match="`z` must be on meta, where the autoencoder is; got cpu"):
        autoencoder.decode(torch.zeros(1, 4, 2, 2))
    assert autoencoder.shift.device == autoencoder.scale.device == torch.device("meta")


def test_scale_and_shift_of_the_config_can_be_replaced() -> None:
    model = scrambled(tiny_kl(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4, scaling_factor=0.5))
    z = torch.randn(1, 4, 4, 4)
    one = Autoencoder(model, scaling_factor=0.25, shift_factor=0.5)
    torch.testing.assert_close(one.decode(z), model.decode(z / 0.25 + 0.5).sample)
    each = Autoencoder(model, scaling_factor=[1.0, 2.0, 3.0, 4.0])
    per_channel = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, -1, 1, 1)
    torch.testing.assert_close(each.decode(z), model.decode(z / per_channel + per_channel).sample)
    assert Autoencoder(model, downscale=16).downscale == 16
    with pytest.raises(ValueError, match="`downscale` must be 1 or more, got 0"):
        Autoencoder(model, downscale=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"scaling_factor": [1.0, 2.0]},
            "`scaling_factor` must be one number or one for each of the 4 channels .* got 2",
        ),
        ({"shift_factor": []}, "`shift_factor` must be one number .* got 0"),
        ({"scaling_factor": 0.0}, r"`scaling_factor` must be finite and not 0, got 0\.0"),
        ({"shift_factor": float("nan")}, "`shift_factor` must be finite, got nan"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Autoencoder(tiny_kl(), **arguments)


def test_features_come_by_number_or_name_in_decoder_order() -> None:
    autoencoder = Autoencoder(scrambled(tiny_kl()))
    z = torch.randn(1, 4, 4, 4)
    mid, up_0, up_1, up_2 = autoencoder.features(z)
    image = autoencoder.decode(z)
    assert autoencoder.stage_names == ("mid", "up_0", "up_1", "up_2", "image")
    torch.testing.assert_close(autoencoder.features(z, 1), [mid])
    torch.testing.assert_close(autoencoder.features(z, 4), [mid, up_0, up_1, up_2])
    torch.testing.assert_close(autoencoder.features(z, ["image", "up_1", "mid", "mid"]), [mid, up_1, image])
    torch.testing.assert_close(autoencoder.features(z, "up_0"), [up_0])
    for depth in (0, 5, -1):
        with pytest.raises(ValueError, match=r"`depth` must lie in 1 \.\. 4"):
            autoencoder.features(z, depth)
    with pytest.raises(ValueError, match=r"one or more of \('mid', .* 'image'\), got \['up_9'\]"):
        autoencoder.features(z, ["mid", "up_9"])
    with pytest.raises(ValueError, match=r"one or more of .* got \(\)"):
        autoencoder.features(z, [])


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (4, 4, 4), (1, 4, 1, 4, 4)])
def test_latents_of_another_autoencoder_are_refused(shape: tuple[int, ...]) -> None:
    autoencoder = Autoencoder(tiny_kl())
    for run in (autoencoder.features, autoencoder.decode):
        with pytest.raises(ValueError, match=r"`z` must be \(B, 4, h, w\).* got \(\d"):
            run(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (3, 16, 16), (1, 3, 2, 16, 16), (1, 3, 16, 18)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`images` must be \(B, 3, H, W\) with H and W divisible by 4.* got \(\d"):
        Autoencoder(tiny_kl()).encode(torch.zeros(shape))


def test_images_that_would_be_resized_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sides of 8; got \(1, 3, 16, 16\)"):
        Autoencoder(tiny_rae()).encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="reshape_to_2d=False, whose latents are tokens"):
        Autoencoder(tiny_rae(reshape_to_2d=False))
    with pytest.raises(ValueError, match="must be left out: the model scales its latents itself"):
        Autoencoder(tiny_rae(), scaling_factor=1.0)
    with pytest.raises(ValueError, match="must be left out: the model scales its latents itself"):
        Autoencoder(tiny_rae(), shift_factor=0.5)


def test_another_device_is_refused() -> None:
    autoencoder = Autoencoder(tiny_kl())
    with pytest.raises(ValueError, match="`z` must be on cpu, where the autoencoder is; got meta"):
        autoencoder.features(torch.zeros(1, 4, 4, 4, device="meta"))
    with pytest.raises(ValueError, match="`images` must be on cpu, where the autoencoder is; got meta"):
        autoencoder.encode(torch.zeros(1, 3, 16, 16, device="meta"))
    moved = autoencoder.to("meta")
    assert moved.shift.device == moved.scale.device == moved.model.decoder.conv_in.weight.device == torch.device("meta")


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


def test_a_move_in_a_validation_leaves_gradients_possible() -> None:
    """Validations run in inference mode, and so may a ``to`` there."""
    autoencoder = Autoencoder(tiny_kl())
    with torch.inference_mode():
        autoencoder.to("cpu")
    z = torch.randn(1, 4, 4, 4, requires_grad=True)
    autoencoder.features(z)[-1].sum().backward()
    assert z.grad is not None


def test_a_deep_copy_runs_its_own_weights() -> None:
    autoencoder = Autoencoder(tiny_kl())
    twin = copy.deepcopy(autoencoder)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.zero_()
    assert twin.decode(torch.randn(1, 4, 4, 4)).abs().sum() > 0


def test_a_wrong_source_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Autoencoder("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        Autoencoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="embedded:autoencoder_shapes"):
        Autoencoder("embedded:nothing")


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


def test_what_is_moved_in_a_validation_is_trained_with_later() -> None:
    """Lightning validates in inference mode, whose tensors could take part in no graph."""
    autoencoder = Autoencoder(tiny_kl())
    with torch.inference_mode():
        autoencoder.to(torch.float64)
    z0 = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    z0_hat = (z0 + 0.1 * torch.randn_like(z0)).requires_grad_()
    LatentPerceptualLoss(autoencoder)(z0_hat, z0).sum().backward()
    assert z0_hat.grad is not None
    assert z0_hat.grad.abs().sum() > 0


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
