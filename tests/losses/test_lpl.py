from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from conftest import tiny_kl, tiny_taesd
from test_outliers import naive_mask
from torch import Tensor

from lpl_lightning import Autoencoder, LatentPerceptualLoss
from lpl_lightning.losses.lpl import DepthWeights, Statistics, depth_weight


def naive_loss(
    autoencoder: Autoencoder,
    z0_hat: Tensor,
    z0: Tensor,
    depth: int,
    statistics: str,
    weights: str,
    mask: bool,
    eps: float,
) -> Tensor:
    """Eq. 3 written out: loops over samples, maps and channels."""
    losses = []
    for estimate, clean in zip(z0_hat, z0, strict=True):
        phis_hat = autoencoder.features(estimate[None], depth)
        phis = autoencoder.features(clean[None], depth)
        first = phis[0].shape[-1]
        total = torch.zeros((), dtype=z0.dtype)
        for phi_hat, phi in zip(phis_hat, phis, strict=True):
            ratio = phi.shape[-1] // first
            omega = {"inverse_upscale": 1 / ratio, "exponential": 2**-ratio, "uniform": 1.0}[weights]
            inliers = torch.ones_like(phi)
            if mask and ratio > 2:
                # Kernels 3 and 5 on a map of the image's side, which is 8 times the latent's; half that on one of half.
                kernels = {4: (1, 3), 8: (3, 5)}[ratio]
                inliers = naive_mask(phi_hat.detach(), 0.02, 2.0, *kernels)
                assert 0.5 < inliers.mean() < 1, "there is something to mask"
            channels = phi.shape[1]
            of_map = torch.zeros((), dtype=z0.dtype)
            for c in range(channels):
                a, b, rho = phi_hat[0, c], phi[0, c], inliers[0, c]
                mean_a, mean_b = a.sum() / a.numel(), b.sum() / b.numel()
                std_a = (((a - mean_a) ** 2).sum() / a.numel() + eps).sqrt()
                std_b = (((b - mean_b) ** 2).sum() / b.numel() + eps).sqrt()
                if statistics == "predicted_detached":
                    mean_a, std_a = mean_a.detach(), std_a.detach()
                one = torch.ones(())
                moments: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {
                    "predicted": (mean_a, std_a, mean_a, std_a),
                    "predicted_detached": (mean_a, std_a, mean_a, std_a),
                    "target": (mean_b, std_b, mean_b, std_b),
                    "separate": (mean_a, std_a, mean_b, std_b),
                    "none": (0 * one, one, 0 * one, one),
                }
                ma, sa, mb, sb = moments[statistics]
                difference = (b - mb) / sb - (a - ma) / sa
                of_map = of_map + (rho * difference**2).sum() / rho.sum()
            total = total + omega * of_map / channels
        losses.append(total)
    return torch.stack(losses)


CASES: list[dict[str, Any]] = [
    *({"statistics": s} for s in get_args(Statistics)),
    *({"depth_weights": w} for w in get_args(DepthWeights)),
    {"mask_outliers": False},
    {"depth": 1},
    {"depth": 2},
    {"depth": 3},
    {"depth": 4},
]


@pytest.fixture(scope="module")
def double() -> Autoencoder:
    """A decoder in float64, small enough for loops in Python."""
    torch.manual_seed(1)
    model: Any = tiny_kl(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
    ).double()

    def plant(side: int) -> Any:
        """Outliers as trained decoders have them, ``side`` positions wide."""

        def hook(_module: object, _inputs: object, features: Tensor) -> Tensor:
            spikes = torch.zeros_like(features)
            spikes[:, ::2, 1 : 1 + side, 2 : 2 + side] = 60.0
            return features + spikes

        return hook

    for block, side in zip(model.decoder.up_blocks, (1, 1, 4, 4), strict=True):
        block.register_forward_hook(plant(side))
    return Autoencoder(model)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_value_and_gradient_equal_eq_3_written_out(double: Autoencoder, options: dict[str, Any]) -> None:
    z0 = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    z0_hat = (z0 + 0.5 * torch.randn_like(z0)).requires_grad_()
    settings: dict[str, Any] = {
        "depth": 4,
        "statistics": "predicted",
        "depth_weights": "inverse_upscale",
        "mask_outliers": True,
    }
    settings |= options
    loss = LatentPerceptualLoss(double, **settings)(z0_hat, z0)
    (gradient,) = torch.autograd.grad(loss.sum(), z0_hat)
    expected = naive_loss(
        double,
        z0_hat,
        z0,
        settings["depth"],
        settings["statistics"],
        settings["depth_weights"],
        settings["mask_outliers"],
        eps=1e-5,
    )
    (expected_gradient,) = torch.autograd.grad(expected.sum(), z0_hat)
    # The loss is summed in float32 by contract.
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


@pytest.fixture
def lpl(autoencoder: Autoencoder) -> LatentPerceptualLoss:
    return LatentPerceptualLoss(autoencoder, threshold=3.0)


def pair(batch: int = 4) -> tuple[Tensor, Tensor]:
    z0 = torch.randn(batch, 4, 4, 4)
    return (z0 + 0.3 * torch.randn_like(z0)).requires_grad_(), z0


def test_gated_samples_are_zero_and_the_others_as_without_a_gate(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair()
    nsr = torch.tensor([0.1, 3.0, 3.001, math.inf])
    gated, free = lpl(z0_hat, z0, nsr), lpl(z0_hat, z0)
    torch.testing.assert_close(gated[:2], free[:2])
    assert gated[2:].tolist() == [0.0, 0.0]
    gated.mean().backward()
    assert z0_hat.grad is not None
    assert z0_hat.grad[2:].abs().sum() == 0
    assert z0_hat.grad[:2].abs().sum() > 0


def test_nothing_past_the_gate_costs_no_decoding_and_stays_connected(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair()
    ran: list[int] = []
    decoder: Any = lpl.autoencoder.model.decoder
    decoder.conv_in.register_forward_hook(lambda _m, inputs, _o: ran.append(len(inputs[0])))
    loss = lpl(z0_hat, z0, torch.full((4,), 9.0))
    loss.sum().backward()
    assert ran == []
    assert loss.tolist() == [0.0] * 4
    assert z0_hat.grad is not None
    assert z0_hat.grad.abs().sum() == 0
    lpl(z0_hat, z0, torch.tensor([9.0, 1.0, 9.0, 9.0]))
    assert ran == [1, 1]


def test_a_gated_estimate_that_is_not_finite_harms_nothing(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair()
    broken = z0_hat.detach().clone()
    broken[3] = math.inf
    broken.requires_grad_()
    lpl(broken, z0, torch.tensor([1.0, 1.0, 1.0, 9.0])).mean().backward()
    assert broken.grad is not None
    assert torch.isfinite(broken.grad).all()


def test_the_result_is_float32_whatever_comes(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair()
    nsr = torch.tensor([1.0, 9.0, 1.0, 1.0])
    half = lpl(z0_hat.bfloat16(), z0.bfloat16(), nsr)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, lpl(z0_hat, z0, nsr), rtol=0.1, atol=0.01)


def test_samples_do_not_depend_on_their_batch(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair()
    together = lpl(z0_hat, z0)
    alone = torch.cat([lpl(z0_hat[i : i + 1], z0[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(lpl(z0_hat[order], z0[order]), together[order], rtol=1e-4, atol=1e-6)


def test_zero_at_the_clean_latent_and_nowhere_near(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair()
    assert lpl(z0, z0).max() < 1e-10
    assert lpl(z0_hat, z0).min() > 1e-4


def test_no_gradient_flows_to_the_clean_latent_or_the_decoder(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair()
    z0.requires_grad_()
    lpl(z0_hat, z0).sum().backward()
    assert z0.grad is None
    assert all(p.grad is None for p in lpl.parameters())


def test_adding_a_constant_to_a_channel_of_both_maps_changes_nothing() -> None:
    """Standardization takes the mean away; shown on the features themselves."""
    from lpl_lightning.losses.lpl import masked_distance, standardize

    predicted, target = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    shift = torch.randn(1, 3, 1, 1) * 5
    plain = masked_distance(*standardize(predicted, target))
    torch.testing.assert_close(masked_distance(*standardize(predicted + shift, target + shift)), plain)


def test_a_constant_channel_and_an_empty_mask_are_finite() -> None:
    from lpl_lightning.losses.lpl import masked_distance, standardize

    predicted = torch.zeros(1, 2, 4, 4, requires_grad=True)
    a, b = standardize(predicted, torch.zeros(1, 2, 4, 4))
    loss = masked_distance(a, b, torch.zeros(1, 2, 4, 4))
    loss.sum().backward()
    assert loss.item() == 0
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()


def test_depth_weights_as_the_paper_has_them() -> None:
    assert [depth_weight(r) for r in (1, 2, 4, 8)] == [1, 0.5, 0.25, 0.125]
    assert [depth_weight(r, "exponential") for r in (1, 2, 4)] == [0.5, 0.25, 0.0625]
    assert depth_weight(8, "uniform") == 1


def test_every_family_of_decoder() -> None:
    for model in (tiny_kl(), tiny_taesd()):
        lpl = LatentPerceptualLoss(Autoencoder(model))
        z0_hat, z0 = pair()
        loss = lpl(z0_hat, z0)
        loss.sum().backward()
        assert loss.shape == (4,)
        assert z0_hat.grad is not None
        assert torch.isfinite(z0_hat.grad).all()


def test_bad_input_is_named(autoencoder: Autoencoder, lpl: LatentPerceptualLoss) -> None:
    z = torch.randn(2, 4, 4, 4)
    with pytest.raises(ValueError, match=r"`z0_hat` and `z0` must both be"):
        lpl(z, z[:1])
    with pytest.raises(ValueError, match="one ratio for each of the 2 samples"):
        lpl(z, z, torch.zeros(3))
    bad: list[tuple[dict[str, Any], str]] = [
        ({"depth": 0}, "`depth` must be 1 or more"),
        ({"threshold": 0.0}, "`threshold` must be a noise-to-signal ratio above 0"),
        ({"dilation": 2}, "`dilation` must be an odd number"),
        ({"statistics": "mean"}, "`statistics` must be one of predicted, .* got 'mean'"),
        ({"depth_weights": "linear"}, "`depth_weights` must be one of inverse_upscale, .* got 'linear'"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            LatentPerceptualLoss(autoencoder, **options)


def test_gradient_descent_on_it_restores_the_decoders_view() -> None:
    """A latent pulled by LPL alone decodes ever closer to the clean latent's image."""
    torch.manual_seed(0)
    autoencoder = Autoencoder("embedded:autoencoder_shapes")
    lpl = LatentPerceptualLoss(autoencoder)
    z0 = torch.randn(2, 4, 8, 8) * 0.7
    z = (z0 + 0.4 * torch.randn_like(z0)).requires_grad_()
    image = autoencoder.decode(z0)
    optimizer = torch.optim.Adam([z], lr=0.02)
    errors = []
    for _ in range(30):
        errors.append((autoencoder.decode(z).detach() - image).square().mean().item())
        optimizer.zero_grad()
        lpl(z, z0).mean().backward()
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0]
