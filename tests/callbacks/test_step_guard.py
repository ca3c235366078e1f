"""Steps whose loss or gradient is not finite: what stays as it was, what is written down, what ends the run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import image_batch
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from test_module import trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lpl_lightning import EMA, Autoencoder, LatentDiffusionModule, LatentPerceptualLoss, LPLCallback, StepGuard
from lpl_lightning.losses import Execution
from lpl_lightning.step_record import StepRecord

MakeModule = Callable[..., LatentDiffusionModule]


def batches(*bad: int, count: int = 4) -> list[dict[str, Any]]:
    """Batches of which some hold one value that is not a number."""
    torch.manual_seed(3)
    found = [image_batch(3) for _ in range(count)]
    for number in bad:
        found[number]["image"][1, 0, 2, 3] = float("nan")
    return found


class Watch(pl.Callback):
    """Keeps after each batch the weights, the optimizer's state and the average; makes gradients what they are not."""

    def __init__(self, bad_gradients: tuple[int, ...] = ()) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.bad = bad_gradients

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        def spoil(gradient: Tensor) -> Tensor:
            return gradient * (float("inf") if trainer.fit_loop.total_batch_idx in self.bad else 1.0)

        pl_module.denoiser.backbone.proj_out.bias.register_hook(spoil)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        found = {f"weight {name}": value for name, value in pl_module.state_dict().items()}
        for number, state in trainer.optimizers[0].state_dict()["state"].items():
            found |= {f"{name} {number}": value for name, value in state.items()}
        averages: list[Any] = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]
        for average in averages:
            for decay, values in average._averages.items():
                found |= {f"average {decay} {name}": value for name, value in values.items()}
        self.states.append({name: value.detach().clone() for name, value in found.items()})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(
    module: LatentDiffusionModule, tmp_path: Path, data: list[dict[str, Any]], *callbacks: pl.Callback, **options: Any
) -> pl.Trainer:
    options = {"max_steps": len(data), "limit_val_batches": 0} | options
    run = trainer(tmp_path, callbacks=list(callbacks), **options)
    loader: Any = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    run.fit(module, loader, loader)
    return run


def scheduled(make_module: MakeModule) -> LatentDiffusionModule:
    torch.manual_seed(0)
    return make_module(
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    )


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bf16-mixed"},
    "clipping": {"gradient_clip_val": 0.1},
}


@pytest.mark.parametrize("source", ["loss", "gradient"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_left_out_changes_nothing(
    name: str, source: str, make_module: MakeModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights, moments, their count, and both averages are those before it; the step and its rate count."""
    watch, guard = Watch((2,) if source == "gradient" else ()), StepGuard("skip")
    data = batches(2) if source == "loss" else batches()
    run = fit(scheduled(make_module), tmp_path, data, EMA(decay=0.9, also=[0.5]), guard, watch, **CASES[name])
    before, left_out, after = watch.states[1:]
    assert any(key.startswith("exp_avg_sq") for key in before)
    assert {key[:11] for key in before if key.startswith("average")} == {"average 0.9", "average 0.5"}
    assert same(before, left_out)
    for kind in ("weight", "exp_avg", "step", "average 0.9", "average 0.5"):
        keys = [key for key in after if key.startswith(kind)]
        assert not same({key: after[key] for key in keys}, {key: before[key] for key in keys}), kind
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert run.global_step == 4
    assert watch.rates == pytest.approx([0.01 / 2, 0.01 / 3, 0.01 / 4, 0.01 / 5])  # of the steps to come
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    assert run.callback_metrics["skipped_steps"] == 1
    (message,) = [record.getMessage() for record in caplog.records if record.name.endswith("step_guard")]
    what = "the loss and the gradient of" if source == "loss" else "the gradient of denoiser.backbone.proj_out.bias."
    assert f"Optimizer step 2 is not finite: {what}" in message


def test_without_it_such_a_step_ends_the_model(make_module: MakeModule, tmp_path: Path) -> None:
    watch = Watch()
    fit(scheduled(make_module), tmp_path, batches(2), watch)
    assert not all(bool(value.isfinite().all()) for value in watch.states[-1].values())


def test_all_batches_of_a_step_are_left_out(make_module: MakeModule, tmp_path: Path) -> None:
    """The first of the second step's two batches is bad."""
    watch, guard = Watch(), StepGuard("skip")
    data = batches(2, count=6)
    run = fit(scheduled(make_module), tmp_path, data, guard, watch, accumulate_grad_batches=2, max_steps=3)
    assert run.global_step == 3
    assert same(watch.states[1], watch.states[3])
    assert not same(watch.states[3], watch.states[5])
    record = StepRecord.read(next((tmp_path / "nonfinite").glob("step-*-rank-0")))
    assert [batch["number"] for batch in record.about["batches"]] == [2, 3]
    assert record.about["batches"][0]["loss"] == "nan"
    for found, given in zip(record.batches, data[2:4], strict=True):
        torch.testing.assert_close(found, given, rtol=0, atol=0, equal_nan=True)


def test_a_run_is_refused_before_its_weights_are_touched(make_module: MakeModule, tmp_path: Path) -> None:
    module, watch = scheduled(make_module), Watch()
    with pytest.raises(FloatingPointError) as error:
        fit(module, tmp_path, batches(2), StepGuard(), watch)
    assert same({f"weight {k}": v for k, v in module.state_dict().items()}, _weights(watch.states[-1]))
    folder = tmp_path / "nonfinite" / "step-00000002-rank-0"
    for part in (
        "Optimizer step 2 is not finite: the loss and the gradient of",
        f"lpl replay --record {folder}",
        "`skip`",
    ):
        assert part in str(error.value)
    record = StepRecord.read(folder)
    assert record.weights is not None
    written = load_file(record.weights)
    assert same({f"weight {key}": value for key, value in written.items()}, _weights(watch.states[-1]))
    assert record.about["module"]["lpl_lightning_seed"] == module._draw_seed
    assert json.loads((folder / "record.json").read_text())["step"] == 2
    assert len(record.about["gradients_not_finite"]) > 10


def _weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.startswith("weight")}


def test_many_in_a_row_end_the_run_and_few_are_written_down(make_module: MakeModule, tmp_path: Path) -> None:
    guard = StepGuard("skip", max_in_a_row=3, max_records=2)
    with pytest.raises(FloatingPointError, match="the last of 3 in a row"):
        fit(scheduled(make_module), tmp_path, batches(0, 1, 3, 5, 6, 7, count=9), guard)
    assert (guard.skipped, guard.in_a_row) == (5, 3)
    names = sorted(path.name for path in (tmp_path / "nonfinite").iterdir())
    # Those of the first row, whose weights are the same.
    assert names == ["step-00000000-rank-0", "step-00000000-weights.safetensors", "step-00000001-rank-0"]
    second = StepRecord.read(tmp_path / "nonfinite" / names[2])
    assert second.weights == tmp_path / "nonfinite" / names[1]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_counting_goes_on_after_a_stop(make_module: MakeModule, tmp_path: Path) -> None:
    data = batches(2, 3, count=5)
    guard = StepGuard("skip", max_in_a_row=2)
    run = fit(scheduled(make_module), tmp_path, data[:3], guard)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert guard.in_a_row == 1
    again = StepGuard("skip", max_in_a_row=2)
    run = trainer(tmp_path, callbacks=[again], max_steps=5, limit_val_batches=0)
    loader: Any = DataLoader(data[3:], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="Optimizer step 3 .* the last of 2 in a row"):
        run.fit(scheduled(make_module), loader, loader, ckpt_path=tmp_path / "a.ckpt")
    assert again.skipped == 1
    record = StepRecord.read(tmp_path / "nonfinite" / "step-00000003-rank-0")
    assert record.about["checkpoint"] == str(tmp_path / "a.ckpt")


def test_what_a_run_that_is_evaluated_left_out_does_not_count(make_module: MakeModule, tmp_path: Path) -> None:
    run = fit(scheduled(make_module), tmp_path, batches(1, 2, count=3), StepGuard("skip"))
    run.save_checkpoint(tmp_path / "a.ckpt")
    guard = StepGuard("skip")
    other = trainer(tmp_path, callbacks=[guard], limit_val_batches=1)
    loader: Any = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    other.validate(scheduled(make_module), loader, ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    assert (guard.skipped, guard.in_a_row) == (0, 0)
    for _ in range(2):  # nor does what it left out in another training
        fit(scheduled(make_module), tmp_path, batches(1, 2, count=3), guard)
        assert (guard.skipped, guard.in_a_row) == (2, 2)


class Float16(MixedPrecision):
    """Lightning takes bfloat16 on a CPU where float16 is asked for by name."""

    def __init__(self, scale: float) -> None:
        self.own = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        super().__init__("16-mixed", "cpu", self.own)


@pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step:UserWarning"
)  # where a scaler leaves a step out
def test_overflows_of_float16_are_the_scalers(make_module: MakeModule, tmp_path: Path) -> None:
    plugin, guard, watch = Float16(2.0**40), StepGuard("raise"), Watch()
    fit(scheduled(make_module), tmp_path, batches(count=6), guard, watch, plugins=[plugin], precision=None)
    assert plugin.own.get_scale() < 2.0**40
    assert same(watch.states[0], watch.states[1])
    assert guard.skipped == 0
    plugin, guard, watch = Float16(4.0), StepGuard("skip"), Watch((3, 4, 5))
    fit(scheduled(make_module), tmp_path, batches(1, count=6), guard, watch, plugins=[plugin], precision=None)
    assert same(watch.states[0], watch.states[1]), "a loss that is not finite"
    # From 4: 2 after the loss, then 1 and below, where what overflows would do so without any scale.
    assert guard.skipped == 3
    assert all(bool(value.isfinite().all()) for value in watch.states[-1].values())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_an_optimizer_that_looks_for_overflows_itself(make_module: MakeModule, tmp_path: Path) -> None:
    """A fused one: the scaler leaves its gradients scaled, and the looking to it."""
    torch.manual_seed(0)
    module = make_module(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True))
    plugin, guard, watch = Float16(4.0), StepGuard("skip"), Watch()
    fit(module, tmp_path, batches(2), guard, watch, plugins=[plugin], precision=None)
    assert guard.skipped == 1
    weights = [_weights(state) for state in watch.states]
    assert same(weights[1], weights[2])
    assert not same(weights[2], weights[3])
    assert all(bool(value.isfinite().all()) for value in weights[3].values())


def test_a_full_disk_does_not_hide_the_error(
    make_module: MakeModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ("lpl_lightning.step_record", "lpl_lightning.callbacks.step_guard"):
        monkeypatch.setattr(f"{place}.save_file", full)
    with pytest.raises(FloatingPointError, match="Optimizer step 1 is not finite") as error:
        fit(scheduled(make_module), tmp_path, batches(1), StepGuard())
    assert "lpl replay" not in str(error.value)
    said = [record.getMessage() for record in caplog.records if record.name.endswith("step_guard")]
    assert [message.count("No space left") for message in said] == [1, 1]
    assert list((tmp_path / "nonfinite").iterdir()) == []


def test_lpl_leaves_what_is_not_finite_to_it(make_module: MakeModule, tmp_path: Path) -> None:
    """A stage of the decoder overflows at the second step: alone LPL raises, with the guard the step is left out."""

    def overflowing() -> tuple[LatentDiffusionModule, LPLCallback]:
        module = scheduled(make_module)
        calls: list[int] = []

        def overflow(stage: Any, inputs: Any, output: Tensor) -> Tensor:
            calls.append(1)
            return output * float("inf") if len(calls) in (3, 4) else output

        module.autoencoder.model.decoder.conv_in.register_forward_hook(overflow)
        return module, LPLCallback(loss=everything)

    def everything(autoencoder: Autoencoder) -> LatentPerceptualLoss:
        whole = Execution(chunk_size=3)
        return LatentPerceptualLoss(autoencoder, threshold=float("inf"), mask_outliers=False, execution=whole)

    module, lpl = overflowing()
    with pytest.raises(FloatingPointError, match="arose in"):
        fit(module, tmp_path / "alone", batches(), lpl)
    module, lpl = overflowing()
    watch, guard = Watch(), StepGuard("skip")
    fit(module, tmp_path / "guarded", batches(), lpl, guard, watch)
    assert guard.skipped == 1
    assert same(watch.states[0], watch.states[1])
    assert not same(watch.states[1], watch.states[2])


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="`policy` must be raise or skip"):
        StepGuard("ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`max_in_a_row`"):
        StepGuard(max_in_a_row=0)


def test_nothing_is_written_in_a_rehearsal(make_module: MakeModule, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        fit(scheduled(make_module), tmp_path, batches(0), StepGuard(), fast_dev_run=2)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_module_keeps_no_batches(make_module: MakeModule, tmp_path: Path) -> None:
    guard = StepGuard("skip")
    fit(scheduled(make_module), tmp_path, batches(count=2), guard)
    assert guard._batches == []
    copy.deepcopy(guard)
