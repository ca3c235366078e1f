"""A cheaper decoder than the module's own: a tiny autoencoder of the same latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_kl, tiny_taesd
from test_lpl_callback import Latents, run

from lpl_lightning import Autoencoder, LatentPerceptualLoss, LPLCallback


class WithAutoencoder(Latents):
    """f = 8, as the tiny autoencoder."""

    def __init__(self, **config: object) -> None:
        super().__init__()
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        self.autoencoder = Autoencoder(tiny_kl(**(blocks | {"block_out_channels": (8, 8, 8, 8)} | config)))


def test_a_tiny_decoder_of_the_same_latents_serves(tmp_path: Path) -> None:
    module, tiny = WithAutoencoder(), Autoencoder(tiny_taesd())
    run(module, tmp_path, LPLCallback(weight=2.0, autoencoder=tiny), max_steps=1)
    z_t, t, z0 = module.measured[0]
    with torch.no_grad():
        z0_hat = z_t - t * module.before(z_t)
    nsr = (t / (1 - t)).flatten()
    expected = LatentPerceptualLoss(tiny)(z0_hat, z0, nsr).mean().item()
    assert module.terms[0] == pytest.approx(2.0 * expected, rel=1e-5)
    own = LatentPerceptualLoss(module.autoencoder)(z0_hat, z0, nsr).mean().item()
    assert own != pytest.approx(expected, rel=0.01)


def test_one_of_other_latents_is_refused(tmp_path: Path) -> None:
    cases = [
        (WithAutoencoder(latent_channels=16), "its latent_channels is 4, expected 16"),
        (
            WithAutoencoder(
                block_out_channels=(8, 8, 8),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
            ),
            "its downscale is 8, expected 4",
        ),
    ]
    for module, message in cases:
        with pytest.raises(ValueError, match=f"`autoencoder` must be made for the latents of the module's: {message}"):
            run(module, tmp_path, LPLCallback(autoencoder=Autoencoder(tiny_taesd())), max_steps=1)
