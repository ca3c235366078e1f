from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from lpl_lightning.losses.distance import (
    channel_normalize,
    depth_weight,
    masked_distance,
    standardize,
)

SHAPES = [(2, 3, 7), (2, 3, 4, 5), (2, 3, 2, 3, 4)]


def maps(shape: tuple[int, ...] = (2, 3, 4, 5)) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=torch.float64) * 2 + 1, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_separate_statistics_are_torchs_instance_norm(shape: tuple[int, ...]) -> None:
    predicted, target = maps(shape)
    ours = standardize(predicted, target, "separate", eps=1e-5)
    torch.testing.assert_close(ours, (F.instance_norm(predicted, eps=1e-5), F.instance_norm(target, eps=1e-5)))


@pytest.mark.parametrize("statistics", ["predicted", "predicted_detached", "target"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shared_statistics_are_a_batch_norm_frozen_at_one_maps_moments(statistics: Any, shape: tuple[int, ...]) -> None:
    predicted, target = maps(shape)
    ours = standardize(predicted, target, statistics, eps=1e-3)
    for b in range(shape[0]):
        whose = (target if statistics == "target" else predicted)[b].flatten(1)
        args = (whose.mean(dim=1), whose.var(dim=1, correction=0))
        for result, features in zip(ours, (predicted, target), strict=True):
            expected = F.batch_norm(features[b : b + 1], *args, eps=1e-3)
            torch.testing.assert_close(result[b : b + 1], expected)


def test_which_statistics_take_part_in_the_gradient() -> None:
    """Attached statistics make the distance blind to the estimate's scale and offset; detached ones do not."""
    predicted, target = maps()
    for statistics, normalize in (("predicted", standardize), ("predicted", channel_normalize)):
        x = predicted.clone().requires_grad_()
        normalize(x, target, cast(Any, statistics), eps=0.0)[0].square().sum().backward()
        assert x.grad is not None
        assert x.grad.abs().max() < 1e-10, "a normalized map's energy is a constant"
    for normalize in (standardize, channel_normalize):
        x = predicted.clone().requires_grad_()
        normalize(x, target, "predicted_detached", eps=0.0)[0].square().sum().backward()
        assert x.grad is not None
        assert x.grad.abs().max() > 0.1


@pytest.mark.parametrize("statistics", ["predicted", "predicted_detached", "target", "separate", "none"])
def test_channel_norm_is_torchs_normalize(statistics: Any) -> None:
    predicted, target = maps()
    a, b = channel_normalize(predicted, target, statistics, eps=0.0)
    if statistics == "none":
        assert a is predicted
        assert b is target
    if statistics == "separate":
        torch.testing.assert_close((a, b), (F.normalize(predicted, dim=1), F.normalize(target, dim=1)))
    if statistics.startswith("predicted"):
        torch.testing.assert_close(a, F.normalize(predicted, dim=1))
        torch.testing.assert_close(b * predicted.norm(dim=1, keepdim=True), target)
    if statistics == "target":
        torch.testing.assert_close(b, F.normalize(target, dim=1))
        torch.testing.assert_close(a * target.norm(dim=1, keepdim=True), predicted)


@pytest.mark.parametrize(
    ("distance", "criterion"),
    [("mse", nn.MSELoss()), ("l1", nn.L1Loss()), ("huber", nn.HuberLoss(delta=0.7))],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_distance_without_a_mask_is_torchs_loss_of_each_sample(
    distance: Any, criterion: nn.Module, shape: tuple[int, ...]
) -> None:
    predicted, target = maps(shape)
    ours = masked_distance(predicted, target, distance=distance, huber_delta=0.7)
    torch.testing.assert_close(ours, torch.stack([criterion(a, b) for a, b in zip(predicted, target, strict=True)]))
    summed = masked_distance(predicted, target, distance=distance, huber_delta=0.7, reduction="sum")
    torch.testing.assert_close(summed, ours * predicted[0, 0].numel())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_distance_with_a_mask_is_a_mean_over_what_is_left(shape: tuple[int, ...]) -> None:
    predicted, target = maps(shape)
    mask = (torch.rand(shape) > 0.4).double()
    mask[0, 0] = 0
    for reduction in ("mean", "sum"):
        ours = masked_distance(predicted, target, mask, reduction=cast(Any, reduction))
        for b in range(shape[0]):
            channels = []
            for c in range(shape[1]):
                kept = mask[b, c].bool()
                squares = (predicted[b, c][kept] - target[b, c][kept]) ** 2
                of_channel = squares.sum() if reduction == "sum" or not kept.any() else squares.mean()
                channels.append(of_channel.item())
            assert ours[b].item() == pytest.approx(sum(channels) / len(channels))


@pytest.mark.parametrize("statistics", ["predicted", "target", "separate", "none"])
@pytest.mark.parametrize("normalize", [standardize, channel_normalize])
@pytest.mark.parametrize("distance", ["mse", "l1", "huber"])
def test_gradients_are_those_of_finite_differences(statistics: Any, normalize: Any, distance: Any) -> None:
    predicted, target = maps((2, 2, 3, 3))
    mask = (torch.rand(2, 2, 3, 3) > 0.3).double()
    if statistics.startswith("target"):
        target = target.detach()

    def of_predicted(x: Tensor) -> Tensor:
        a, b = normalize(x, target, statistics, 1e-3)
        return masked_distance(a, b, mask, distance)

    assert gradcheck(of_predicted, (predicted.requires_grad_(),))


@pytest.mark.parametrize("statistics", ["predicted", "predicted_detached", "target", "separate"])
def test_a_constant_added_to_a_channel_of_both_changes_nothing(statistics: Any) -> None:
    predicted, target = maps()
    shift = torch.randn(1, 3, 1, 1, dtype=torch.float64) * 5
    plain = masked_distance(*standardize(predicted, target, statistics))
    torch.testing.assert_close(
        masked_distance(*standardize(predicted + shift, target + shift, statistics)), plain, rtol=1e-9, atol=1e-9
    )


def test_depth_weights_as_the_paper_has_them() -> None:
    assert [depth_weight(r) for r in (1, 2, 4, 8)] == [1, 0.5, 0.25, 0.125]
    assert [depth_weight(r, "exponential") for r in (1, 2, 4)] == [0.5, 0.25, 0.0625]
    assert depth_weight(8, "uniform") == 1


@pytest.mark.parametrize("normalize", [standardize, channel_normalize])
@pytest.mark.parametrize("statistics", ["predicted", "predicted_detached", "target", "separate", "none"])
def test_constant_channels_and_single_positions_are_finite(normalize: Any, statistics: Any) -> None:
    for shape in ((1, 2, 4, 4), (1, 2, 1, 1), (1, 2, 1)):
        predicted = torch.zeros(shape, requires_grad=True)
        a, b = normalize(predicted, torch.zeros(shape), statistics, 1e-6)
        loss = masked_distance(a, b, torch.zeros(shape))
        loss.sum().backward()
        assert loss.item() == 0
        assert predicted.grad is not None
        assert torch.isfinite(predicted.grad).all()


def test_the_optimal_scale_of_an_estimate() -> None:
    """Target statistics reward shrinking to the correlation rho, attached ones inflating to 1 / rho."""
    torch.manual_seed(1)
    target = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    noise = torch.randn_like(target)
    rho = 0.8
    estimate = rho * target + math.sqrt(1 - rho**2) * noise
    scales = torch.linspace(0.4, 2.0, 321)

    def best(statistics: Any) -> float:
        losses = [masked_distance(*standardize(a * estimate, target, statistics, 0.0)).item() for a in scales.tolist()]
        return scales[int(torch.tensor(losses).argmin())].item()

    assert best("target") == pytest.approx(rho, abs=0.03)
    assert best("predicted") == pytest.approx(1 / rho, abs=0.05)
