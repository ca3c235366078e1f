"""The closed form against autograd on `standardize` and `masked_distance`, which have tests of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lpl_lightning.losses.distance import masked_distance, standardize
from lpl_lightning.losses.map_gradient import distance_gradient, standardized_squares_gradient


def by_graph(
    predicted: Tensor, target: Tensor, outliers: Tensor | None, settings: dict[str, Any], inner: tuple[slice, ...]
) -> tuple[Tensor, Tensor]:
    leaf = predicted.clone().requires_grad_()
    p, t = standardize(leaf, target, settings["statistics"], settings["eps"], settings["relative_eps"])
    region = (slice(None), slice(None), *inner)
    mask = None if outliers is None else (~outliers).to(p.dtype)[region]
    found = masked_distance(p[region], t[region], mask, reduction=settings["reduction"])
    # Weights, so that a gradient of the wrong sample shows.
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    return found.detach(), gradient


@pytest.mark.parametrize("statistics", ["predicted", "predicted_detached", "target", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("relative_eps", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sides", [(5,), (4, 6), (2, 3, 4)], ids=str)
def test_closed_form_equals_the_graph(
    statistics: Any, masked: bool, relative_eps: float, reduction: Any, sides: tuple[int, ...]
) -> None:
    predicted, target = torch.randn(2, 3, 4, *sides, dtype=torch.float64).add(5.0).unbind()
    outliers = torch.rand(3, 4, *sides) < 0.3 if masked else None
    if outliers is not None:
        outliers[1, 2] = True  # nothing left of a channel
    settings = {"statistics": statistics, "eps": 1e-3, "relative_eps": relative_eps, "reduction": reduction}
    for inner in ((), (slice(1, sides[0]), *[slice(0, 2)] * (len(sides) - 1))):
        before = predicted.clone(), target.clone()
        expected = by_graph(predicted, target, outliers, settings, inner)
        found = standardized_squares_gradient(predicted, target, outliers, **settings, inner=inner)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close((predicted, target), before, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_closed_form_in_any_layout(layout: Any) -> None:
    predicted, target = (
        torch.randn(2, 4, 6, 6, dtype=torch.float64).contiguous(memory_format=layout) for _ in range(2)
    )
    settings: dict[str, Any] = {"statistics": "predicted", "eps": 1e-5, "relative_eps": 0.0, "reduction": "mean"}
    expected = by_graph(predicted, target, None, settings, ())
    found = standardized_squares_gradient(predicted, target, None, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_constant_channels_have_a_finite_gradient() -> None:
    predicted, target = torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    found, gradient = standardized_squares_gradient(predicted, target, None, "predicted", 1e-5, 0.0, "mean")
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient).all()


def test_any_distance_by_its_graph() -> None:
    predicted = torch.randn(3, 2, 4, 4)
    with torch.no_grad():
        found, gradient = distance_gradient(lambda x: x.pow(3).flatten(1).sum(dim=1), predicted)
    torch.testing.assert_close(found, predicted.pow(3).flatten(1).sum(dim=1))
    torch.testing.assert_close(gradient, 3 * predicted.square())
    assert not found.requires_grad
    assert not gradient.requires_grad
