from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import tiny_kl, tiny_taesd
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive import naive_loss
from test_outliers import naive_mask
from torch import Tensor, nn
from torch.autograd import gradcheck

from lpl_lightning import Autoencoder, LatentPerceptualLoss
from lpl_lightning.execution import Execution
from lpl_lightning.losses import Threshold
from lpl_lightning.losses.checks import normalizes
from lpl_lightning.losses.distance import DepthWeights, Distance, Normalization, Statistics
from lpl_lightning.losses.options import PRESETS, LossOptions

SIDE = 4
KERNELS = {4: (1, 3), 8: (3, 5)}
"""On latents of the reference side and an f = 8 decoder: 3 and 5 on the finest map, half that on one half as fine."""


@pytest.fixture(scope="module")
def double() -> Autoencoder:
    """A decoder in float64, f = 8, small enough for loops in Python, with outliers as trained ones have them."""
    torch.manual_seed(1)
    model: Any = tiny_kl(
        block_out_channels=(2, 2, 2, 2),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=1,
        scaling_factor=0.7,
        shift_factor=0.2,
    ).double()

    def plant(side: int) -> Any:
        def hook(_module: object, _inputs: object, features: Tensor) -> Tensor:
            spikes = torch.zeros_like(features)
            spikes[:, ::2, 1 : 1 + side, 2 : 2 + side] = 60.0
            return features + spikes

        return hook

    for block, side in zip(model.decoder.up_blocks, (1, 1, 4, 4), strict=True):
        block.register_forward_hook(plant(side))
    return Autoencoder(model)


def pair(batch: int = 2, dtype: torch.dtype = torch.float64, side: int = SIDE) -> tuple[Tensor, Tensor]:
    z0 = torch.randn(batch, 4, side, side, dtype=dtype)
    return (z0 + 0.5 * torch.randn_like(z0)).requires_grad_(), z0


CASES: list[dict[str, Any]] = [
    {},
    *({"statistics": s} for s in get_args(Statistics) if s != "predicted"),
    *({"normalization": "channel_norm", "statistics": s, "eps": 0.1} for s in get_args(Statistics)),
    *({"depth_weights": w} for w in get_args(DepthWeights)[1:]),
    {"depth_weights": [0.3, 0.0, 2.0, 1.0, 0.5]},
    *({"distance": d, "huber_delta": 0.6} for d in get_args(Distance)[1:]),
    {"mask_outliers": False},
    {"mask_source": "target"},
    {"mask_upscale": 4.0},
    {"quantile": 0.2, "widening": 0.5},
    {"mask_before_normalization": True, "mask_source": "target"},
    {"position_reduction": "sum"},
    {"depth_reduction": "mean"},
    {"eps": 0.5},
    {"relative_eps": 0.2},
    {"relative_eps": 0.2, "statistics": "separate"},
]
DEPTHS: list[int | list[str]] = [1, 2, 3, 4, 5, ["up_2"], ["mid", "up_3"], ["up_1", "image"]]


def compare(
    autoencoder: Autoencoder,
    depth: int | Sequence[str],
    options: dict[str, Any],
    shape: tuple[int, int, int] = (1, SIDE, SIDE),
) -> None:
    """Value and gradient against the loops, which take seconds a sample."""
    batch, *sides = shape
    z0 = torch.randn(batch, 4, *sides, dtype=torch.float64)
    z0_hat = (z0 + 0.5 * torch.randn_like(z0)).requires_grad_()
    given = {"reference_side": SIDE, "depth": depth} | options
    loss = LatentPerceptualLoss(autoencoder, **given)(z0_hat, z0)
    (gradient,) = torch.autograd.grad(loss.sum(), z0_hat)
    names = autoencoder.feature_names[:depth] if isinstance(depth, int) else depth
    predictions, targets = (autoencoder.features(z, list(names)) for z in (z0_hat, z0))
    naive = naive_loss(predictions, targets, sides[-1], kernels=KERNELS, **options)
    (naive_gradient,) = torch.autograd.grad(naive.sum(), z0_hat)
    torch.testing.assert_close(loss, naive.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, naive_gradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_value_and_gradient_equal_eq_3_written_out(double: Autoencoder, options: dict[str, Any]) -> None:
    finest = not options or any("mask" in name or name in ("quantile", "widening") for name in options)
    compare(double, 5 if "depth_weights" in options else 4 if finest else 3, options, (1 if options else 2, SIDE, SIDE))


@pytest.mark.parametrize("depth", DEPTHS, ids=str)
def test_any_depth_and_any_stages_equal_eq_3_written_out(double: Autoencoder, depth: int | list[str]) -> None:
    compare(double, depth, {})


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_combination_of_options_equals_eq_3_written_out(double: Autoencoder, data: st.DataObject) -> None:
    options = {
        "normalization": data.draw(st.sampled_from(get_args(Normalization))),
        "statistics": data.draw(st.sampled_from(get_args(Statistics))),
        "eps": data.draw(st.sampled_from([1e-3, 0.3])),
        "distance": data.draw(st.sampled_from(get_args(Distance))),
        "depth_weights": data.draw(st.sampled_from(get_args(DepthWeights))),
        "mask_outliers": data.draw(st.booleans()),
        "mask_source": data.draw(st.sampled_from(["predicted", "target"])),
        "mask_before_normalization": data.draw(st.booleans()),
        "position_reduction": data.draw(st.sampled_from(["mean", "sum"])),
        "depth_reduction": data.draw(st.sampled_from(["mean", "sum"])),
    }
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    if shape[1:] != (SIDE, SIDE):
        options["mask_outliers"] = False  # its windows scale with the side: a test of their own
    torch.manual_seed(data.draw(st.integers(0, 100)))
    compare(double, data.draw(st.integers(1, 3)), options, shape)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_whole_losss_gradient_is_that_of_finite_differences(double: Autoencoder, preset: Any) -> None:
    lpl = LatentPerceptualLoss(double, preset=preset, mask_outliers=False)
    z0_hat, z0 = pair(side=2)
    assert gradcheck(lambda z: lpl(z, z0), (z0_hat,))


def test_every_option_of_a_preset_can_be_set_from_python(autoencoder: Autoencoder) -> None:
    """The signature has each option, and one that is given reaches it."""
    import inspect

    names = set(inspect.signature(LatentPerceptualLoss.__init__).parameters) - {
        "self",
        "autoencoder",
        "preset",
        "execution",
        "subset",
    }
    assert names == set(LossOptions.__dataclass_fields__)
    for preset in PRESETS:
        lpl = LatentPerceptualLoss(autoencoder, preset=preset, quantile=0.11, depth=2, threshold=Threshold(flow_t=0.5))
        assert lpl.options.quantile == 0.11
        assert lpl.compared == ("mid", "up_0")
        assert lpl.tau(torch.zeros(1, 4, 32, 32)) == 1.0
        assert lpl.options.mask_source == PRESETS[preset]["mask_source"]


@pytest.fixture
def lpl(autoencoder: Autoencoder) -> LatentPerceptualLoss:
    return LatentPerceptualLoss(autoencoder, threshold=3.0, reference_side=0)


def test_gated_samples_are_zero_and_the_others_as_without_a_gate(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair(4, torch.float32)
    nsr = torch.tensor([0.1, 3.0, 3.001, math.inf])
    gated, free = lpl(z0_hat, z0, nsr), lpl(z0_hat, z0)
    torch.testing.assert_close(gated[:2], free[:2])
    assert gated[2:].tolist() == [0.0, 0.0]
    gated.mean().backward()
    assert z0_hat.grad is not None
    assert z0_hat.grad[2:].abs().sum() == 0
    assert z0_hat.grad[:2].abs().sum() > 0


def test_a_smooth_gate_weighs_samples(autoencoder: Autoencoder) -> None:
    z0_hat, z0 = pair(4, torch.float32)
    lpl = LatentPerceptualLoss(autoencoder, threshold=3.0, reference_side=0, gate_softness=2.0)
    weighed, free = lpl(z0_hat, z0, torch.tensor([1.0, 3.0, 5.9, 6.0])), lpl(z0_hat, z0)
    torch.testing.assert_close(weighed[:2], free[:2] * torch.tensor([1.0, 0.5]))
    assert 0 < weighed[2] < 0.1 * free[2]
    assert weighed[3] == 0


@pytest.mark.parametrize(("side", "tau"), [(4, 0.375), (8, 0.75), (32, 3.0), (64, 6.0)])
def test_the_threshold_is_scaled_with_the_latents_side(autoencoder: Autoencoder, side: int, tau: float) -> None:
    """The paper: tau = 3 for 256 px, twice that at twice the resolution."""
    lpl = LatentPerceptualLoss(autoencoder)
    z = torch.zeros(2, 4, side, side)
    assert lpl.tau(z) == pytest.approx(tau)
    nsr = torch.tensor([0.999 * tau, 1.001 * tau])
    assert lpl.passes(nsr, z).tolist() == [True, False]
    assert LatentPerceptualLoss(autoencoder, reference_side=0).tau(z) == 3.0
    if side <= 8:
        z0_hat, z0 = pair(2, torch.float32, side)
        assert lpl(z0_hat, z0, nsr).ne(0).tolist() == [True, False]


@pytest.mark.parametrize(
    ("side", "reference", "windows"),
    [
        (4, 4, {"up_1": (1, 3), "up_2": (3, 5), "up_3": (3, 5)}),
        (8, 4, {"up_1": (3, 5), "up_2": (5, 9), "up_3": (5, 9)}),
        (4, 8, {"up_1": (1, 1), "up_2": (1, 3), "up_3": (1, 3)}),
        (4, 0, {"up_1": (1, 3), "up_2": (3, 5), "up_3": (3, 5)}),
        (8, 0, {"up_1": (1, 3), "up_2": (3, 5), "up_3": (3, 5)}),
    ],
    ids=str,
)
def test_windows_cover_the_same_share_of_the_image(
    double: Autoencoder, side: int, reference: int, windows: dict[str, tuple[int, int]]
) -> None:
    """3 and 5 positions of a map 8 times as fine as the reference; 0 counts from the first map, as the public code."""
    options: dict[str, Any] = {"quantile": 0.15, "widening": 0.0, "reference_side": reference}
    for depth in (5, ["up_1", "up_2", "up_3"], ["up_2"]):
        lpl = LatentPerceptualLoss(double, depth=depth, **options)
        z0_hat, z0 = pair(1, side=side)
        _, found = lpl.evaluate(z0_hat, z0, diagnose=True)
        assert found is not None
        for name in set(windows) & set(found.stages):
            features = double.features(z0_hat.detach(), [name])[0]
            expected = naive_mask(features, 0.15, 0.0, *windows[name]).mean().item()
            assert found.inliers[found.stages.index(name)].item() == pytest.approx(expected), (name, windows[name])


def test_windows_by_map(double: Autoencoder) -> None:
    z0_hat, z0 = pair(1)
    options: dict[str, Any] = {"quantile": 0.15, "widening": 0.0}
    lpl = LatentPerceptualLoss(double, dilation=[1, 1, 5, 7, 3], erosion=[1, 1, 3, 3, 1], **options)
    _, found = lpl.evaluate(z0_hat, z0, diagnose=True)
    assert found is not None
    for name, windows in {"up_1": (5, 3), "up_2": (7, 3), "up_3": (3, 1)}.items():
        features = double.features(z0_hat.detach(), [name])[0]
        expected = naive_mask(features, 0.15, 0.0, *windows).mean().item()
        assert found.inliers[found.stages.index(name)].item() == pytest.approx(expected)


def test_the_threshold_in_every_unit_is_logged_once(autoencoder: Autoencoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        lpl = LatentPerceptualLoss(autoencoder)
        for _ in range(2):
            lpl(*pair(1, torch.float32, 8))
    (message,) = [r.message for r in caplog.records if "LPL" in r.message]
    # tau = 3 * 8 / 32.
    for part in ("nsr 0.75", "snr 1.778", "log_snr 0.5754", "flow_t 0.4286", "ddpm_timestep", "0.25 times", "side 32"):
        assert part in message


def test_nothing_past_the_gate_costs_no_decoding_and_stays_connected(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair(4, torch.float32)
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
    # An empty batch and depth 0 likewise.
    assert lpl(z0_hat[:0], z0[:0]).shape == (0,)
    nothing = LatentPerceptualLoss(lpl.autoencoder, depth=0)(z0_hat, z0)
    assert nothing.tolist() == [0.0] * 4
    assert nothing.requires_grad


def test_it_runs_no_deeper_than_asked(lpl: LatentPerceptualLoss) -> None:
    ran: list[str] = []
    decoder: Any = lpl.autoencoder.model.decoder
    for i, block in enumerate(decoder.up_blocks):
        block.register_forward_hook(lambda _m, _i, _o, i=i: ran.append(f"up_{i}"))
    LatentPerceptualLoss(lpl.autoencoder, depth=["up_0"])(*pair(1, torch.float32))
    assert ran == ["up_0"] * 2


def test_a_gated_estimate_that_is_not_finite_harms_nothing(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair(4, torch.float32)
    broken = z0_hat.detach().clone()
    broken[3] = math.inf
    broken.requires_grad_()
    lpl(broken, z0, torch.tensor([1.0, 1.0, 1.0, 9.0])).mean().backward()
    assert broken.grad is not None
    assert torch.isfinite(broken.grad).all()


def test_half_precision_latents_give_a_float32_loss(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair(4, torch.float32)
    nsr = torch.tensor([1.0, 9.0, 1.0, 1.0])
    half = lpl(z0_hat.bfloat16(), z0.bfloat16(), nsr)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, lpl(z0_hat, z0, nsr), rtol=0.2, atol=0.02)


def test_autocast_changes_nothing(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under = lpl(z0_hat, z0)
    torch.testing.assert_close(under, lpl(z0_hat, z0), rtol=0, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_samples_do_not_depend_on_their_batch(double: Autoencoder, preset: Any) -> None:
    lpl = LatentPerceptualLoss(double, preset=preset)
    z0_hat, z0 = pair(4)
    nsr = torch.tensor([0.1, 9.0, 0.2, 0.1], dtype=torch.float64)
    together = lpl(z0_hat, z0, nsr)
    alone = torch.cat([lpl(z0_hat[i : i + 1], z0[i : i + 1], nsr[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(lpl(z0_hat[order], z0[order], nsr[order]), together[order], rtol=1e-9, atol=1e-12)


def test_reductions(autoencoder: Autoencoder) -> None:
    z0_hat, z0 = pair(4, torch.float32)
    nsr = torch.tensor([0.1, 9.0, 0.2, 9.0])
    each = LatentPerceptualLoss(autoencoder)(z0_hat, z0, nsr)
    for reduction, expected in (("mean", each.sum() / 4), ("sum", each.sum()), ("mean_passed", each.sum() / 2)):
        lpl = LatentPerceptualLoss(autoencoder, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(lpl(z0_hat, z0, nsr), expected)
        assert lpl(z0_hat[:0], z0[:0], nsr[:0]) == 0


def test_zero_at_the_clean_latent_and_nowhere_near(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair(4, torch.float32)
    assert lpl(z0, z0).max() < 1e-10
    assert lpl(z0_hat, z0).min() > 1e-4


def test_no_gradient_flows_to_the_clean_latent_or_the_decoder(lpl: LatentPerceptualLoss) -> None:
    z0_hat, z0 = pair(2, torch.float32)
    z0.requires_grad_()
    lpl(z0_hat, z0).sum().backward()
    assert z0.grad is None
    assert all(p.grad is None for p in lpl.parameters())


@pytest.mark.parametrize("statistics", get_args(Statistics))
@pytest.mark.parametrize("normalization", get_args(Normalization))
def test_dead_decoders_and_latents_of_one_position_are_finite(normalization: Any, statistics: Any) -> None:
    """Constant channels in every map, and maps of one position."""
    dead: Any = tiny_kl()
    for parameter in dead.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    for model, side in ((dead, 4), (tiny_kl(), 1), (tiny_taesd(), 1)):
        lpl = LatentPerceptualLoss(Autoencoder(model), normalization=normalization, statistics=statistics)
        z0_hat, z0 = pair(1, torch.float32, side)
        loss = lpl(z0_hat, z0)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert z0_hat.grad is not None
        assert torch.isfinite(z0_hat.grad).all()


def test_every_family_of_decoder() -> None:
    for model in (tiny_kl(), tiny_taesd()):
        lpl = LatentPerceptualLoss(Autoencoder(model))
        z0_hat, z0 = pair(4, torch.float32)
        loss = lpl(z0_hat, z0)
        loss.sum().backward()
        assert loss.shape == (4,)
        assert z0_hat.grad is not None
        assert torch.isfinite(z0_hat.grad).all()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_latents_of_two_precisions(lower: torch.dtype, streamed: bool, autoencoder: Autoencoder) -> None:
    """As loops in mixed precision have them: nothing is rounded that was not."""
    lpl = LatentPerceptualLoss(autoencoder, execution=Execution(streamed=streamed))
    z0_hat, z0 = pair(2, torch.float32)
    z0 = z0.to(lower)
    loss = lpl(z0_hat, z0)
    loss.sum().backward()
    assert z0_hat.grad is not None
    gradient, z0_hat.grad = z0_hat.grad, None
    exact = lpl(z0_hat, z0.float())
    exact.sum().backward()
    torch.testing.assert_close(loss, exact, rtol=0.0, atol=0.0)
    torch.testing.assert_close(gradient, z0_hat.grad, rtol=0.0, atol=0.0)
    estimate = z0_hat.detach().to(lower).requires_grad_()
    lpl(estimate, z0_hat.detach()).sum().backward()
    assert estimate.grad is not None
    assert estimate.grad.dtype == lower


def test_bad_input_is_named(autoencoder: Autoencoder, lpl: LatentPerceptualLoss) -> None:
    z = torch.randn(2, 4, 4, 4)
    calls: list[tuple[tuple[Any, ...], str]] = [
        ((z, z[:1]), r"`z0_hat` and `z0` must both be .* got \(2, 4, 4, 4\) and \(1, 4, 4, 4\)"),
        ((z[0, 0], z[0, 0]), "must both be"),
        ((z.to("meta"), z), r"same device, got meta and cpu. Move .* z0.to\(z0_hat.device\)"),
        ((z.long(), z), "`z0_hat` must be of floating point, got torch.int64"),
        ((z, z.long()), "`z0` must be of floating point, got torch.int64"),
        ((z, z, torch.zeros(3)), "one ratio for each of the 2 samples"),
        ((z, z, 1.0), "`noise_to_signal` must be a tensor, got float"),
        ((z, z, torch.tensor([1.0, -2.2])), "must be sigma / alpha, 0 or more, got -2.2. .* logarithm"),
        ((z[:, :3], z[:, :3]), "4"),
    ]
    for arguments, message in calls:
        with pytest.raises(ValueError, match=message):
            lpl(*arguments)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"preset": "sdxl"}, "`preset` must be one of paper, diffusers, rgb, got 'sdxl'"),
        ({"depth": -1}, "`depth` must be 0 or more"),
        ({"depth": ["up_0", "up_9"]}, r"`depth` must name stages among \['mid', 'up_0', .*'image'\], got \['up_9'\]"),
        ({"depth": ["up_0", "up_0"]}, "must name each stage once"),
        ({"depth": []}, "must name each stage once"),
        ({"depth": True}, "`depth` must be a whole number or names of stages, got True"),
        ({"depth": 2.5}, "`depth` must be a whole number or names of stages, got 2.5"),
        ({"threshold": {"snr": 0.1, "nsr": 3.0}}, "exactly one of the units"),
        ({"threshold": "3"}, "`threshold` must be a noise-to-signal ratio or one of nsr, snr"),
        ({"depth_weights": ["a"] * 4}, "must hold numbers of 0 or more"),
        ({"depth_weights": [math.nan] * 4}, "must hold numbers of 0 or more"),
        ({"eps": math.nan}, "`eps` must be a finite number, got nan"),
        ({"mask_outliers": "no"}, "`mask_outliers` must be true or false, got 'no'"),
        ({"threshold": 0.0}, "`threshold` in nsr must be a noise-to-signal ratio above 0"),
        ({"dilation": 2}, "`dilation` must be an odd number"),
        ({"erosion": [3.0] * 4}, "`erosion` must be an odd number"),
        ({"erosion": True}, "`erosion` must be an odd number"),
        (
            {"erosion": [1, 3]},
            "`erosion` as a list must have an entry for each compared feature map: expected 4, got 2",
        ),
        ({"depth_weights": [1.0]}, "`depth_weights` as a list .* expected 4, got 1"),
        ({"statistics": "mean"}, "`statistics` must be one of predicted, .* got 'mean'"),
        ({"depth_weights": "linear"}, "`depth_weights` must be one of inverse_upscale, .* got 'linear'"),
        ({"distance": "cosine"}, "`distance` must be one of mse, l1, huber, got 'cosine'"),
        ({"quantile": 0.5}, "`quantile` must lie from 0 to below 0.5"),
        ({"gate_softness": 0.5}, "`gate_softness` must be 1 or more"),
        ({"huber_delta": 0.0}, "`huber_delta` must be above 0"),
        ({"nonfinite": "ignore"}, "`nonfinite` must be one of raise, skip, zero"),
        ({"eps": -1.0}, "`eps` must be 0 or more"),
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


def test_the_public_examples_missing_convolution(autoencoder: Autoencoder) -> None:
    """Its decoder takes the latent without post_quant_conv: as if that were the identity."""
    z0_hat, z0 = pair(2, torch.float32)
    left_out = LatentPerceptualLoss(autoencoder, preset="diffusers")(z0_hat, z0)
    kept = LatentPerceptualLoss(autoencoder, preset="diffusers", post_quant_conv=True)(z0_hat, z0)
    assert not torch.allclose(left_out, kept)
    conv: Any = autoencoder.model.post_quant_conv
    torch.nn.init.dirac_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    torch.testing.assert_close(
        LatentPerceptualLoss(autoencoder)(z0_hat, z0),
        LatentPerceptualLoss(autoencoder, post_quant_conv=False)(z0_hat, z0),
    )
    identity = LatentPerceptualLoss(autoencoder, preset="diffusers", post_quant_conv=True)(z0_hat, z0)
    torch.testing.assert_close(identity, left_out)


@pytest.mark.parametrize("name", FAMILIES)
def test_on_every_family_of_autoencoders(name: str) -> None:
    """Images, token maps and video: the loss of one map by torch's own norms, and a gradient for every sample."""
    family = FAMILIES[name]
    autoencoder = Autoencoder(family.model())
    z0 = torch.randn(2, *family.z[1:])
    z0_hat = (z0 + 0.3 * torch.randn_like(z0)).requires_grad_()
    for stage in (autoencoder.feature_names[0], autoencoder.feature_names[-1]):
        lpl = LatentPerceptualLoss(
            autoencoder, depth=[stage], statistics="separate", mask_outliers=False, relative_eps=0.0
        )
        a, b = (autoencoder.features(z, [stage])[0] for z in (z0_hat.detach(), z0))
        first = autoencoder.features(z0, 1)[0]
        difference = torch.nn.functional.instance_norm(a) - torch.nn.functional.instance_norm(b)
        expected = difference.square().flatten(1).mean(dim=1) * first.shape[-1] / a.shape[-1]
        torch.testing.assert_close(lpl(z0_hat, z0).detach(), expected, rtol=1e-4, atol=1e-6)
    loss = LatentPerceptualLoss(autoencoder)(z0_hat, z0)
    loss.sum().backward()
    assert (loss > 0).all()
    assert z0_hat.grad is not None
    assert torch.isfinite(z0_hat.grad).all()
    assert (z0_hat.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_on_a_decoder_of_volumes() -> None:
    """MONAI's autoencoder of 3D volumes, by the names of its modules, with its outlier mask in 3D."""
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.AutoencoderKL(
        spatial_dims=3,
        channels=(4, 4, 8),
        latent_channels=3,
        norm_num_groups=2,
        num_res_blocks=1,
        attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).double()
    names = [f"decoder.blocks.{i}" for i in range(len(model.decoder.blocks) - 2)]
    autoencoder = Autoencoder(model, feature_modules=names)
    z0 = torch.randn(1, 3, 3, 3, 3, dtype=torch.float64)
    z0_hat = (z0 + 0.3 * torch.randn_like(z0)).requires_grad_()
    shapes = [f.shape[-1] for f in autoencoder.features(z0)]
    assert shapes[0] == 3
    assert shapes[-1] == 12
    compared = [names[0], names[-1]]
    options: dict[str, Any] = {"depth": compared, "reference_side": 3, "quantile": 0.2, "widening": 0.0}
    loss = LatentPerceptualLoss(autoencoder, **options)(z0_hat, z0)
    maps = [autoencoder.features(z, compared) for z in (z0_hat, z0)]
    with torch.no_grad():
        mask = naive_mask(maps[0][1], 0.2, 0.0, 1, 3)
        assert 0 < mask.mean() < 1
    expected = torch.zeros(1, dtype=torch.float64)
    for a, b, rho, omega in (
        (maps[0][0], maps[1][0], torch.ones_like(maps[0][0]), 1.0),
        (maps[0][1], maps[1][1], mask, 0.25),
    ):
        mean, std = (
            a.mean(dim=(2, 3, 4), keepdim=True),
            (a.var(dim=(2, 3, 4), correction=0, keepdim=True) + 1e-5).sqrt(),
        )
        squares = ((a - mean) / std - (b - mean) / std).square() * rho
        expected = expected + omega * (squares.sum(dim=(2, 3, 4)) / rho.sum(dim=(2, 3, 4))).mean(dim=1)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert z0_hat.grad is not None
    assert torch.isfinite(z0_hat.grad).all()


def test_a_decoder_in_bfloat16_gives_nearly_the_same_in_float32() -> None:
    torch.manual_seed(2)
    model: Any = tiny_kl()
    z0_hat, z0 = pair(4, torch.float32)
    exact = LatentPerceptualLoss(Autoencoder(model))(z0_hat, z0)
    half = LatentPerceptualLoss(Autoencoder(model, dtype="bfloat16"))(z0_hat, z0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.01)
    half.sum().backward()
    assert z0_hat.grad is not None
    assert torch.isfinite(z0_hat.grad).all()


@pytest.mark.parametrize("name", ["taesd", "taesd3"])
def test_on_real_weights(shared: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """More noise is more loss. Channels that hardly vary, as these decoders have, are remarked on without a floor."""
    autoencoder = Autoencoder(str(shared / "weights" / name))
    ramp = torch.linspace(-0.8, 0.8, 64)
    image = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, torch.sin(9 * ramp).expand(64, 64)])[None]
    z0 = autoencoder.encode(image)
    noise = torch.randn_like(z0)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        plain = LatentPerceptualLoss(autoencoder, relative_eps=0.0)
        losses = [plain(z0 + s * noise, z0).item() for s in (0.0, 0.1, 0.3, 1.0)]
    assert losses[0] < 1e-8
    assert losses[1] < losses[2] < losses[3]
    remarked = [record.message.split("'")[2] for record in caplog.records if "hardly vary" in record.message]
    assert remarked
    assert len(remarked) == len(set(remarked)), "once a stage"
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        z0_hat = (z0 + 0.3 * noise).requires_grad_()
        LatentPerceptualLoss(autoencoder)(z0_hat, z0).backward()
    assert "hardly vary" not in caplog.text
    assert "`relative_eps` 0.1" in caplog.text
    assert z0_hat.grad is not None
    assert torch.isfinite(z0_hat.grad).all()


@pytest.mark.parametrize(
    ("options", "said"), [({}, True), ({"preset": "diffusers"}, False), ({"statistics": "none"}, False)]
)
def test_a_floor_is_said_where_variances_have_one(
    options: dict[str, Any], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lpl = LatentPerceptualLoss(Autoencoder(tiny_kl()), relative_eps=0.2, **options)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        lpl.announce(torch.zeros(1, 4, 4, 4))
    assert "LPL compares" in caplog.text
    assert ("Variances have a floor, `relative_eps` 0.2." in caplog.text) == said


def test_variances_have_a_floor_where_the_decoder_has_no_normalization() -> None:
    """By default; and not for what divides by no variance, nor where one says so."""
    tiny = Autoencoder(tiny_taesd())
    z0 = torch.randn(2, 4, 4, 4)
    z0_hat = z0 + 0.3 * torch.randn_like(z0)
    by_default, floor, none = (LatentPerceptualLoss(tiny, relative_eps=value)(z0_hat, z0) for value in (None, 0.1, 0.0))
    torch.testing.assert_close(by_default, floor, rtol=0, atol=0)
    assert (by_default < 0.99 * none).all()
    without: list[dict[str, Any]] = [{"preset": "diffusers"}, {"preset": "rgb"}, {"statistics": "none"}]
    for options in without:
        assert LatentPerceptualLoss(tiny, **options).options.relative_eps == 0
    assert LatentPerceptualLoss(tiny, preset="diffusers", normalization="standardize").options.relative_eps == 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_which_families_have_normalization(name: str) -> None:
    autoencoder = Autoencoder(FAMILIES[name].model())
    assert LatentPerceptualLoss(autoencoder).options.relative_eps == (0.1 if name == "tiny" else 0.0)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.BatchNorm1d(4), True),
        (nn.LayerNorm(5), True),
        (nn.RMSNorm(5), True),
        (nn.ReLU(), False),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1)), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_layers_are_normalization(layer: nn.Module, found: bool) -> None:
    """Anywhere but in the encoder; layers whose weights are normalized are none, nor is what holds others."""

    class NormalDecoder(nn.Sequential):
        pass

    model = NormalDecoder(OrderedDict(first=nn.Conv1d(2, 4, 1), layer=layer, last=nn.Conv1d(4, 1, 1)))
    model.encoder = nn.Identity()
    assert normalizes(model) == found
    model.layer, model.encoder = nn.Identity(), nn.Sequential(layer)
    assert not normalizes(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
@pytest.mark.parametrize("streamed", [True, False])
def test_in_a_step_that_is_compiled(autoencoder: Autoencoder, streamed: bool) -> None:
    """It runs as it is: its control flow, and NumPy's sorting, are not for the compiler."""
    lpl = LatentPerceptualLoss(autoencoder, mask_upscale=1.0, execution=Execution(streamed=streamed))
    z0 = torch.randn(2, 4, SIDE, SIDE)
    z0_hat = (z0 + 0.3 * torch.randn_like(z0)).requires_grad_()

    def step(z: Tensor) -> Tensor:
        losses: Tensor = lpl(2.0 * z, z0)
        return losses.sum() + z.sum()

    found, expected = torch.compile(step, backend="eager")(z0_hat), step(z0_hat)
    torch.testing.assert_close(found, expected)
    of_found, of_expected = (torch.autograd.grad(value, z0_hat) for value in (found, expected))
    torch.testing.assert_close(of_found, of_expected)


def test_a_model_that_is_not_wrapped_yet_is_wrapped() -> None:
    model: Any = tiny_kl()
    z0_hat, z0 = pair(1, torch.float32)
    bare = LatentPerceptualLoss(model)
    torch.testing.assert_close(bare(z0_hat, z0), LatentPerceptualLoss(Autoencoder(model))(z0_hat, z0))
    assert LatentPerceptualLoss(model, depth="up_0").compared == ("up_0",)


def test_the_examples_windows_go_with_the_map_and_not_with_what_else_is_compared(double: Autoencoder) -> None:
    options: dict[str, Any] = {"preset": "diffusers", "mask_outliers": True, "quantile": 0.15, "widening": 0.0}
    z0_hat, z0 = pair(1)
    _, whole = LatentPerceptualLoss(double, **options).evaluate(z0_hat, z0, diagnose=True)
    _, part = LatentPerceptualLoss(double, depth=["up_1", "up_3"], **options).evaluate(z0_hat, z0, diagnose=True)
    assert whole is not None
    assert part is not None
    for name, windows in {"up_1": (1, 3), "up_3": (3, 5)}.items():
        expected = naive_mask(double.features(z0, [name], ("post_quant_conv",))[0], 0.15, 0.0, *windows).mean().item()
        for found in (whole, part):
            assert found.inliers[found.stages.index(name)].item() == pytest.approx(expected)


def test_the_example_takes_more_maps_than_its_own_five() -> None:
    layers = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(8)))
    many = Autoencoder(layers, feature_modules=[str(i) for i in range(8)])
    assert LatentPerceptualLoss(many, "diffusers", depth=8)(*pair(2, torch.float32)).shape == (2,)
