from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import tiny_kl
from torch import Tensor

from lpl_lightning import Autoencoder, LatentPerceptualLoss
from lpl_lightning.losses import Threshold


@pytest.fixture
def autoencoder() -> Autoencoder:
    return Autoencoder(
        tiny_kl(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    )


def pair(batch: int = 4) -> tuple[Tensor, Tensor]:
    z0 = torch.randn(batch, 4, 8, 8)
    return (z0 + 0.3 * torch.randn_like(z0)).requires_grad_(), z0


def test_they_cost_nothing_unless_asked_for_and_change_nothing(autoencoder: Autoencoder) -> None:
    lpl = LatentPerceptualLoss(autoencoder)
    z0_hat, z0 = pair()
    plain, none = lpl.evaluate(z0_hat, z0)
    with_them, found = lpl.evaluate(z0_hat, z0, diagnose=True)
    assert none is None
    assert found is not None
    torch.testing.assert_close(plain, with_them, rtol=0, atol=0)
    assert not any(value.requires_grad for value in found.scalars().values())


def test_parts_are_the_losses_of_single_stages_and_add_up(autoencoder: Autoencoder) -> None:
    lpl = LatentPerceptualLoss(autoencoder)
    z0_hat, z0 = pair()
    losses, found = lpl.evaluate(z0_hat, z0, diagnose=True)
    assert found is not None
    scalars = found.scalars()
    for name in lpl.compared:
        alone = LatentPerceptualLoss(autoencoder, depth=[name])(z0_hat, z0)
        torch.testing.assert_close(found.parts[lpl.compared.index(name)], alone.detach())
        torch.testing.assert_close(scalars[f"lpl_depth/{name}"], alone.detach().mean())
    torch.testing.assert_close(sum(scalars[f"lpl_depth/{n}"] for n in lpl.compared), losses.detach().mean())
    torch.testing.assert_close(sum(scalars[f"lpl_share/{n}"] for n in lpl.compared), torch.tensor(1.0))


def test_share_masked_is_that_of_the_mask(autoencoder: Autoencoder) -> None:
    from lpl_lightning.losses import inlier_mask

    z0_hat, z0 = pair()
    lpl = LatentPerceptualLoss(autoencoder, quantile=0.1, widening=0.0, dilation=1, erosion=1)
    _, found = lpl.evaluate(z0_hat, z0, diagnose=True)
    assert found is not None
    maps = dict(zip(autoencoder.feature_names, autoencoder.features(z0_hat.detach()), strict=True))
    for name in ("up_1", "up_2", "up_3"):
        expected = 1 - inlier_mask(maps[name], 0.1, 0.0, 1, 1).mean()
        assert 0.1 < expected < 0.4
        torch.testing.assert_close(found.scalars()[f"lpl_masked/{name}"], expected)
    assert found.scalars()["lpl_masked/mid"] == 0


def test_variance_ratio_tells_inflation(autoencoder: Autoencoder) -> None:
    """On the decoder's output with a decoder that is linear, twice the latent is four times the variance."""
    from torch import nn

    linear = nn.Conv2d(4, 3, 1, bias=False)
    lpl = LatentPerceptualLoss(Autoencoder(nn.Sequential(linear), feature_modules=["0"]))
    _, z0 = pair()
    for factor in (0.5, 1.0, 2.0):
        _, found = lpl.evaluate(factor * z0, z0, diagnose=True)
        assert found is not None
        assert found.scalars()["lpl_variance_ratio/0"].item() == pytest.approx(factor**2, rel=1e-4)


def test_loss_by_noise_level(autoencoder: Autoencoder) -> None:
    """Four equal parts of a flow's way to tau; not a number where there was no sample."""
    lpl = LatentPerceptualLoss(autoencoder, threshold=Threshold(flow_t=0.8), reference_side=0)
    z0_hat, z0 = pair(5)
    t = torch.tensor([0.1, 0.19, 0.5, 0.79, 0.9])
    losses, found = lpl.evaluate(z0_hat, z0, t / (1 - t), diagnose=True)
    assert found is not None
    scalars = found.scalars()
    torch.testing.assert_close(scalars["lpl_noise/1"], losses[:2].detach().mean())
    assert math.isnan(scalars["lpl_noise/2"].item())
    torch.testing.assert_close(scalars["lpl_noise/3"], losses[2].detach())
    torch.testing.assert_close(scalars["lpl_noise/4"], losses[3].detach())
    nothing, none = lpl.evaluate(z0_hat, z0, torch.full((5,), 99.0), diagnose=True)
    assert none is None
    assert nothing.tolist() == [0.0] * 5


def test_samples_decoded_though_they_had_not_passed_count_for_nothing(autoencoder: Autoencoder) -> None:
    """As where shapes are static and ratios lie on an accelerator."""
    z0_hat, z0 = pair(4)
    nsr = torch.tensor([0.1, 99.0, 0.2, 99.0])
    lpl = LatentPerceptualLoss(autoencoder)
    _, expected = lpl.evaluate(z0_hat, z0, nsr, diagnose=True)
    _, of_all = lpl.evaluate(z0_hat, z0, diagnose=True)
    assert expected is not None
    assert of_all is not None
    assert expected.relative_time is not None
    time = torch.zeros(4)
    time[nsr < 1] = expected.relative_time
    parts, finite = of_all.parts.clone(), torch.ones(4, dtype=torch.bool)
    parts[:, 1], finite[3] = math.nan, False
    found = dataclasses.replace(of_all, parts=parts, finite=finite, passed=nsr < 1, relative_time=time)
    for name, value in expected.scalars().items():
        torch.testing.assert_close(found.scalars()[name], value, equal_nan=True)


def test_samples_left_out_as_not_finite_are_counted_and_spoil_nothing(autoencoder: Autoencoder) -> None:
    z0_hat, z0 = pair(4)
    broken = z0_hat.detach().clone()
    broken[1] = math.nan
    lpl = LatentPerceptualLoss(autoencoder, nonfinite="zero")
    _, found = lpl.evaluate(broken, z0, torch.tensor([0.1, 0.1, 0.2, 0.2]), diagnose=True)
    rest = torch.tensor([0, 2, 3])
    _, without = lpl.evaluate(broken[rest], z0[rest], torch.tensor([0.1, 0.2, 0.2]), diagnose=True)
    assert found is not None
    assert without is not None
    assert found.scalars()["lpl_nonfinite"] == 0.25
    assert without.scalars()["lpl_nonfinite"] == 0
    for name, value in without.scalars().items():
        if name != "lpl_nonfinite" and "masked" not in name:
            torch.testing.assert_close(found.scalars()[name], value, equal_nan=True)
