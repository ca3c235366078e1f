"""Counts of multiply-adds against layers added up by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_dit, tiny_kl, tiny_sd3
from torch import Tensor, nn

from lpl_lightning import Autoencoder, ClassLabels, ClassTokens, Denoiser
from lpl_lightning.conditioning import Condition
from lpl_lightning.multiply_adds import of_decoder, of_denoiser, of_encoder


def by_hooks(module: nn.Module, run: Any) -> int:
    """Multiply-adds of linear layers and convolutions as they run on real tensors, and of attention by definition."""
    total = 0

    def of_layer(layer: Any, args: Any, out: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Linear):
            total += out.numel() * layer.in_features
        else:
            total += out.numel() * layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]

    attention = nn.functional.scaled_dot_product_attention

    def of_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal total
        total += query.numel() * key.shape[-2] + query.numel() // query.shape[-1] * key.shape[-2] * value.shape[-1]
        return attention(query, key, value, *args, **kwargs)

    hooks = [
        layer.register_forward_hook(of_layer) for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    patch = pytest.MonkeyPatch()
    patch.setattr(nn.functional, "scaled_dot_product_attention", of_attention)
    try:
        with torch.no_grad():
            run()
    finally:
        patch.undo()
        for hook in hooks:
            hook.remove()
    return total


def test_an_autoencoder() -> None:
    autoencoder = Autoencoder(tiny_kl())
    z = torch.randn(1, 4, 8, 8)
    for depth in (1, 2, 4):
        names = autoencoder.feature_names[:depth]
        naive = by_hooks(autoencoder.model, lambda depth=depth: autoencoder.features(z, depth))
        assert of_decoder(autoencoder, tuple(z.shape), names) == naive
    assert of_decoder(autoencoder, tuple(z.shape), ()) == 0
    images = torch.zeros(1, 3, 32, 32)
    assert of_encoder(autoencoder, tuple(images.shape)) == by_hooks(
        autoencoder.model, lambda: autoencoder.encode(images)
    )


def test_a_decoder_with_named_modules() -> None:
    by_name = Autoencoder(tiny_kl(), feature_modules=["decoder.mid_block", "decoder.up_blocks.0"])
    naive = by_hooks(by_name.model, lambda: by_name.features(torch.randn(1, 4, 8, 8), 1))
    assert of_decoder(by_name, (1, 4, 8, 8), ["decoder.mid_block"]) == naive


@pytest.mark.parametrize(
    ("denoiser", "conditioner"),
    [(tiny_sd3(), ClassTokens(3, token_dim=8, pooled_dim=8, tokens_per_class=5)), (tiny_dit(), ClassLabels(3))],
    ids=["sd3", "dit"],
)
def test_denoisers(denoiser: Denoiser, conditioner: Any) -> None:
    z, t = torch.randn(1, 4, 4, 4), torch.tensor([500.0])
    condition = conditioner({"label": torch.tensor([1])}, 1)
    assert of_denoiser(denoiser, tuple(z.shape), conditioner) == by_hooks(denoiser, lambda: denoiser(z, t, condition))
    assert all(parameter.device.type == "cpu" for parameter in denoiser.parameters())


def test_what_looks_at_values_is_not_counted() -> None:
    class Looks(Denoiser):
        def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return z_t * float(t.max())

    assert of_denoiser(Looks(nn.Conv2d(4, 4, 1)), (1, 4, 4, 4), ClassLabels(3)) is None
