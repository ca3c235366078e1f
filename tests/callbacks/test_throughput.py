from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_mixin import Foreign

from lpl_lightning import ImagesPerSecond


def test_rate_by_a_known_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 10 images that end at 0, 1, 2 and, a validation between, 100 and 104 seconds."""
    module, trainer, callback = Foreign(), pl.Trainer(logger=False, accelerator="cpu"), ImagesPerSecond(smoothing=0.5)
    logged: list[float] = []
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.append(value))
    clock = iter([0.0, 1.0, 2.0, 100.0, 104.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    batch: dict[str, Any] = {"image": torch.zeros(10, 3, 2, 2)}
    callback.on_train_start(trainer, module)
    for _ in range(3):
        callback.on_train_batch_end(trainer, module, None, batch, 0)
    callback.on_validation_end(trainer, module)
    for _ in range(2):
        callback.on_train_batch_end(trainer, module, None, batch, 0)
    # 0.1 s an image twice, then the mean of 0.1 and 0.4.
    assert logged == pytest.approx([10.0, 10.0, 4.0])


def test_foreign_batches_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, trainer, callback = Foreign(), pl.Trainer(logger=False, accelerator="cpu"), ImagesPerSecond()
    for batch in (torch.zeros(3), {"x": torch.zeros(3)}):
        for _ in range(2):
            callback.on_train_batch_end(trainer, module, None, batch, 0)
    with pytest.raises(ValueError, match="`smoothing` must be"):
        ImagesPerSecond(smoothing=1.0)
