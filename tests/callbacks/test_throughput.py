from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_mixin import Foreign
from torch.utils.data import DataLoader

from lpl_lightning import ImagesPerSecond


def test_rate_by_a_known_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 10 images that end at 0, 1, 2 and, a validation between, 100 and 104 seconds."""
    module, trainer, callback = Foreign(), pl.Trainer(logger=False, accelerator="cpu"), ImagesPerSecond(smoothing=0.5)
    logged: list[float] = []
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.extend([value] * (name != "data_wait")))
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


def test_it_is_logged_once_and_where_the_logger_looks(tmp_path: Path) -> None:
    steps: list[int] = []

    class Logs(Foreign):
        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            if name == "images_per_second":
                steps.append(self.global_step)
            super().log(name, *args, **kwargs)

        def training_step(self, *args: Any) -> torch.Tensor:
            return self.net.weight.sum()

        def train_dataloader(self) -> DataLoader[Any]:
            batches: Any = [{"image": torch.zeros(2, 3, 2, 2)}] * 12
            return DataLoader(batches, batch_size=None)

    settings: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    logger = CSVLogger(tmp_path)
    pl.Trainer(max_steps=12, log_every_n_steps=5, callbacks=[ImagesPerSecond()], logger=logger, **settings).fit(Logs())
    assert steps == [2, 5, 10]
    logger.finalize("success")
    table = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "images_per_second" in table
    assert "data_wait" in table
    assert len(table.split()) == 3


def test_foreign_batches_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, trainer, callback = Foreign(), pl.Trainer(logger=False, accelerator="cpu"), ImagesPerSecond()
    for batch in (torch.zeros(3), {"x": torch.zeros(3)}):
        for _ in range(2):
            callback.on_train_batch_end(trainer, module, None, batch, 0)
    with pytest.raises(ValueError, match="`smoothing` must be"):
        ImagesPerSecond(smoothing=1.0)
