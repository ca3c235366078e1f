from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import tiny_kl
from lightning.pytorch.strategies import DDPStrategy
from test_lpl_callback import Latents, run, ungated
from torch import Tensor
from torch.utils.data import DataLoader

from lpl_lightning import Autoencoder, LatentPerceptualLoss, LPLCallback
from lpl_lightning.callbacks import budget
from lpl_lightning.losses import Subset, measurement


class Slow(Latents):
    """A step that takes 30 ms besides LPL."""

    def training_step(self, *args: Any) -> Tensor:
        time.sleep(0.03)
        return super().training_step(*args)


def slow_decoder(passes: list[float] | None = None) -> Autoencoder:
    """A decoder of which LPL takes 60 ms, 10 for each pass through each of the first three maps, which it counts.

    A pass of fewer than the four samples of a batch counts and takes a part of that.
    """
    model: Any = tiny_kl()
    count = [0.0] if passes is None else passes

    def wait(block: Any, given: tuple[Tensor, ...], out: Any) -> None:
        part = len(given[0]) / 4
        count[0] += part
        time.sleep(0.01 * part)

    for block in (model.decoder.mid_block, *model.decoder.up_blocks[:2]):
        block.register_forward_hook(wait)
    return Autoencoder(model)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a budget goes by, in seconds, which only sleeping moves."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    for module in (budget, measurement):
        monkeypatch.setattr(module, "synchronize", lambda device: now[0])
    return now


def test_a_loss_that_takes_too_long_is_thinned_out_to_its_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    passes, terms = [0.0], list[float]()
    callback = LPLCallback(weight=1.0, loss=ungated, autoencoder=slow_decoder(passes), budget=0.25)

    class Counted(Slow):
        def auxiliary_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            before = passes[0]
            value = super().auxiliary_loss(*args, **kwargs)
            terms.append(passes[0] - before)
            return value

    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run(Counted(), tmp_path, callback, max_steps=60, num_batches=60)
    keep = callback.budget.keep
    assert keep is not None
    # Time t with t = 0.25 (30 ms + t): 10 of 60 ms.
    mean_cost = (keep[0] + keep[1] + keep[2]) / 3
    assert mean_cost == pytest.approx(1 / 6, rel=0.5)
    assert sum(terms[20:]) < 0.6 * 40 * terms[10], "later steps run through fewer maps"
    first, *corrected = [r.message for r in caplog.records if "may take" in r.message]
    assert "may take 25%" in first
    assert f"random {keep[0]:.0%}, {keep[1]:.0%}" in [first, *(m for m in corrected if "from now on" in m)][-1]


def test_every_call_of_a_step_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    """Of 150 ms, two calls take 60 each."""

    class Twice(Latents):
        def training_step(self, *args: Any) -> Tensor:
            time.sleep(0.03)
            return super().training_step(*args) + super().training_step(*args)

    callback = LPLCallback(loss=ungated, autoencoder=slow_decoder(), budget=0.5)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run(Twice(), tmp_path, callback, max_steps=16, num_batches=16)
    assert [r.message for r in caplog.records if "LPL takes 80% of a step and may take 50%" in r.message]


@pytest.mark.slow
def test_few_samples_that_take_the_time_of_many_are_taken_more_rarely(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    """A pass takes 10 ms, of however many samples it is."""
    terms = list[tuple[float, float]]()

    class Timed(Slow):
        def auxiliary_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            start = clock[0]
            value = super().auxiliary_loss(*args, **kwargs)
            terms.append((start, clock[0] - start))
            return value

    model: Any = tiny_kl()
    for block in (model.decoder.mid_block, *model.decoder.up_blocks[:2]):
        block.register_forward_hook(lambda *_: time.sleep(0.01))
    callback = LPLCallback(weight=1.0, loss=ungated, autoencoder=Autoencoder(model), budget=0.25)
    callback.budget.most = 200
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run(Timed(), tmp_path, callback, max_steps=1200, num_batches=1200)

    def share(first: int, last: int) -> float:
        return sum(taken for _, taken in terms[first:last]) / (terms[last][0] - terms[first][0])

    found, *corrected = [r.message for r in caplog.records if "may take" in r.message]
    assert "from now on" in found
    assert "With these LPL took" in corrected[0]
    assert "they stay" in corrected[-1]
    assert not callback.budget.measuring
    assert share(20, 60) > 0.4, "what is found first is not enough"
    assert share(700, 1199) == pytest.approx(0.25, rel=0.2)


class Pauses(pl.Callback):
    """Takes a hundred times as long as a step, at some of them, as sampling a grid and saving a checkpoint do."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            time.sleep(3.0)


def test_what_other_callbacks_do_now_and_then_is_no_time_of_a_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    said = []
    # Those before LPL make the batch longer, those after it the next one.
    for before, after in (([], []), ([Pauses(9)], [Pauses(10)])):
        caplog.clear()
        torch.manual_seed(0)
        callback = LPLCallback(weight=1.0, loss=ungated, autoencoder=slow_decoder(), budget=0.25)
        callback.budget.thinned = callback.budget.most = 10
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            run(Slow(), tmp_path, *before, callback, *after, max_steps=28, num_batches=28)
        said.append([r.message for r in caplog.records if "may take" in r.message])
    assert said[1][0] == said[0][0]
    # Of the random parts, those that the pauses fell on are not among the times.
    taken = [int(messages[1].removeprefix("With these LPL took ").partition("%")[0]) for messages in said]
    assert taken[1] == pytest.approx(taken[0], abs=4)


def test_what_takes_long_in_many_batches_is_time_of_a_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    """90 ms, 60 of them LPL's, and 3 s more in every third step."""
    callback = LPLCallback(weight=1.0, loss=ungated, autoencoder=slow_decoder(), budget=0.25)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run(Slow(), tmp_path, callback, Pauses(3), max_steps=16, num_batches=16)
    assert "LPL stays exact: it takes" in caplog.text


def test_batches_that_are_accumulated_are_one_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    """Eight of 90 ms, 60 of them LPL's, and an update of 500: LPL takes 0.48 of 1.22 seconds."""

    class SlowUpdate(Slow):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.5)
            super().optimizer_step(*args, **kwargs)

    callback = LPLCallback(weight=1.0, loss=ungated, autoencoder=slow_decoder(), budget=0.4)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run(SlowUpdate(), tmp_path, callback, max_steps=14, num_batches=14 * 8, accumulate_grad_batches=8)
    assert "LPL stays exact: it takes 39% of a step" in caplog.text


def test_a_loss_that_fits_stays_exact(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = LPLCallback(weight=1.0, loss=ungated, autoencoder=Autoencoder(tiny_kl()), budget=0.9)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run(Slow(), tmp_path, callback, max_steps=16, num_batches=16)
    assert callback.budget.keep == [1.0] * 4
    assert any("LPL stays exact: it takes" in r.message for r in caplog.records)


def keeping(losses: list[LatentPerceptualLoss]) -> Callable[[Autoencoder], LatentPerceptualLoss]:
    """What makes a callback's losses, and keeps them."""

    def make(autoencoder: Autoencoder) -> LatentPerceptualLoss:
        losses.append(ungated(autoencoder))
        return losses[-1]

    return make


def test_what_was_found_is_kept_in_checkpoints(tmp_path: Path) -> None:
    losses: list[LatentPerceptualLoss] = []
    make = keeping(losses)
    first = LPLCallback(weight=1.0, loss=make, autoencoder=slow_decoder(), budget=0.2)
    trainer = run(Slow(), tmp_path, first, max_steps=15, num_batches=15)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    keep = first.budget.keep
    assert losses[0].subset == Subset(keep=keep)  # type: ignore[arg-type]
    second = LPLCallback(weight=1.0, loss=make, autoencoder=slow_decoder(), budget=0.2)
    run(Slow(), tmp_path, second, max_steps=17, num_batches=15, ckpt_path=tmp_path / "last.ckpt")
    assert second.budget.keep == keep
    assert second.budget.measuring, "it is still corrected"
    assert second.budget.state_dict() == first.budget.state_dict()
    assert losses[1].subset == Subset(keep=keep)  # type: ignore[arg-type]
    other = LPLCallback(weight=1.0, loss=make, autoencoder=slow_decoder(), budget=0.4)
    run(Slow(), tmp_path, other, max_steps=17, num_batches=15, ckpt_path=tmp_path / "last.ckpt")
    assert other.budget.measuring, "what was found was for another share"
    assert LPLCallback(weight=1.0).state_dict() == {}


class Looked(Slow):
    def test_step(self, *args: Any) -> Tensor:
        return super().training_step(*args)


def test_a_checkpoint_from_before_a_correction_is_evaluated(tmp_path: Path, clock: list[float]) -> None:
    """With the probabilities that it has, and not refused for a subset of the user's own."""
    losses: list[LatentPerceptualLoss] = []
    callback = LPLCallback(weight=1.0, loss=keeping(losses), autoencoder=slow_decoder(), budget=0.2)
    trainer = run(Looked(), tmp_path, callback, max_steps=15, num_batches=15)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    found, corrected = callback.budget.keep, [0.5] * 4
    assert found != corrected
    callback.budget.keep = corrected
    latents: Any = list(torch.randn(4, 4, 4, 4))
    loader = DataLoader(latents, batch_size=4)
    trainer.test(Looked(), loader, ckpt_path=tmp_path / "best.ckpt", weights_only=True, verbose=False)
    assert losses[-1].subset == Subset(keep=found)  # type: ignore[arg-type]
    run(Slow(), tmp_path, callback, max_steps=1)
    with pytest.raises(ValueError, match="`budget` finds a subset of the loss, which has one by `subset` already"):
        callback.budget.apply(LatentPerceptualLoss(slow_decoder(), subset=Subset(keep=0.5)))


def test_another_training_is_measured_anew(tmp_path: Path, clock: list[float]) -> None:
    callback = LPLCallback(weight=1.0, loss=ungated, autoencoder=slow_decoder(), budget=0.2)
    run(Slow(), tmp_path / "first", callback, max_steps=15, num_batches=15)
    first = callback.budget.keep
    assert first is not None
    assert max(first) < 1
    run(Slow(), tmp_path / "second", callback, max_steps=2, num_batches=2)
    assert callback.budget.keep is None
    run(Slow(), tmp_path / "third", callback, max_steps=15, num_batches=15)
    assert callback.budget.keep == pytest.approx(first, rel=0.2), "of the same times, and other latents"


NOW = [0.0]


def pass_by_clock(block: Any, given: tuple[Tensor, ...], out: Any) -> None:
    """A pass takes 10 ms by ``NOW`` for all four samples of a batch, and a part of that for fewer."""
    NOW[0] += 0.01 * len(given[0]) / 4


class Uneven(Latents):
    """By a clock of each process: the rest of a step takes the second one three times as long as the first."""

    def on_train_start(self) -> None:
        budget.synchronize = measurement.synchronize = lambda device: NOW[0]  # type: ignore[attr-defined]

    def training_step(self, *args: Any) -> Tensor:
        NOW[0] += 0.03 * (1 + 2 * self.global_rank)
        return super().training_step(*args)


class WriteBudget(pl.Callback):
    """Leaves what each process found in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (callback,) = [c for c in trainer.callbacks if isinstance(c, LPLCallback)]  # type: ignore[attr-defined]
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(callback.budget.state_dict()))


def test_two_processes_find_and_correct_the_same(tmp_path: Path) -> None:
    model: Any = tiny_kl()
    for block in (model.decoder.mid_block, *model.decoder.up_blocks[:2]):
        block.register_forward_hook(pass_by_clock)
    callback = LPLCallback(weight=1.0, loss=ungated, autoencoder=Autoencoder(model), budget=0.25)
    callback.budget.most = 40
    strategy = DDPStrategy(process_group_backend="gloo", start_method="forkserver")
    options: dict[str, Any] = {"strategy": strategy, "devices": 2}
    run(Uneven(), tmp_path, callback, WriteBudget(tmp_path), max_steps=61, num_batches=122, **options)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["keep"][0] < 1
    assert found[0]["found"] is None or found[0]["found"]["corrections"] == 1, "the first time has been looked at"


def test_batches_without_samples_are_followed_by_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def gated(autoencoder: Autoencoder) -> LatentPerceptualLoss:
        return LatentPerceptualLoss(autoencoder, threshold=1e-9)

    callback = LPLCallback(weight=1.0, loss=gated, autoencoder=Autoencoder(tiny_kl()), budget=0.1)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run(GivesRatios(), tmp_path, callback, max_steps=26, num_batches=27)
    assert sum("no sample passed the gate" in r.message for r in caplog.records) == 2
    assert callback.budget.keep is None


def test_batches_before_its_start_are_not_timed(tmp_path: Path) -> None:
    callback = LPLCallback(weight=1.0, loss=ungated, autoencoder=slow_decoder(), budget=0.25, start_step=16)
    run(Slow(), tmp_path, callback, max_steps=24, num_batches=40)
    assert callback.budget.keep is None
    run(Slow(), tmp_path, callback, max_steps=40, num_batches=40)
    assert callback.budget.keep is not None
    assert callback.budget.keep[0] < 1
    # The same callback again: it has a loss with that subset.
    run(Slow(), tmp_path, callback, max_steps=1)


class GivesRatios(Latents):
    def auxiliary_loss(self, z0_hat: Tensor, z0: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return super().auxiliary_loss(z0_hat, z0, torch.ones(len(z0)))


def test_every_nth_step_has_the_same_mean_weight() -> None:
    """Over any n steps in a row: the expectation over a random start."""
    for n in (1, 2, 5):
        callback = LPLCallback(weight=2.0, every_n_steps=n)
        for start in range(6):
            assert sum(callback.weight_at(start + k) for k in range(n)) / n == 2.0


def test_bad_settings_are_named(tmp_path: Path) -> None:
    for share in (0.0, 1.0, -0.2, "0.15", True):
        with pytest.raises(ValueError, match="`budget` must lie between 0 and 1, a share of the time of a step"):
            LPLCallback(budget=share)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`budget` and `every_n_steps` both thin LPL out, got 0.1 and 4"):
        LPLCallback(budget=0.1, every_n_steps=4)

    def thinned(autoencoder: Autoencoder) -> LatentPerceptualLoss:
        return LatentPerceptualLoss(autoencoder, subset=Subset(keep=0.5))

    callback = LPLCallback(loss=thinned, autoencoder=Autoencoder(tiny_kl()), budget=0.1)
    with pytest.raises(ValueError, match="which has one by `subset` already"):
        run(Latents(), tmp_path, callback, max_steps=1)
