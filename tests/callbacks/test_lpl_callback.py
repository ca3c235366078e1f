from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from conftest import tiny_kl
from test_mixin import Foreign, fit

from lpl_lightning import Autoencoder, LatentPerceptualLoss, LPLCallback


def test_weight_follows_its_schedule() -> None:
    callback = LPLCallback(weight=2.0, start_step=3, ramp_steps=3)
    assert [callback.weight_at(s) for s in range(8)] == [0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0]
    every = LPLCallback(weight=2.0, start_step=1, every_n_steps=3)
    assert [every.weight_at(s) for s in range(8)] == [0, 6.0, 0, 0, 6.0, 0, 0, 6.0]


def test_it_runs_at_the_steps_of_its_schedule_only(tmp_path: Path) -> None:
    decoded: list[int] = []
    steps: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            steps.append(trainer.global_step)

    autoencoder = Autoencoder(tiny_kl())
    autoencoder.model.decoder.conv_in.register_forward_hook(lambda *_: decoded.append(steps[-1]))
    fit(Foreign(), tmp_path, Watch(), LPLCallback(start_step=1, every_n_steps=2, autoencoder=autoencoder), steps=5)
    assert sorted(set(decoded)) == [1, 3]


def test_its_loss_is_made_with_the_options_given(tmp_path: Path) -> None:
    autoencoder = Autoencoder(tiny_kl())
    make = partial(LatentPerceptualLoss, threshold=0.5)
    trainer = fit(Foreign(), tmp_path, LPLCallback(loss=make, autoencoder=autoencoder))
    # Foreign's ratios at sigma = 0.1, 0.37, 0.63 and 0.9 are 0.10, 0.39, 0.82 and 2.06.
    assert trainer.callback_metrics["gate_share"] == 0.5


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    pair = [LPLCallback(autoencoder=Autoencoder(tiny_kl())) for _ in range(2)]
    with pytest.raises(ValueError, match="two LPLCallbacks under trainer.callbacks"):
        fit(Foreign(), tmp_path, *pair)


def test_a_run_that_was_interrupted_can_be_started_again(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stopped")

    module, callback = Foreign(), LPLCallback(autoencoder=Autoencoder(tiny_kl()))
    with pytest.raises(RuntimeError, match="stopped"):
        fit(module, tmp_path, callback, Stop())
    assert not module.loss_terms
    fit(module, tmp_path, callback)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "`weight` must be 0 or more, got -1"),
        ({"every_n_steps": 0}, "`every_n_steps` must be 1 or more"),
        ({"ramp_steps": -1}, "`ramp_steps` must be 0 or more"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LPLCallback(**options)
