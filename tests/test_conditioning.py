from __future__ import annotations

import pytest
import torch

from lpl_lightning import ClassLabels, ClassTokens
from lpl_lightning.conditioning import Condition
from lpl_lightning.data import ShapesDataModule


def test_labels_pass_and_dropped_ones_become_the_null_label() -> None:
    conditioner = ClassLabels(5)
    batch = {"label": torch.tensor([0, 4, 2])}
    kept = conditioner(batch, 3).class_labels
    dropped = conditioner(batch, 3, torch.tensor([False, True, False])).class_labels
    assert kept.tolist() == [0, 4, 2]
    assert dropped.tolist() == [0, 5, 2]
    assert conditioner(batch, 3, torch.ones(3, dtype=torch.bool)).class_labels.tolist() == [5, 5, 5]


def test_tokens_of_a_class_are_its_embedding_and_learn() -> None:
    conditioner = ClassTokens(3, token_dim=8, pooled_dim=6, tokens_per_class=2)
    condition = conditioner({"label": torch.tensor([2, 2, 0])}, 3, torch.tensor([False, True, False]))
    assert condition.tokens.shape == (3, 2, 8)
    assert condition.pooled.shape == (3, 6)
    torch.testing.assert_close(condition.tokens[0].flatten(), conditioner.tokens.weight[2])
    torch.testing.assert_close(condition.tokens[1].flatten(), conditioner.tokens.weight[3])
    assert conditioner.pooled is not None
    condition.pooled.sum().backward()
    gradient = conditioner.pooled.weight.grad
    assert gradient is not None
    assert gradient.sum(dim=1).tolist() == [6, 0, 6, 6]


def test_conditions_are_dropped_at_their_rate() -> None:
    drop = ClassLabels(3, dropout=0.1).dropped(torch.rand(20_000))
    assert drop is not None
    assert drop.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert ClassLabels(3, dropout=0.0).dropped(torch.rand(4)) is None


def test_without_classes_all_is_the_null_condition() -> None:
    conditioner = ClassTokens(0, token_dim=4, pooled_dim=4)
    assert conditioner({}, 2).tokens.shape == (2, 1, 4)
    assert conditioner({"label": torch.tensor([3, 1])}, 2).tokens.shape == (2, 1, 4)


def test_joined_conditions_keep_their_order() -> None:
    first, second = Condition(class_labels=torch.tensor([1, 2])), Condition(class_labels=torch.tensor([3]))
    joined = first.joined(second)
    assert joined.class_labels is not None
    assert joined.class_labels.tolist() == [1, 2, 3]
    assert joined.tokens is None


def test_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`num_classes`=5 .* has 8 classes"):
        ClassLabels(5).check(ShapesDataModule())
    ClassLabels(8).check(ShapesDataModule())
    ClassTokens(0, 4, 4).check(ShapesDataModule())
    with pytest.raises(ValueError, match="holds no 'label'"):
        ClassLabels(5)({"image": None}, 2)
    with pytest.raises(ValueError, match="class 7, .* `num_classes`=5"):
        ClassLabels(5)({"label": torch.tensor([0, 7])}, 2)
    with pytest.raises(ValueError, match="class -1, .* numbered from 0"):
        ClassLabels(5)({"label": torch.tensor([0, -1])}, 2)
    with pytest.raises(ValueError, match=r"must hold whole numbers, got torch.float32"):
        ClassLabels(5)({"label": torch.tensor([0.0, 1.0])}, 2)
    with pytest.raises(ValueError, match="`dropout` must lie in"):
        ClassLabels(5, dropout=1.5)
    with pytest.raises(ValueError, match="`num_classes` must be 0"):
        ClassLabels(-1)


@pytest.mark.parametrize("labels", [torch.tensor([1]), torch.tensor(1), torch.zeros(4, 1).long(), torch.arange(5) % 3])
def test_labels_of_another_number_than_samples_are_refused(labels: torch.Tensor) -> None:
    said = r"`label` of the batch must hold a class for each of its 4 samples, \(4,\), got \("
    for conditioner in (ClassLabels(3), ClassTokens(3, token_dim=8)):
        with pytest.raises(ValueError, match=said):
            conditioner({"label": labels}, 4)
        with pytest.raises(ValueError, match=said):
            conditioner({"label": labels}, 4, torch.tensor([True, False, False, True]))
