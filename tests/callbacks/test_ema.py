from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_fine_tuning import data, module
from test_module import trainer

from lpl_lightning import EMA, LatentDiffusionModule


def key(m: LatentDiffusionModule) -> torch.Tensor:
    weight: torch.Tensor = m.denoiser.backbone.proj_out.weight
    return weight.detach().clone()


class Watch(Callback):
    """Keeps the weights after each step, the validation's, and what a checkpoint in the middle is to hold."""

    def __init__(self, save: Path | None = None) -> None:
        self.steps: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []
        self.save = save

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append(key(pl_module))
        if self.save is not None and len(self.steps) == 3:
            trainer.save_checkpoint(self.save)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append(key(pl_module))


def averaged(begin: torch.Tensor, steps: list[torch.Tensor], decay: float) -> torch.Tensor:
    average = begin
    for i, weights in enumerate(steps):
        average = weights if i == 0 else decay * average + (1 - decay) * weights
    return average


def test_weights_from_a_runs_average(tmp_path: Path) -> None:
    trained, watch = module(), Watch(tmp_path / "a.ckpt")
    begin = key(trained)
    trainer(tmp_path, max_steps=3, callbacks=[EMA(decay=0.5), watch], limit_val_batches=0).fit(trained, data())
    average, steps = averaged(begin, watch.steps, 0.5), watch.steps
    source = str(tmp_path / "a.ckpt")
    torch.testing.assert_close(key(module(weights=source)), steps[-1])
    torch.testing.assert_close(key(module(weights=source, weights_ema=0.5)), average)
    torch.testing.assert_close(key(trained), average)  # in place after training
    with pytest.raises(ValueError, match=r"`ema`=0.9: .* has those of decay \[0.5\]"):
        module(weights=source, weights_ema=0.9)
    with pytest.raises(ValueError, match="give `weights` too"):
        module(weights_ema=0.9)
    with pytest.raises(ValueError, match="`decay` must lie"):
        EMA(decay=1.0)
    plain = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    plain.fit(module(), data())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="has none. Leave it out"):
        module(weights=str(tmp_path / "plain.ckpt"), weights_ema=0.5)
    assert module(weights=source).hparams["weights"] is None


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory .* exists")
def test_a_checkpoint_at_the_end_holds_both_and_resumes(tmp_path: Path) -> None:
    """Written after the average was put in place, as ModelCheckpoint does with its last one."""

    def run(steps: int, folder: str, source: str | None = None) -> tuple[LatentDiffusionModule, Watch, Any]:
        torch.manual_seed(1)
        trained, watch = module(), Watch()
        checkpoint = ModelCheckpoint(dirpath=tmp_path / folder, every_n_train_steps=500, save_last=True)
        callbacks = [EMA(decay=0.5), watch, checkpoint]
        fit = trainer(tmp_path, max_steps=steps, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=1)
        fit.fit(trained, data(), ckpt_path=source)
        return trained, watch, fit

    begin = key(module())
    trained, watch, fit = run(3, "first")
    average = averaged(begin, watch.steps, 0.5)
    assert not torch.equal(average, watch.steps[-1])
    torch.testing.assert_close(key(trained), average)
    for source in (str(tmp_path / "first" / "last.ckpt"), str(tmp_path / "again.ckpt")):
        fit.save_checkpoint(tmp_path / "again.ckpt")
        torch.testing.assert_close(key(module(weights=source)), watch.steps[-1])
        torch.testing.assert_close(key(module(weights=source, weights_ema=0.5)), average)
        _, later, _ = run(4, "second", source)
        assert 0 < (later.steps[0] - watch.steps[-1]).abs().max() < 0.05  # one step at 1e-2 from the trained weights
    fit.validate(trained, data(), verbose=False)
    torch.testing.assert_close(watch.validated[-1], average)
    torch.testing.assert_close(key(trained), average)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_further_decays(tmp_path: Path) -> None:
    """Each is the average by hand, also in a run that went on from a checkpoint."""
    trained, watch = module(), Watch(tmp_path / "a.ckpt")
    begin = key(trained)
    ema = EMA(decay=0.5, also=[0.9, 0.0])
    trainer(tmp_path, max_steps=3, callbacks=[ema, watch], limit_val_batches=0).fit(trained, data())
    source, steps = str(tmp_path / "a.ckpt"), watch.steps
    for decay in (0.5, 0.9, 0.0):
        torch.testing.assert_close(key(module(weights=source, weights_ema=decay)), averaged(begin, steps, decay))
    with pytest.raises(ValueError, match=r"has those of decay \[0.0, 0.5, 0.9\]"):
        module(weights=source, weights_ema=0.7)

    later = Watch()
    longer = trainer(tmp_path, max_steps=5, callbacks=[EMA(decay=0.5, also=[0.9]), later], limit_val_batches=0)
    longer.fit(module(), data(), ckpt_path=source, weights_only=True)
    longer.save_checkpoint(tmp_path / "b.ckpt")
    whole = averaged(begin, steps + later.steps, 0.9)
    assert len(later.steps) == 2
    torch.testing.assert_close(key(module(weights=str(tmp_path / "b.ckpt"), weights_ema=0.9)), whole)
    for wrong, said in (([0.5], "each once"), ([0.9, 0.9], "each once"), ([1.0], "`also` must lie")):
        with pytest.raises(ValueError, match=said):
            EMA(decay=0.5, also=wrong)
