from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import image_batch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lpl_lightning import LatentDiffusionModule
from lpl_lightning.callbacks import AccumulatedGradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]


class Saves(Callback):
    """Writes a checkpoint after each batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")


class Rest:
    """What a loader of batches gives from where a checkpoint was written."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.given = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for batch in self.batches[self.given :]:
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


def trained(
    folder: Path, module: LatentDiffusionModule, *callbacks: Callback, ckpt_path: Path | None = None
) -> dict[str, Tensor]:
    batches = Rest([image_batch(2) | {"image": torch.full((2, 3, 16, 16), n / 8)} for n in range(6)])
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=3,
    )
    loader: Any = batches
    trainer.fit(module, loader, ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=True)
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("batch", range(5))
def test_a_run_goes_on_exactly_from_any_batch(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule], batch: int
) -> None:

    def module() -> LatentDiffusionModule:
        torch.manual_seed(1)  # of the autoencoder, which checkpoints do not hold
        return make_module()

    whole = trained(tmp_path, module(), AccumulatedGradients(), Saves(tmp_path))
    kept = torch.load(tmp_path / f"{batch}.ckpt", weights_only=True).get("lpl_lightning_gradients", {})
    assert bool(kept) == (batch % 3 != 2), "only between batches of a step"
    rest = trained(tmp_path, module(), AccumulatedGradients(), ckpt_path=tmp_path / f"{batch}.ckpt")
    assert all(torch.equal(rest[name], value) for name, value in whole.items())
    if kept:
        without = trained(tmp_path, module(), ckpt_path=tmp_path / f"{batch}.ckpt")
        assert not all(torch.equal(without[name], value) for name, value in whole.items())


def test_gradients_of_a_checkpoint_that_was_only_evaluated_are_not_trained_on(
    tmp_path: Path, make_module: Callable[..., LatentDiffusionModule]
) -> None:
    """Automatic optimization sets them to zero first; a module that optimizes by hand may not."""
    module, callback = make_module(), AccumulatedGradients()
    trained(tmp_path, module, callback, Saves(tmp_path))
    found: list[str] = []

    class Looks(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            found.extend(name for name, value in pl_module.named_parameters() if value.grad is not None)

    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        callbacks=[callback, Looks()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.zero_grad()
    loader: Any = DataLoader([image_batch(2)], batch_size=None)  # type: ignore[arg-type]
    trainer.validate(module, loader, ckpt_path=str(tmp_path / "0.ckpt"), weights_only=True, verbose=False)
    trainer.fit(module, loader)
    assert found == []
