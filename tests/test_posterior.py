"""What a model's own ``encode`` may give, and what is refused of it. More is tested through ``Autoencoder``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpl_lightning import Autoencoder


class Own(nn.Module):
    """An autoencoder of one's own, whose ``encode`` gives what it is told to."""

    def __init__(self, *second: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 1), second

    def encode(self, images: Tensor) -> Any:
        z = images[:, :1, ::2, ::2]
        return z if not self.second else (z, self.second[0].expand(z.shape) if self.second[0].ndim else self.second[0])

    def decode(self, z: Tensor) -> Tensor:
        return self.first(z)  # type: ignore[no-any-return]


def autoencoder(*second: Tensor) -> Autoencoder:
    return Autoencoder(Own(*second), feature_modules=["first"], scaling_factor=1.0)


def test_a_logarithm_of_the_variance_is_no_standard_deviation() -> None:
    """It would make latents that are almost all noise, and no error."""
    images = torch.rand(3, 3, 8, 8)
    with pytest.raises(ValueError, match=r"goes down to -4.*return `mean, \(0.5 \* log_variance\).exp\(\)`"):
        autoencoder(torch.full((1, 1, 1, 1), -4.0)).encode(images)
    with pytest.raises(ValueError, match="goes down to -4"):
        autoencoder(torch.full((1, 1, 1, 1), -4.0)).posterior(images)
    mean, deviation = autoencoder(torch.full((1, 1, 1, 1), 0.25)).posterior(images)
    assert torch.equal(mean, images[:, :1, ::2, ::2])
    assert deviation is not None
    assert (deviation == 0.25).all()


def test_a_pair_of_a_latent_and_something_else_is_refused() -> None:
    """Such as a term of the loss that it was trained with."""
    with pytest.raises(ValueError, match=r"shapes \(3, 1, 4, 4\) and \(\)"):
        autoencoder(torch.tensor(0.1)).encode(torch.rand(3, 3, 8, 8))
    assert autoencoder().encode(torch.rand(3, 3, 8, 8)).shape == (3, 1, 4, 4)
