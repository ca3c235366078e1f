from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lpl_lightning.metrics.gaussian import GaussianStatistics, add_features, empty_moments, merge_moments


def streamed(features: Tensor, batch_size: int) -> GaussianStatistics:
    statistics = GaussianStatistics(features.shape[1])
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (1e3, 1e-2), (-3e4, 1e3)])
def test_equal_to_numpy_for_any_batch_size(batch_size: int, offset: float, scale: float) -> None:
    features = torch.randn(500, 12, dtype=torch.float64) * scale * torch.linspace(0.1, 2, 12) + offset
    features = features @ torch.randn(12, 12, dtype=torch.float64)
    found = streamed(features, batch_size).compute()
    # In extended precision, where nothing that matters cancels.
    exact = features.numpy().astype(np.longdouble)
    mean = exact.mean(axis=0)
    covariance = (exact - mean).T @ (exact - mean) / 499
    assert found.samples == 500
    np.testing.assert_allclose(found.mean.numpy(), mean.astype(np.float64), rtol=1e-12)
    norm = np.abs(covariance).max()
    assert np.abs(found.covariance.numpy() - covariance).max() < 1e-10 * norm


def test_half_and_single_precision_are_summed_in_double() -> None:
    features = torch.randn(4_000, 5) * 1e-3 + 100
    found = streamed(features, 10).compute()
    assert found.covariance.dtype == torch.float64
    torch.testing.assert_close(found.covariance, features.double().T.cov(), rtol=1e-10, atol=1e-16)
    halves = streamed(features.half(), 10).compute()
    torch.testing.assert_close(halves.mean, features.half().double().mean(0))


def test_sets_merge_in_any_order_and_empty_ones_add_nothing() -> None:
    features = torch.randn(90, 4, dtype=torch.float64) + torch.tensor([0, 10, 1e5, 1e-3])
    parts = [streamed(part, 8).moments for part in features.split([50, 0, 39, 1])]
    expected = streamed(features, 90).moments
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]):
        merged = merge_moments(torch.stack([parts[index] for index in order]))
        torch.testing.assert_close(merged, expected, rtol=1e-10, atol=1e-10)
    together = streamed(features[:50], 8)
    together.merge_state(streamed(features[50:], 8))
    torch.testing.assert_close(together.moments, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")  # torchmetrics' own, before our error
def test_a_call_gives_that_of_the_batch_and_keeps_all() -> None:
    features = torch.randn(40, 3)
    statistics = GaussianStatistics(3)
    for batch in features.split(10):
        torch.testing.assert_close(statistics(batch).mean, batch.double().mean(0))
    assert statistics.compute().samples == 40
    torch.testing.assert_close(statistics.compute().covariance, features.double().T.cov())
    statistics.reset()
    with pytest.raises(ValueError, match="needs 2 images or more, got 0"):
        statistics.compute()


def test_a_call_with_one_vector_keeps_all() -> None:
    features = torch.randn(5, 3)
    called = GaussianStatistics(3)
    assert [called(part) is None for part in features.split([3, 1, 1])] == [False, True, True]
    torch.testing.assert_close(called.compute().covariance, features.double().T.cov())


def test_states_stay_double_in_a_module_in_another_precision() -> None:
    statistics = streamed(torch.randn(50, 3) + 1e4, 10)
    before = statistics.compute().covariance
    nn.ModuleDict({"metric": statistics}).to(torch.bfloat16).half()
    assert statistics.moments.dtype == torch.float64
    statistics.update(torch.empty(0, 3))
    torch.testing.assert_close(statistics.compute().covariance, before, rtol=0, atol=0)


def test_features_that_require_a_gradient_leave_no_graph() -> None:
    """As those of a network that is being trained: a graph would keep all batches in memory."""
    features = torch.randn(20, 3, requires_grad=True)
    moments = empty_moments(3)
    for batch in features.split(7):
        add_features(moments, batch)  # beneath torchmetrics, which takes no gradients either
    assert not moments.requires_grad
    torch.testing.assert_close(moments[1:, 1:] / 19, features.detach().double().T.cov())
    assert not streamed(features, 7).moments.requires_grad


def test_other_features_are_refused() -> None:
    statistics = GaussianStatistics(3)
    for wrong in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"`features` must be \(B, 3\) floating point"):
            statistics.update(wrong)
    with pytest.raises(ValueError, match="`features` of 1 of 4 images are not finite"):
        statistics.update(torch.eye(4, 3).log().clamp(min=-1).index_fill(0, torch.tensor([2]), torch.nan))
    with pytest.raises(ValueError, match="`dim` must be 1 or more"):
        GaussianStatistics(0)
