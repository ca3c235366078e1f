from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import image_batch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lpl_lightning import LatentDiffusionModule
from lpl_lightning.callbacks import BestCheckpoints

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint")


class Scores(Callback):
    """Logs a given score at each validation."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores = scores

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.callback_metrics["score"] = torch.tensor(self.scores.get(trainer.global_step, 0.0))


def fit(
    folder: Path,
    module: LatentDiffusionModule,
    scores: dict[int, float],
    ckpt_path: Path | None = None,
    evaluated: Path | None = None,
    **given: Any,
) -> ModelCheckpoint:
    """Two steps between validations; checkpoints in a folder of the run's own. Another may be evaluated before."""
    saving = ModelCheckpoint(folder, "{step}", monitor="score", save_last=True, **given)
    batches: Any = DataLoader([image_batch(2) for _ in range(8)], batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_steps=max(scores),
        accelerator="cpu",
        logger=False,
        callbacks=[Scores(scores), BestCheckpoints(), saving],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        limit_val_batches=1,
    )
    if evaluated is not None:
        trainer.validate(module, batches, ckpt_path=evaluated, verbose=False, weights_only=True)
    trainer.fit(module, batches, batches, ckpt_path=ckpt_path, weights_only=True)
    return saving


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_the_best_of_before_stays_the_best(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule], mode: str, sign: int
) -> None:
    """In another folder; of the three best, one that is worse gives way to one that is better."""
    before = fit(tmp_path / "a", make_module(), {2: 0.1 * sign, 4: 0.5 * sign}, save_top_k=3, mode=mode)
    scores = {6: 0.9 * sign, 8: 0.3 * sign}
    after = fit(tmp_path / "b", make_module(), scores, tmp_path / "a" / "last.ckpt", save_top_k=3, mode=mode)
    assert after.best_model_path == before.best_model_path == str(tmp_path / "a" / "step=2.ckpt")
    assert float(after.best_model_score or 0) == pytest.approx(0.1 * sign)
    kept = {tmp_path / "a" / "step=2.ckpt", tmp_path / "a" / "step=4.ckpt", tmp_path / "b" / "step=8.ckpt"}
    assert {Path(path) for path in after.best_k_models} == kept
    assert after.kth_best_model_path == str(tmp_path / "a" / "step=4.ckpt")
    assert {*tmp_path.glob("*/step=*.ckpt")} == kept


def test_what_is_no_more_or_too_many_does_not_count(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]
) -> None:
    fit(tmp_path / "a", make_module(), {2: 0.1, 4: 0.5, 6: 0.7}, save_top_k=3)
    (tmp_path / "a" / "step=2.ckpt").unlink()
    after = fit(tmp_path / "b", make_module(), {8: 0.9}, tmp_path / "a" / "last.ckpt", save_top_k=1)
    assert after.best_model_path == str(tmp_path / "a" / "step=4.ckpt")
    assert list(after.best_k_models) == [after.best_model_path]
    assert not (tmp_path / "b" / "step=8.ckpt").exists()


def test_those_of_a_run_that_is_evaluated_first_do_not_count(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]
) -> None:
    """It may have been better; this one begins anew."""
    fit(tmp_path / "a", make_module(), {2: 0.1, 4: 0.2}, save_top_k=1)
    before = tmp_path / "a" / "last.ckpt"
    after = fit(tmp_path / "b", make_module(), {2: 0.9, 4: 0.8}, evaluated=before, save_top_k=1)
    assert after.best_model_path == str(tmp_path / "b" / "step=4.ckpt")
