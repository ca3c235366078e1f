"""Random numbers of samples, which neither processes nor accumulation change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lpl_lightning.draws import Draws, normal

NUMBERS = ("time", "drop", "caption", "subset")


def test_a_sample_draws_by_its_number_alone() -> None:
    """A batch of 12, shared out one after the other, in turns, and in parts, by a loop over single samples."""
    whole = Draws.of(7, 100, 12, batch=3)
    parts = [(Draws.of(7, 100 + 4 * rank, 4, batch=3), range(4 * rank, 4 * rank + 4)) for rank in range(3)]
    parts += [(Draws.of(7, 100 + rank, 4, step=3, batch=3), range(rank, 12, 3)) for rank in range(3)]
    parts += [(Draws.of(7, 100 + i, 1, batch=3), range(i, i + 1)) for i in range(12)]
    noise = normal((12, 4, 8, 8), whole.generators, torch.device("cpu"))
    for part, rows in parts:
        for name in NUMBERS:
            assert torch.equal(getattr(part, name), getattr(whole, name)[list(rows)]), name
        assert torch.equal(normal((len(rows), 4, 8, 8), part.generators, torch.device("cpu")), noise[list(rows)])
        assert part.shared == whole.shared
    for other in (Draws.of(8, 100, 12, batch=4), Draws.of(7, 112, 12, batch=4)):
        assert not any((getattr(other, name) == getattr(whole, name)).any() for name in NUMBERS)
        assert other.shared != whole.shared
    assert Draws.of(7, 0, 0).generators == []


def test_those_of_the_first_samples_alone() -> None:
    whole, part, first = Draws.of(7, 0, 5), Draws.of(7, 0, 3), Draws.of(7, 0, 5).of_first(3)
    for name in NUMBERS:
        assert torch.equal(getattr(first, name), getattr(part, name))
    assert [one.initial_seed() for one in first.generators] == [one.initial_seed() for one in part.generators]
    assert first.shared == whole.shared


def test_numbers_are_those_of_philox_and_uniform() -> None:
    """Against NumPy's own way from the generator to floats, and Kolmogorov-Smirnov; 1.63 is its 1% point."""
    draws = Draws.of(3, 0, 20_000)
    reference = np.random.Generator(np.random.Philox(key=3)).random(20_000 * 8).reshape(-1, 8)
    found = torch.stack([getattr(draws, name) for name in NUMBERS], dim=1)
    torch.testing.assert_close(found, torch.from_numpy(reference[:, :4].copy()), atol=1e-15, rtol=0)
    for column in found.T:
        distance = (column.sort().values - (torch.arange(20_000) + 0.5) / 20_000).abs().max().item()
        assert distance < 1.63 / math.sqrt(20_000)
    assert found.T.corrcoef().fill_diagonal_(0).abs().max() < 3.3 / math.sqrt(20_000)
    noise = normal((2_000, 64), draws.generators[:2_000], torch.device("cpu"))
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    between = noise.T.corrcoef().fill_diagonal_(0)
    assert between.abs().max() < 5 / math.sqrt(2_000)
    assert len({generator.initial_seed() for generator in draws.generators}) == 20_000


def test_without_a_run_they_are_of_pytorchs_own_generator() -> None:
    torch.manual_seed(1)
    first, second = Draws.fresh(4), Draws.fresh(4)
    torch.manual_seed(1)
    again = Draws.fresh(4)
    assert torch.equal(first.time, again.time)
    assert not (first.time == second.time).any()


def test_seeds_as_large_as_there_are() -> None:
    assert 0 < Draws.of(2**63 - 1, 2**50, 1).time.item() < 1
