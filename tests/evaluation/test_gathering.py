from __future__ import annotations

import numpy as np
import pytest
import torch

from lpl_lightning.evaluation.gathering import Moments, Rows, gathered, gathered_objects, of_first


def test_moments_are_those_of_all_rows() -> None:
    rows = torch.randn(31, 5) * 3 + 100
    moments = Moments(5, torch.device("cpu"))
    for batch in rows.split([1, 17, 0, 13]):
        moments.add(batch)
    found = moments.all()
    assert found[0, 0] == 31
    np.testing.assert_allclose(found[0, 1:].numpy(), rows.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found[1:, 1:].numpy() / 30, np.cov(rows.double().numpy().T), rtol=1e-9)
    assert torch.equal(moments.all(), found)


def test_rows_come_in_the_order_of_positions() -> None:
    rows = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    kept = Rows(3, torch.device("cpu"))
    for positions in ([6, 2], [], [0, 5, 1], [4, 3]):
        kept.add(torch.tensor(positions, dtype=torch.int32), rows[positions])
    index, found = kept.all()
    assert index.tolist() == list(range(7))
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, rows.detach().float(), rtol=0, atol=0)


def test_a_position_that_came_twice_is_there_once() -> None:
    """As where a sampler fills batches up with images of their start."""
    kept = Rows(1, torch.device("cpu"))
    kept.add(torch.tensor([9, 4, 7]), torch.tensor([0.9, 0.4, 0.7]))
    kept.add(torch.tensor([4, 2, 9]), torch.tensor([0.5, 0.2, 0.8]))
    index, found = kept.all()
    assert index.tolist() == [2, 4, 7, 9]
    torch.testing.assert_close(found, torch.tensor([[0.2], [0.4], [0.7], [0.9]]), rtol=0, atol=0)


def test_rows_and_positions_may_be_written_over() -> None:
    kept, index, rows = Rows(2, torch.device("cpu")), torch.empty(3, dtype=torch.long), torch.empty(3, 2)
    for start in (0, 3):
        kept.add(index.copy_(torch.arange(start, start + 3)), rows.fill_(start))
    assert kept.all()[0].tolist() == list(range(6))
    assert kept.all()[1][:, 1].tolist() == [0, 0, 0, 3, 3, 3]


def test_no_rows_are_an_empty_table() -> None:
    index, found = Rows(4, torch.device("cpu")).all()
    assert index.shape == (0,)
    assert index.dtype == torch.long
    assert found.shape == (0, 4)


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        Rows(4, torch.device("cpu")).add(torch.tensor([0, 1]), torch.zeros(2, 3))


def test_one_process_gathers_its_own() -> None:
    tensor = torch.randn(3)
    assert gathered(tensor) == [tensor]
    assert gathered_objects("a") == ["a"]
    assert of_first("a") == "a"
