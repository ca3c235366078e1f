from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_kl
from families import FAMILIES, IMAGE_FAMILIES, SPATIAL, Family, scrambled, tiny_vq
from torch import Tensor, nn

from lpl_lightning import Autoencoder
from lpl_lightning.stages import Stage, decoder_stages


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_staged_decode_equals_the_models_own(family: Family) -> None:
    model = family.model()
    autoencoder = Autoencoder(model)
    z = torch.randn(family.z)
    decoded = autoencoder.decode(z)
    torch.testing.assert_close(decoded, family.decode(model, z), atol=1e-5, rtol=1e-5)
    assert decoded.shape[-2:] == tuple(side * autoencoder.downscale for side in z.shape[-2:])


def test_features_equal_forward_hooks_on_the_model(family: Family) -> None:
    model = family.model()
    autoencoder = Autoencoder(model)
    z = torch.randn(family.z)
    seen: dict[int, list[Tensor]] = {}
    handles = []
    for i, module in enumerate(family.modules(model)):
        seen[i] = []
        handles.append(module.register_forward_hook(lambda _m, _i, out, i=i: seen[i].append(out)))
    image = family.decode(model, z)
    for handle in handles:
        handle.remove()
    assert autoencoder.feature_names == family.names
    assert autoencoder.stage_names == (*family.names, "image")
    features = autoencoder.features(z)
    assert len(features) == len(seen)
    for i, feature in enumerate(features):
        # A video is decoded frame by frame: one output per latent frame.
        expected = family.read(torch.cat(seen[i], dim=2) if len(seen[i]) > 1 else seen[i][0])
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-5)
    sides = (family.unscale(z, model)).shape[-2:]
    assert features[0].shape[-2:] == sides  # the first is at the decoder's lowest resolution
    torch.testing.assert_close(autoencoder.features(z, ["image"])[0], image, atol=1e-5, rtol=1e-5)


def test_encode_is_what_decode_undoes(family: Family) -> None:
    model = family.model()
    autoencoder = Autoencoder(model, sample_posterior=False)
    images = torch.rand(family.images) * 2 - 1
    encoded = model.encode(images / 2 + 0.5 if family.from_unit else images)
    if hasattr(encoded, "latent_dist"):
        raw = encoded.latent_dist.mode()
    else:
        raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    z = autoencoder.encode(images)
    assert z.shape == family.z
    assert autoencoder.latent_channels == family.z[1]
    assert autoencoder.downscale == images.shape[-1] // z.shape[-1]
    torch.testing.assert_close(family.unscale(z, model), raw, atol=1e-5, rtol=1e-4)


def test_gradients_pass_through_every_stage(family: Family) -> None:
    autoencoder = Autoencoder(family.model())
    for name in autoencoder.stage_names:
        z = torch.randn(family.z, requires_grad=True)
        autoencoder.features(z, [name])[0].square().mean().backward()
        assert z.grad is not None
        assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_features_stop_after_the_last_one_asked_for(name: str) -> None:
    family = IMAGE_FAMILIES[name]
    model = family.model()
    ran: list[int] = []
    for i, module in enumerate(family.modules(model)):
        module.register_forward_hook(lambda _m, _i, _o, i=i: ran.append(i))
    autoencoder = Autoencoder(model)
    z = torch.randn(family.z)
    (second,) = autoencoder.features(z, [family.names[1]])
    assert ran == [0, 1]
    torch.testing.assert_close(second, autoencoder.features(z, 2)[1])
    assert ran == [0, 1, 0, 1]


def test_post_quant_conv_can_be_left_out() -> None:
    """As in the public example, which gives the unscaled latent to the decoder without it."""
    model = scrambled(tiny_kl(scaling_factor=0.5))
    autoencoder = Autoencoder(model)
    z = torch.randn(1, 4, 4, 4)
    mid, image = autoencoder.features(z, ["mid", "image"], skip=("post_quant_conv",))
    torch.testing.assert_close(mid, model.decoder.mid_block(model.decoder.conv_in(z / 0.5)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(image, model.decoder(z / 0.5), atol=1e-5, rtol=1e-5)
    without = Autoencoder(tiny_kl(use_post_quant_conv=False))
    torch.testing.assert_close(without.features(z, 1, skip=("post_quant_conv",)), without.features(z, 1))
    with pytest.raises(ValueError, match=r"`skip`: \['up_0', 'image'\] are features or the image"):
        autoencoder.features(z, skip=("up_0", "image"))


@pytest.mark.parametrize("norm", ["group", "spatial"])
@pytest.mark.parametrize("skip", [("quantize",), ("quantize", "post_quant_conv")])
def test_quantization_can_be_left_out(norm: str, skip: tuple[str, ...]) -> None:
    model = scrambled(tiny_vq(**SPATIAL | {"norm_type": norm, "norm_num_groups": 8}))
    z = torch.randn(1, 3, 3, 3)
    latent = z / 0.7
    quant = latent if "post_quant_conv" in skip else model.post_quant_conv(latent)
    expected = model.decoder(quant, latent if norm == "spatial" else None)
    (image,) = Autoencoder(model).features(z, ["image"], skip=skip)
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)


def test_quantized_latents_pass_their_gradient_straight_through() -> None:
    autoencoder = Autoencoder(scrambled(tiny_vq()))
    z = torch.randn(1, 3, 3, 4, requires_grad=True)
    latent = (z / 0.7).detach()
    quantized = autoencoder.model.quantize(latent)[0].requires_grad_()
    assert (quantized - latent).abs().max() > 0.1
    autoencoder.decode(z).square().sum().backward()
    autoencoder.model.decoder(autoencoder.model.post_quant_conv(quantized)).square().sum().backward()
    torch.testing.assert_close(z.grad, quantized.grad / 0.7)


class Blocks(nn.Module):
    """A decoder of a class that nothing is registered for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)])


def test_a_class_can_be_registered() -> None:
    class Own(Blocks):
        pass

    @decoder_stages.register(Own)
    def _(model: Any) -> list[Stage]:
        *features, image = model.blocks
        return [*(Stage(f"block_{i}", block) for i, block in enumerate(features)), Stage("image", image, False)]

    model = Own()
    autoencoder = Autoencoder(model, scaling_factor=2.0)
    z = torch.randn(1, 2, 3, 3)
    assert autoencoder.stage_names == ("block_0", "block_1", "image")
    torch.testing.assert_close(autoencoder.decode(z), nn.Sequential(*model.blocks)(z / 2))

    class Endless(Blocks):
        pass

    decoder_stages.register(Endless, lambda model: [Stage("block_0", model.blocks[0])])
    with pytest.raises(ValueError, match=r"decoder_stages of Endless must be 'image'.*got \['block_0'\]"):
        Autoencoder(Endless())


def test_an_unknown_class_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="can be split into stages, got Blocks") as raised:
        Autoencoder(Blocks())
    for word in ("AutoencoderKL", "AutoencoderKLWan", "`feature_modules`", "decoder_stages.register"):
        assert word in str(raised.value)
