from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from conftest import tiny_kl

from lpl_lightning import Autoencoder, LatentPerceptualLoss
from lpl_lightning.losses import Subset
from lpl_lightning.losses.measurement import LEAST, MapCosts, best_probabilities, measure_maps, second_moment

COSTS = [
    MapCosts((1.0, 2.0, 4.0), (1.0, 1.0, 1.0)),
    MapCosts((1.0, 1.0, 1.0), (1.0, 5.0, 0.5)),
    MapCosts((3.0, 1.0, 2.0), (0.2, 4.0, 4.0)),
    MapCosts((1.0, 5.0, 1.0), (2.0, -0.2, 0.7)),
]


@pytest.mark.parametrize("costs", COSTS, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_no_other_probabilities_of_the_same_cost_have_a_smaller_second_moment(costs: MapCosts, share: float) -> None:
    found = best_probabilities(costs, share)
    total = sum(costs.seconds)
    assert sum(c * q for c, q in zip(costs.seconds, found, strict=True)) == pytest.approx(share * total, rel=1e-3)
    assert all(1 >= a >= b >= LEAST for a, b in itertools.pairwise([1.0, *found]))
    rng = random.Random(0)
    best = second_moment(costs, found)
    others = 0
    while others < 3000:
        q = sorted((rng.random() for _ in range(3)), reverse=True)
        factor = share * total / sum(c * x for c, x in zip(costs.seconds, q, strict=True))
        if factor * q[0] <= 1 and factor * q[-1] >= LEAST:
            others += 1
            assert second_moment(costs, [factor * x for x in q]) >= best * (1 - 1e-3)


def test_enough_time_is_the_exact_loss() -> None:
    assert best_probabilities(COSTS[0], 1.0) == [1.0, 1.0, 1.0]
    assert best_probabilities(COSTS[0], 7.0) == [1.0, 1.0, 1.0]
    assert second_moment(COSTS[0], [1.0, 1.0, 1.0]) == 1.0


def test_moments_foretell_the_estimates_second_moment() -> None:
    """Measured V against gradients of the loss itself, drawn many times."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(tiny_kl().double())
    z0 = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    z0_hat = (z0 + 0.5 * torch.randn_like(z0)).requires_grad_()
    keep = [0.9, 0.6, 0.3, 0.3]
    lpl = LatentPerceptualLoss(autoencoder, subset=Subset(keep=keep))
    costs = measure_maps(lpl, z0_hat, z0, repeats=1)
    squares = []
    many = z0_hat.detach().repeat(25, 1, 1, 1).requires_grad_()
    for _ in range(60):
        (gradient,) = torch.autograd.grad(lpl(many, z0.expand_as(many)).sum(), many)
        squares.append(gradient.square().sum(dim=(1, 2, 3)))
    drawn = torch.cat(squares)
    expected = sum(v / q for v, q in zip(costs.moments, keep, strict=True))
    assert abs(drawn.mean() - expected) < 4 * drawn.std() / len(drawn) ** 0.5
    assert drawn.std() / len(drawn) ** 0.5 < 0.1 * expected
    (gradient,) = torch.autograd.grad(LatentPerceptualLoss(autoencoder)(z0_hat, z0).sum(), z0_hat)
    assert sum(costs.moments) == pytest.approx(gradient.square().sum().item(), rel=1e-6)
    assert all(seconds > 0 for seconds in costs.seconds)


def test_measuring_decodes_four_samples_at_most_and_changes_nothing() -> None:
    model: Any = tiny_kl()
    lpl = LatentPerceptualLoss(Autoencoder(model), execution={"chunk_size": 8})  # type: ignore[arg-type]
    sizes: list[int] = []
    model.decoder.conv_in.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    z0 = torch.randn(9, 4, 4, 4)
    costs = measure_maps(lpl, z0 + 0.1, z0, repeats=2)
    assert len(costs.seconds) == len(costs.moments) == 4
    assert max(sizes) == 4
    assert lpl.subset == Subset()
