from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import ROOT, tiny_kl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from test_mixin import Foreign, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lpl_lightning import DDPM, EMA, Autoencoder, LatentPerceptualLoss, LPLCallback, LPLMixin, StepGuard
from lpl_lightning.arguments import NotFiniteError
from lpl_lightning.losses import Execution, Threshold
from lpl_lightning.losses.options import LossOptions


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
    make = partial(LatentPerceptualLoss, threshold=0.5, reference_side=0)
    trainer = fit(Foreign(), tmp_path, LPLCallback(loss=make, autoencoder=autoencoder))
    # Foreign's ratios at sigma = 0.1, 0.37, 0.63 and 0.9 are 0.10, 0.39, 0.82 and 2.06.
    assert trainer.callback_metrics["gate_share"] == 0.5


def test_a_loss_that_is_made_already_is_refused() -> None:
    made: Any = LatentPerceptualLoss(Autoencoder(tiny_kl()))
    with pytest.raises(ValueError, match=r"`loss` .*, got a LatentPerceptualLoss that is made.*functools.partial\("):
        LPLCallback(loss=made)


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    pair = [LPLCallback(autoencoder=Autoencoder(tiny_kl())) for _ in range(2)]
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LPLCallback`"):
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
        ({"weight": math.nan}, "`weight` must be 0 or more, got nan"),
        ({"start_step": 0.5}, "`start_step` must be a whole number, got 0.5"),
        ({"every_n_steps": 2.5}, "`every_n_steps` must be a whole number, got 2.5"),
        ({"weight": "auto", "calibration_steps": 2.5}, "`calibration_steps` must be a whole number, got 2.5"),
        ({"weight": "half"}, "`weight` must be a number or 'auto', got 'half'"),
        ({"weight": "auto", "target_share": 1.0}, "`target_share` must lie between 0 and 1, got 1.0"),
        ({"weight": "auto", "calibration_steps": 0}, "`calibration_steps` must be 1 or more"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LPLCallback(**options)


class Recorder(Logger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.seen.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Latents(LPLMixin, pl.LightningModule):
    """A user's module that gives its prediction to ``auxiliary_loss``; its losses are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(4, 4, 3, padding=1)
        self.before = copy.deepcopy(self.net).requires_grad_(False)
        self.rests: list[float] = []
        self.terms: list[float] = []
        self.measured: list[tuple[Tensor, Tensor, Tensor]] = []

    def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        noise = torch.randn(z0.shape, generator=generator)
        t = torch.linspace(0.05, 0.25, len(z0)).view(-1, 1, 1, 1)
        z_t = (1 - t) * z0 + t * noise
        prediction = self.net(z_t)
        self.measured.append((z_t.detach(), t, z0))
        rest = nn.functional.mse_loss(prediction, noise - z0)
        term = self.auxiliary_loss(z_t - t * prediction, z0, (t / (1 - t)).flatten(), prediction=prediction)
        self.rests.append(rest.item())
        self.terms.append(term.item())
        return rest + term

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def run(module: pl.LightningModule, tmp_path: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    latents: Any = list(torch.randn(4 * options.pop("num_batches", 1), 4, 4, 4))
    ckpt_path = options.pop("ckpt_path", None)
    settings: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
    }
    trainer = pl.Trainer(**(settings | options))
    trainer.fit(module, DataLoader(latents, batch_size=4), ckpt_path=ckpt_path)
    return trainer


def ungated(autoencoder: Autoencoder) -> LatentPerceptualLoss:
    return LatentPerceptualLoss(autoencoder, reference_side=0, execution=Execution(chunk_size=4))


def test_auto_makes_lpl_the_share_that_is_asked_for(tmp_path: Path) -> None:
    """Four batches are measured and not trained on; then the share is a fifth, on latents that hardly change."""
    module = Latents()
    autoencoder = Autoencoder(tiny_kl())
    graphs: list[bool] = []
    autoencoder.model.decoder.mid_block.register_forward_hook(lambda _m, _i, out: graphs.append(out.requires_grad))
    callback = LPLCallback(weight="auto", calibration_steps=4, loss=ungated, autoencoder=autoencoder)
    run(module, tmp_path, callback, max_steps=8)
    assert module.terms[:4] == [0.0] * 4
    assert graphs == [False, False] * 4 + [False, True] * 4, "a measurement keeps no graph"
    weight = callback.weight
    assert weight is not None
    lpl = ungated(callback.autoencoder)  # type: ignore[arg-type]
    measured = []
    for z_t, t, z0 in module.measured[:4]:
        prediction = module.net(z_t)  # moved by steps of 1e-4 since
        measured.append(lpl(z_t - t * prediction, z0).mean().item())
    rest, term = sum(module.rests[:4]) / 4, sum(measured) / 4
    assert weight == pytest.approx(0.25 * rest / term, rel=1e-2)
    shares = [term / (term + rest) for term, rest in zip(module.terms[4:], module.rests[4:], strict=True)]
    assert sum(shares) / 4 == pytest.approx(0.2, abs=0.03)
    assert callback.weight == weight


def test_auto_starts_late_ramps_after_it_and_keeps_to_its_steps(tmp_path: Path) -> None:
    module = Latents()
    callback = LPLCallback(
        weight="auto", start_step=2, ramp_steps=1, calibration_steps=2, loss=ungated, autoencoder=Autoencoder(tiny_kl())
    )
    run(module, tmp_path, callback, max_steps=7)
    assert callback.weight is not None
    assert [bool(term) for term in module.terms] == [False] * 4 + [True] * 3
    assert callback.weight_at(4) == pytest.approx(callback.weight / 2)
    assert callback.weight_at(5) == callback.weight


@pytest.mark.parametrize("stopped_at", [2, 5])
def test_auto_goes_on_from_a_checkpoint(tmp_path: Path, stopped_at: int) -> None:
    """In the midst of its measurement and after it: the weight is that of a run in one piece."""

    def callback() -> LPLCallback:
        torch.manual_seed(3)
        return LPLCallback(weight="auto", calibration_steps=4, loss=ungated, autoencoder=Autoencoder(tiny_kl()))

    def module() -> Latents:
        torch.manual_seed(4)
        return Latents()

    whole = callback()
    run(module(), tmp_path, whole, max_steps=7)
    first = run(module(), tmp_path, callback(), max_steps=stopped_at)
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = callback()
    run(module(), tmp_path, resumed, max_steps=7, ckpt_path=tmp_path / "stopped.ckpt")
    assert whole.weight is not None
    assert resumed.weight == pytest.approx(whole.weight, rel=1e-6)
    assert resumed.weight_at(6) == pytest.approx(whole.weight_at(6), rel=1e-6)


class Twice(Latents):
    """Adds the term of each half of a batch."""

    def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
        halves: list[Tensor] = [super(Twice, self).training_step(half, batch_idx) for half in z0.chunk(2)]
        return halves[0] + halves[1]


def test_auto_counts_every_call_of_a_step(tmp_path: Path) -> None:
    module, autoencoder = Twice(), Autoencoder(tiny_kl())
    callback = LPLCallback(weight="auto", calibration_steps=4, loss=ungated, autoencoder=autoencoder)
    run(module, tmp_path, callback, max_steps=8)
    share = sum(module.terms[8:]) / (sum(module.terms[8:]) + sum(module.rests[8:]))
    assert share == pytest.approx(0.2, abs=0.03)


class AskedTwice(torch.optim.SGD):
    """An optimizer that asks for the loss twice a step, as LBFGS and SAM do."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class Resting(Latents):
    """Nothing is learned, so that a loss asked for twice is the same."""

    kind: type[torch.optim.SGD] = torch.optim.SGD
    fails_at: int | None = None

    def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(z0, 0)
        if len(self.terms) == self.fails_at:
            raise RuntimeError("out of memory")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.kind(self.parameters(), lr=0.0)


def found_by_auto(module: Resting, tmp_path: Path, logger: Recorder | None = None) -> float:
    torch.manual_seed(3)
    callback = LPLCallback(weight="auto", calibration_steps=3, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    module.net.load_state_dict(Resting().net.state_dict())
    options: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1} if logger else {}
    if module.fails_at is None:
        run(module, tmp_path, callback, max_steps=4, **options)
    else:
        settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        trainer = pl.Trainer(callbacks=[callback], max_steps=4, **settings)
        torch.manual_seed(0)
        latents: Any = list(torch.randn(4, 4, 4, 4))
        loader = DataLoader(latents, batch_size=4)
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.fit(module, loader)
        module.fails_at = None
        trainer.fit(module, loader)
    assert callback.weight is not None
    return callback.weight


def test_auto_counts_a_loss_that_is_asked_for_twice_once(tmp_path: Path) -> None:
    """A closure that an optimizer calls again is the same batch, and not another term of it."""
    once, twice, logger = Resting(), Resting(), Recorder()
    twice.kind = AskedTwice
    weight = found_by_auto(once, tmp_path)
    assert found_by_auto(twice, tmp_path, logger) == pytest.approx(weight, rel=1e-6)
    assert len(twice.terms) == 2 * len(once.terms)
    (logged,) = {entry["loss_lpl"] for entry in logger.seen[3:] if "loss_lpl" in entry}
    assert logged * weight == pytest.approx(once.terms[-1], rel=1e-5)


def test_auto_forgets_a_step_that_failed(tmp_path: Path) -> None:
    """As where a cell of a notebook is run again after an error."""
    weight, failing = found_by_auto(Resting(), tmp_path), Resting()
    failing.fails_at = 2
    assert found_by_auto(failing, tmp_path) == pytest.approx(weight, rel=1e-6)


def test_auto_says_that_a_run_ended_before_it_found_the_weight(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After two batches of three; in a longer run it is found."""
    autoencoder = Autoencoder(tiny_kl())
    for steps, said in ((2, ["2 of the 3 batches of `calibration_steps` were measured"]), (3, [])):
        callback = LPLCallback("auto", every_n_steps=4, calibration_steps=3, loss=ungated, autoencoder=autoencoder)
        caplog.clear()
        run(Latents(), tmp_path, callback, max_steps=steps)
        found = [record.message for record in caplog.records if "LPL was not trained on" in record.message]
        assert len(found) == len(said)
        assert all(part in message for part, message in zip(said, found, strict=True))
        assert (callback.weight is None) == bool(said)


def test_auto_measures_each_batch_also_where_few_are_trained_on(tmp_path: Path) -> None:
    """Else the weight of a loss at each fourth step takes four times as many steps to be found."""
    module, autoencoder = Latents(), Autoencoder(tiny_kl())
    callback = LPLCallback("auto", every_n_steps=4, calibration_steps=3, loss=ungated, autoencoder=autoencoder)
    run(module, tmp_path, callback, max_steps=9)
    assert callback.weight is not None
    assert [bool(term) for term in module.terms] == [step in (3, 7) for step in range(9)]
    assert [callback.weight_at(step) for step in (3, 4)] == [4 * callback.weight, 0]


def test_auto_goes_on_with_another_share(tmp_path: Path) -> None:
    autoencoder = Autoencoder(tiny_kl())
    given: dict[str, Any] = {"weight": "auto", "calibration_steps": 1, "loss": ungated, "autoencoder": autoencoder}
    first, second = LPLCallback(target_share=0.2, **given), LPLCallback(target_share=0.5, **given)
    run(Latents(), tmp_path, first, max_steps=2).save_checkpoint(tmp_path / "stopped.ckpt")
    run(Latents(), tmp_path, second, max_steps=3, ckpt_path=tmp_path / "stopped.ckpt")
    assert first.weight is not None
    # Of the same two means, 1 / 1 of the rest rather than 1 / 4.
    assert second.weight == pytest.approx(4 * first.weight)


def test_auto_measures_anew_in_another_training(tmp_path: Path) -> None:
    """As where a cell of a notebook makes the module and the trainer anew, and not the callback."""
    callback = LPLCallback(weight="auto", calibration_steps=2, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    weights = []
    for _ in range(2):
        module = Latents()
        run(module, tmp_path, callback, max_steps=4)
        assert [bool(term) for term in module.terms] == [False] * 2 + [True] * 2
        weights.append(callback.weight)
    assert weights[0] != weights[1]


def test_auto_says_what_it_cannot_do(tmp_path: Path) -> None:
    class Manual(Latents):
        def training_step(self, z0: Tensor, batch_idx: int) -> None:  # type: ignore[override]
            super().training_step(z0, batch_idx)

    autoencoder = Autoencoder(tiny_kl())
    with (
        pytest.warns(UserWarning, match="returned `None`"),
        pytest.raises(ValueError, match="needs the loss that `training_step` returns, got NoneType"),
    ):
        run(Manual(), tmp_path, LPLCallback(weight="auto", autoencoder=autoencoder), max_steps=1)
    gated = LPLCallback(
        weight="auto",
        calibration_steps=2,
        loss=partial(LatentPerceptualLoss, threshold=1e-3),
        autoencoder=autoencoder,
    )
    with pytest.raises(ValueError, match="no sample passed the gate"):
        run(Latents(), tmp_path, gated, max_steps=4)


def test_diagnostics_are_logged_at_steps_that_are_logged_and_not_computed_at_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    evaluate = LatentPerceptualLoss.evaluate

    def watch(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(args[3])
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(LatentPerceptualLoss, "evaluate", watch)
    logger = Recorder()
    callback = LPLCallback(weight=2.0, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    run(Latents(), tmp_path, callback, max_steps=6, logger=logger, log_every_n_steps=2, num_batches=2)
    assert asked == [False, True] * 3
    stages = [
        f"{kind}/{name}"
        for kind in ("lpl_depth", "lpl_share", "lpl_masked", "lpl_variance_ratio")
        for name in ("mid", "up_0", "up_1", "up_2")
    ]
    entries = [metrics for metrics in logger.seen if "loss_lpl" in metrics]
    assert len(entries) == 3
    for metrics in entries:
        assert set(metrics) >= {*stages, *(f"lpl_noise/{k}" for k in range(1, 5)), "lpl_gradient_ratio", "lpl_weight"}


def test_the_gradient_ratio_is_that_of_two_separate_backward_passes(tmp_path: Path) -> None:
    """Recomputed for the same weights: the gradients at the prediction of each part of the loss alone."""
    logger, module = Recorder(), Latents()
    callback = LPLCallback(weight=2.0, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    before = copy.deepcopy(module.net)
    run(module, tmp_path, callback, max_steps=1, logger=logger, log_every_n_steps=1, accumulate_grad_batches=1)
    ((z_t, t, z0),) = module.measured
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    prediction = before(z_t)
    lpl = ungated(callback.autoencoder)  # type: ignore[arg-type]
    term = 2.0 * lpl(z_t - t * prediction, z0, (t / (1 - t)).flatten()).mean()
    rest = nn.functional.mse_loss(prediction, noise - z0)
    gradients = [torch.autograd.grad(part, prediction, retain_graph=True)[0].norm() for part in (term, rest)]
    logged = [m["lpl_gradient_ratio"] for m in logger.seen if "lpl_gradient_ratio" in m]
    assert logged == [pytest.approx((gradients[0] / gradients[1]).item(), rel=1e-4)]


def test_a_timestep_threshold_counts_in_the_modules_own_chain(make_module: Any, tmp_path: Path) -> None:
    module = make_module(dit=True, noise=DDPM(beta_schedule="linear"))
    made: list[LatentPerceptualLoss] = []

    def make(autoencoder: Autoencoder) -> LatentPerceptualLoss:
        made.append(LatentPerceptualLoss(autoencoder, threshold=Threshold(ddpm_timestep=300), reference_side=0))
        return made[-1]

    callback = LPLCallback(loss=make)
    callback.setup(pl.Trainer(logger=False), module, "fit")
    alpha, sigma = module.noise.alpha_sigma(torch.tensor([300.0, 301.0]))
    assert made[0].passes(sigma / alpha, torch.zeros(1, 4, 4, 4)).tolist() == [True, False]


class WriteWeight(pl.Callback):
    """Leaves what each process found in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (callback,) = [c for c in trainer.callbacks if isinstance(c, LPLCallback)]  # type: ignore[attr-defined]
        assert isinstance(pl_module, Latents)
        lpl = ungated(callback.autoencoder)  # type: ignore[arg-type]
        terms = [lpl(z_t - t * pl_module.before(z_t), z0).mean().item() for z_t, t, z0 in pl_module.measured[:2]]
        found = {"weight": callback.weight, "rest": sum(pl_module.rests[:2]) / 2, "term": sum(terms) / 2}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


def test_auto_finds_one_weight_on_two_processes(tmp_path: Path) -> None:
    """Each process sees half of the data, and both take the weight that the means over both give."""
    callback = LPLCallback(weight="auto", calibration_steps=2, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    run(
        Latents(),
        tmp_path,
        callback,
        WriteWeight(tmp_path),
        max_steps=3,
        strategy=DDPStrategy(process_group_backend="gloo", start_method="forkserver"),
        devices=2,
        num_batches=4,
    )
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["weight"] == found[1]["weight"] > 0
    rest, term = (sum(process[name] for process in found) / 2 for name in ("rest", "term"))
    assert found[0]["weight"] == pytest.approx(0.25 * rest / term, rel=1e-3)
    assert abs(0.25 * found[0]["rest"] / found[0]["term"] / found[0]["weight"] - 1) > 3e-3, "not that of one alone"


@pytest.mark.parametrize("calibration_steps", [2, 4])
def test_auto_counts_accumulated_batches_in_full(tmp_path: Path, calibration_steps: int) -> None:
    """Lightning divides the loss of each batch that it accumulates; the share must not change with it.

    Nor does LPL begin with the last batches of a step whose first were without it.
    """
    torch.manual_seed(1)
    module = Latents()
    autoencoder = Autoencoder(tiny_kl())
    callback = LPLCallback(weight="auto", calibration_steps=calibration_steps, loss=ungated, autoencoder=autoencoder)
    run(module, tmp_path, callback, max_steps=2, num_batches=8, accumulate_grad_batches=4)
    assert [bool(term) for term in module.terms] == [False] * 4 + [True] * 4
    share = sum(module.terms[4:]) / (sum(module.terms[4:]) + sum(module.rests[4:]))
    assert share == pytest.approx(0.2, abs=0.04)


def test_auto_leaves_out_batches_that_are_not_finite_and_refuses_a_negative_rest(tmp_path: Path) -> None:
    class Odd(Latents):
        """Its loss has an offset, which changes no gradient."""

        offsets: tuple[float, ...] = (0.0, math.nan, 0.0, 0.0)

        def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(z0, batch_idx) + self.offsets[self.global_step]

    def callback() -> LPLCallback:
        torch.manual_seed(5)
        return LPLCallback(weight="auto", calibration_steps=3, loss=ungated, autoencoder=Autoencoder(tiny_kl()))

    torch.manual_seed(6)
    odd, calibrated = Odd(), callback()
    run(odd, tmp_path, calibrated, max_steps=3)
    lpl = ungated(calibrated.autoencoder)  # type: ignore[arg-type]
    terms = [lpl(z_t - t * odd.before(z_t), z0).mean().item() for z_t, t, z0 in (odd.measured[0], odd.measured[2])]
    expected = 0.25 * (odd.rests[0] + odd.rests[2]) / sum(terms)
    assert calibrated.weight == pytest.approx(expected, rel=1e-2)
    negative = Odd()
    negative.offsets = (-100.0,) * 4
    with pytest.raises(ValueError, match="found a loss without it of -9.* over 3 batches"):
        run(negative, tmp_path, callback(), max_steps=4)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_auto_leaves_out_batches_that_training_leaves_out(tmp_path: Path) -> None:
    """As if they were not there; with manual optimization a step that returns nothing says nothing of its loss."""

    class Skips(Latents):
        skipped: tuple[int, ...] = (0, 2)

        def training_step(self, z0: Tensor, batch_idx: int) -> Tensor | None:  # type: ignore[override]
            loss = super().training_step(z0, batch_idx)
            return None if len(self.rests) - 1 in self.skipped else loss

    torch.manual_seed(7)
    module, autoencoder = Skips(), Autoencoder(tiny_kl())
    callback = LPLCallback("auto", calibration_steps=4, loss=ungated, autoencoder=autoencoder)
    run(module, tmp_path, callback, max_steps=4)
    lpl = ungated(autoencoder)
    terms = [lpl(z_t - t * module.before(z_t), z0).mean().item() for z_t, t, z0 in module.measured[1::2]]
    assert callback.weight == pytest.approx(0.25 * (module.rests[1] + module.rests[3]) / sum(terms), rel=1e-2)
    module = Skips()
    module.skipped = (0, 1, 2, 3)
    with pytest.raises(ValueError, match="needs the loss that `training_step` returns, got NoneType"):
        run(module, tmp_path, callback, max_steps=8)

    class Silent(TwoOptimizers):
        def training_step(self, z0: Tensor, batch_idx: int) -> None:  # type: ignore[override]
            super().training_step(z0, batch_idx)

    silent = Silent()
    with pytest.raises(ValueError, match="needs the loss that `training_step` returns, got NoneType"):
        run(silent, tmp_path, callback, max_steps=8)
    assert len(silent.terms) == 1


class TwoOptimizers(Latents):
    """Manual optimization, each batch two updates."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(z0, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=1e-4) for p in self.net.parameters()]


def test_steps_are_counted_once_with_several_optimizers(tmp_path: Path) -> None:
    module = TwoOptimizers()
    callback = LPLCallback(weight=1.0, start_step=2, every_n_steps=2, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    run(module, tmp_path, callback, max_steps=12)
    assert [bool(term) for term in module.terms] == [False, False, True, False, True, False]


def test_averages_take_in_each_nth_step_of_several_optimizers(tmp_path: Path) -> None:
    for every, updates in ((1, 6), (2, 3), (4, 2)):
        average = EMA(every_n_steps=every)
        run(TwoOptimizers(), tmp_path, average, max_steps=12)
        assert average._updates == {0.9999: updates}


def test_steps_are_those_of_the_batches_after_a_checkpoint_within_one(tmp_path: Path) -> None:
    """It holds the batch's updates, of which callbacks that come later have not been told."""

    class Early(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    def callback() -> LPLCallback:
        return LPLCallback(weight=1.0, start_step=4, loss=ungated, autoencoder=Autoencoder(tiny_kl()))

    whole, resumed = TwoOptimizers(), TwoOptimizers()
    run(whole, tmp_path, Early(), callback(), max_steps=12)
    run(resumed, tmp_path, callback(), max_steps=12, ckpt_path=tmp_path / "early.ckpt")
    assert [bool(term) for term in whole.terms] == [False] * 4 + [True] * 2
    assert [bool(term) for term in resumed.terms] == [False, True, True]


@pytest.mark.parametrize(("batches", "count"), [(25, 20), (3, 3)])
def test_a_module_that_never_asks_for_the_loss_is_told(tmp_path: Path, batches: int, count: int) -> None:
    class Forgets(Latents):
        def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
            loss: Tensor = self.net(z0).square().mean()
            return loss

        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:  # as a validation between them does
            self.trainer.training = False
            self.auxiliary_loss(batch, batch)
            self.trainer.training = True

        def log(self, *_: Any, **__: Any) -> None:
            pass

    callback = LPLCallback(weight=1.0, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    said = f"LPL has no part in training: in {count} batches `training_step` never called `self.auxiliary_loss"
    with pytest.warns(UserWarning, match=said) as warned:
        run(Forgets(), tmp_path, callback, max_steps=batches, num_batches=batches)
    assert [said in str(one.message) for one in warned].count(True) == 1
    run(Latents(), tmp_path, callback, max_steps=batches, num_batches=batches)


def test_the_weight_is_logged_as_it_is(tmp_path: Path) -> None:
    """Also under Lightning's precisions that lower PyTorch's default."""
    logger = Recorder()
    callback = LPLCallback(weight=0.01234567, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    run(Latents(), tmp_path, callback, max_steps=1, logger=logger, log_every_n_steps=1, precision="bf16-true")
    (weight,) = (metrics["lpl_weight"] for metrics in logger.seen if "lpl_weight" in metrics)
    assert weight == pytest.approx(0.01234567, rel=1e-6)


def test_a_checkpoint_that_is_tested_takes_no_steps_back(tmp_path: Path) -> None:
    class Looked(TwoOptimizers):
        def test_step(self, z0: Tensor, batch_idx: int) -> None:
            pass

    module = Looked()
    callback = LPLCallback(weight=1.0, start_step=5, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    trainer = run(module, tmp_path, callback, max_steps=4)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    latents: Any = list(torch.randn(4, 4, 4, 4))
    loader = DataLoader(latents, batch_size=4)
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, loader)
    trainer.test(module, loader, ckpt_path=tmp_path / "second.ckpt", weights_only=True)
    trainer.fit_loop.epoch_loop.max_steps = 14
    trainer.fit(module, loader)
    assert [bool(term) for term in module.terms] == [False] * 5 + [True] * 2


def test_a_checkpoint_that_is_tested_leaves_the_weight_that_was_found(tmp_path: Path) -> None:
    """Also one of a longer run, whose weight was found later than this one is."""

    class Looked(Latents):
        def test_step(self, z0: Tensor, batch_idx: int) -> None:
            pass

    def callback(start_step: int) -> LPLCallback:
        decoder = Autoencoder(tiny_kl())
        return LPLCallback(weight="auto", start_step=start_step, calibration_steps=2, loss=ungated, autoencoder=decoder)

    later = callback(6)
    run(Looked(), tmp_path, later, max_steps=9).save_checkpoint(tmp_path / "other.ckpt")
    module, found = Looked(), callback(0)
    trainer = run(module, tmp_path, found, max_steps=4)
    weight = found.weight
    latents: Any = list(torch.randn(4, 4, 4, 4))
    loader = DataLoader(latents, batch_size=4)
    for _ in range(2):
        trainer.test(module, loader, ckpt_path=tmp_path / "other.ckpt", weights_only=True)
        assert found.weight == later.weight != weight, "what is evaluated has its own"
    trainer.test(module, loader)
    assert found.weight == weight, "what is trained has the training's"
    trainer.test(module, loader, ckpt_path=tmp_path / "other.ckpt", weights_only=True)
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, loader)
    assert found.weight == weight
    assert [bool(term) for term in module.terms] == [False] * 2 + [True] * 6


class Unequal(Latents):
    """The second optimizer begins at the fifth batch, and a batch in three is left to the next one's step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.batches = 0

    def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(z0, batch_idx)
        self.manual_backward(loss)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers[: self.batches // 4 + 1] if self.batches % 3 != 2 else []:
            optimizer.step()
            optimizer.zero_grad()
        self.batches += 1
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=1e-4) for p in self.net.parameters()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches"] = self.batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches = checkpoint["batches"]


@pytest.mark.parametrize("stopped_at", [None, 3, 7])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_steps_of_optimizers_that_do_not_step_equally_often(tmp_path: Path, stopped_at: int | None) -> None:
    """Batches in which any did, of 12 the ones but 2, 5, 8 and 11; also over a stop, at so many updates of all."""
    autoencoder = Autoencoder(tiny_kl())

    def callbacks() -> tuple[LPLCallback, EMA]:
        return LPLCallback(weight=1.0, start_step=3, every_n_steps=2, loss=ungated, autoencoder=autoencoder), EMA()

    found, (lpl, average), source = [], callbacks(), None
    if stopped_at is not None:
        first, source = Unequal(), tmp_path / "stopped.ckpt"
        run(first, tmp_path, lpl, average, max_steps=stopped_at, num_batches=12).save_checkpoint(source)
        found, (lpl, average) = first.terms, callbacks()
    module = Unequal()
    run(module, tmp_path, lpl, average, max_steps=13, num_batches=12, ckpt_path=source)
    found += module.terms
    # Steps 0 to 7 are taken in these batches, and those between wait with the next.
    batches = [0, 1, 3, 4, 6, 7, 9, 10]
    due = [steps in (3, 5, 7) for steps in (sum(b < i for b in batches) for i in range(len(found)))]
    assert [bool(term) for term in found] == due
    assert average._updates == {0.9999: 8}


def test_steps_go_on_from_a_checkpoint_that_did_not_count_them(tmp_path: Path) -> None:
    source = tmp_path / "stopped.ckpt"
    run(TwoOptimizers(), tmp_path, EMA(), max_steps=6).save_checkpoint(source)
    checkpoint = torch.load(source, weights_only=True)
    assert checkpoint["callbacks"]["EMA"].pop("optimizer_steps") == 3
    assert checkpoint["callbacks"]["EMA"].pop("counted_to") == 6
    torch.save(checkpoint, source)
    module, average = TwoOptimizers(), EMA()
    callback = LPLCallback(weight=1.0, start_step=4, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    run(module, tmp_path, callback, average, max_steps=12, ckpt_path=source)
    assert [bool(term) for term in module.terms] == [False, True, True]
    assert average._updates == {0.9999: 6}


class OneNeverFinite(TwoOptimizers):
    """Gradients of the bias are none, those of the weight are finite."""

    def __init__(self) -> None:
        super().__init__()
        assert self.net.bias is not None
        self.net.bias.register_hook(lambda gradient: gradient * math.nan)


def test_steps_left_out_in_a_row_are_counted_by_optimizer(tmp_path: Path) -> None:
    guard, average = StepGuard("skip", max_in_a_row=3), EMA()
    with pytest.raises(FloatingPointError, match="the last of 3 in a row"):
        run(OneNeverFinite(), tmp_path, guard, average, max_steps=12)
    assert (guard.skipped, guard.in_a_row) == (2, 3)
    # The other optimizer's steps are new.
    assert (guard.step_skipped, average._updates) == (False, {0.9999: 2})
    again = StepGuard("skip")
    again.load_state_dict(guard.state_dict())
    assert again.in_a_row == 3
    again.load_state_dict({"skipped": 5, "in_a_row": 2, "step_skipped": True})  # as it was once written
    assert (again.skipped, again.in_a_row, again.step_skipped) == (5, 2, True)


@pytest.mark.parametrize(("every", "log_every"), [(2, 4), (3, 2), (2, 1), (1, 3)])
def test_every_log_entry_has_diagnostics_where_the_loss_was_due_since_the_last(
    tmp_path: Path, every: int, log_every: int
) -> None:
    logger = Recorder()
    callback = LPLCallback(every_n_steps=every, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    run(Latents(), tmp_path, callback, max_steps=12, logger=logger, log_every_n_steps=log_every, num_batches=12)
    entries = [metrics for metrics in logger.seen if "loss_lpl" in metrics]
    assert len(entries) == 12 // log_every
    values = [metrics["lpl_depth/mid"] for metrics in entries]
    assert len(set(values)) >= min(len(entries), 12 // max(every, log_every))


def test_a_trainer_that_logs_nothing_is_no_trouble(tmp_path: Path) -> None:
    callback = LPLCallback(loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    run(Latents(), tmp_path, callback, max_steps=1, logger=Recorder(), log_every_n_steps=0)


def test_several_terms_of_a_step_are_logged_as_one(tmp_path: Path) -> None:
    """Of one prediction: their sum, the samples of both, and the pull of both."""

    class Both(Latents):
        def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
            prediction = self.net(z0)
            parts = [
                self.auxiliary_loss(z0 - scale * prediction, z0, torch.full((4,), ratio), prediction=prediction)
                for scale, ratio in ((0.5, 0.1), (0.2, 9.0), (0.3, 0.1))
            ]
            term, rest = torch.stack(parts).sum(), prediction.square().mean()
            self.terms, self.rests = [part.item() for part in parts], []
            for part in () if self.trainer.loggers else (term, rest):
                (gradient,) = torch.autograd.grad(part, prediction, retain_graph=True)
                self.rests.append(gradient.norm().item())
            loss: Tensor = term + rest
            return loss

    module, logger = Both(), Recorder()
    before = copy.deepcopy(module.state_dict())
    gated = partial(LatentPerceptualLoss, reference_side=0, threshold=1.0)
    callback = LPLCallback(weight=2.0, loss=gated, autoencoder=Autoencoder(tiny_kl()))
    run(module, tmp_path, callback, max_steps=1, logger=logger, log_every_n_steps=1)
    (logged,) = [entry for entry in logger.seen if "loss_lpl" in entry]
    module.load_state_dict(before)
    run(module, tmp_path, callback, max_steps=1)
    assert logged["loss_lpl"] == pytest.approx(sum(module.terms) / 2)
    assert logged["gate_share"] == pytest.approx(2 / 3)
    assert logged["lpl_gradient_ratio"] == pytest.approx(module.rests[0] / module.rests[1], rel=1e-4)


def test_a_prediction_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    class Copied(Latents):
        def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
            prediction = self.net(z0)
            return self.auxiliary_loss(z0 - prediction, z0, None, prediction=prediction.clone())

    class LearnedVariance(Latents):
        def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
            prediction = torch.cat([self.net(z0), self.net(z0)], dim=1)
            return self.auxiliary_loss(z0 - prediction.chunk(2, dim=1)[0], z0, None, prediction=prediction)

    for module, message in ((Copied(), "`z0_hat` does not depend on it"), (LearnedVariance(), r"\(4, 8, 4, 4\)")):
        callback = LPLCallback(loss=ungated, autoencoder=Autoencoder(tiny_kl()))
        with pytest.raises(ValueError, match=message):
            run(module, tmp_path, callback, max_steps=1, logger=Recorder(), log_every_n_steps=1)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@pytest.mark.slow
def test_a_compiled_module_is_trained_without_the_ratio(tmp_path: Path) -> None:
    """Its prediction and ``z0_hat`` come out of one graph, in which autograd sees no way from one to the other."""

    class Compiled(Latents):
        def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
            prediction = self.net(z0)
            z0_hat = z0 - 0.5 * prediction
            term: Tensor = self.auxiliary_loss(z0_hat, z0, None, prediction=prediction)
            loss: Tensor = prediction.square().mean() + term
            return loss

    logger = Recorder()
    callback = LPLCallback(loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    module: Any = torch.compile(Compiled(), backend="aot_eager")
    with pytest.warns(UserWarning, match="`lpl_gradient_ratio` is not logged: .* compiled graph"):
        run(module, tmp_path, callback, max_steps=2, logger=logger, log_every_n_steps=1)
    assert [metrics["loss_lpl"] > 0 for metrics in logger.seen if "loss_lpl" in metrics] == [True, True]
    assert not [metrics for metrics in logger.seen if "lpl_gradient_ratio" in metrics]


def test_a_module_that_was_left_in_eval_mode_is_trained_all_the_same(tmp_path: Path) -> None:
    """Lightning leaves it so."""
    logger, module = Recorder(), Latents().eval()
    callback = LPLCallback("auto", calibration_steps=2, loss=ungated, autoencoder=Autoencoder(tiny_kl()))
    run(module, tmp_path, callback, max_steps=4, logger=logger, log_every_n_steps=1)
    assert not module.training
    assert [bool(term) for term in module.terms] == [False] * 2 + [True] * 2
    assert {"loss_lpl", "gate_share"} <= {name for metrics in logger.seen for name in metrics}


def test_a_module_may_have_a_prediction_of_its_own() -> None:
    module = Latents()
    module.prediction = nn.Linear(2, 2)
    assert module.prediction(torch.zeros(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("preset", ["paper", "diffusers", "rgb"])
def test_the_overlay_leaves_a_preset_as_it_is(preset: str) -> None:
    overlay = yaml.safe_load((ROOT / "configs" / "lpl.yaml").read_text())
    ((options,),) = [[c["init_args"]["loss"]["init_args"] for c in overlay["trainer"]["callbacks+"]]]
    made = LatentPerceptualLoss(Autoencoder(tiny_kl()), **(options | {"preset": preset}))
    assert made.options == LossOptions.of(preset)  # type: ignore[arg-type]


class Validated(Foreign):
    """A user's module that validates and tests as it trains."""

    def validation_step(self, z0: Tensor, batch_idx: int) -> None:
        self.training_step(z0, batch_idx)

    test_step = validation_step


class Late(pl.Callback):
    """Leaves with the guard of the loss what an accelerator tells of the last batch only after it."""

    def __init__(self, callback: LPLCallback) -> None:
        self.callback = callback

    def on_validation_batch_end(self, *_: Any) -> None:
        assert self.callback.loss is not None
        self.callback.loss.guard._pending = (torch.tensor([[True, False]]), self, ("the estimate z0_hat",))

    def on_test_batch_end(self, *_: Any) -> None:
        self.on_validation_batch_end()

    def synchronize(self) -> None:
        """As of the event that says when it has come."""


@pytest.mark.parametrize("run_by", ["validate", "test"])
def test_what_the_last_batch_is_still_to_raise_is_raised(tmp_path: Path, run_by: str) -> None:
    callback = LPLCallback(autoencoder=Autoencoder(tiny_kl()))
    loader: Any = DataLoader(torch.randn(4, 4, 4, 4), batch_size=4)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, Late(callback)],
        default_root_dir=tmp_path,
    )
    with pytest.raises(NotFiniteError, match=r"arose in the estimate z0_hat, for the samples \[1\]"):
        getattr(trainer, run_by)(Validated(), loader)
