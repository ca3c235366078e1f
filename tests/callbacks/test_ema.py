from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from forked import run_script
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from test_fine_tuning import data, module
from test_mixin import Foreign, fit
from test_module import trainer
from torch import nn
from torch.utils.data import DataLoader

from lpl_lightning import EMA, Freeze, LatentDiffusionModule, LoRA, SaveWeights, ShapesDataModule
from lpl_lightning.callbacks.ema import decay_in_place as in_place
from lpl_lightning.conditioning import Condition
from lpl_lightning.denoiser import Denoiser
from lpl_lightning.pretrained import read_state


def key(m: LatentDiffusionModule) -> torch.Tensor:
    weight: torch.Tensor = m.denoiser.backbone.proj_out.weight
    return weight.detach().clone()


class Watch(Callback):
    """Keeps the weights after each step, the validation's, and what a checkpoint in the middle is to hold."""

    def __init__(self, save: Path | None = None) -> None:
        self.begins: list[torch.Tensor] = []
        self.steps: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []
        self.save = save

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.begins.append(key(pl_module))

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
    with pytest.raises(ValueError, match="`every_n_steps` must be a whole number, got 2.5"):
        EMA(every_n_steps=2.5)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("first", ["EMA", "SaveWeights"])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_run_with_nothing_left_to_train_writes_the_average_too(tmp_path: Path, first: str) -> None:
    """As after a kill between the last step and the end: Lightning then says no more than that ``fit`` has ended."""
    source = tmp_path / "last.ckpt"
    found = []
    for path in (None, source):
        callbacks = [EMA(decay=0.5), SaveWeights()]
        trained = module()
        order = callbacks if first == "EMA" else callbacks[::-1]
        fit = trainer(tmp_path, max_steps=3, callbacks=order, limit_val_batches=0)
        fit.fit(trained, data(), ckpt_path=path)
        fit.save_checkpoint(source)
        assert fit.global_step == 3
        found.append(read_state(str(tmp_path / "weights.safetensors")))
        torch.testing.assert_close(dict(trained.state_dict()), found[-1])
    torch.testing.assert_close(found[0], found[1])
    average = read_state(str(source), ema=0.5)
    assert not torch.equal(key(module(weights=str(source))), key(module(weights=str(source), weights_ema=0.5)))
    torch.testing.assert_close(found[1], average)


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


def naive(steps: list[torch.Tensor], decays: list[float]) -> torch.Tensor:
    """The average by its formula in float64, with a decay for each update after the first."""
    average = steps[0].double()
    for weights, decay in zip(steps[1:], decays, strict=True):
        average = decay * average + (1 - decay) * weights.double()
    return average.float()


def saved(fit: Any, path: Path) -> dict[str, Any]:
    fit.save_checkpoint(path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


NAME = "denoiser.backbone.proj_out.weight"


@pytest.mark.parametrize(
    ("options", "used", "decays"),
    [
        ({"warm_up": True, "decay": 0.28}, [0, 1, 2, 3, 4], [2 / 11, 3 / 12, 0.28, 0.28]),
        ({"every_n_steps": 2, "decay": 0.7}, [0, 2, 4], [0.49, 0.49]),
        ({"device": "cpu", "decay": 0.7}, [0, 1, 2, 3, 4], [0.7] * 4),
    ],
    ids=["warm_up", "every_2_steps", "offloaded"],
)
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_updates_by_the_formula(
    tmp_path: Path, options: dict[str, Any], used: list[int], decays: list[float], parts: int
) -> None:
    """Of optimizer steps, each of as many batches; and over a stop after the third batch."""
    steps: list[torch.Tensor] = []
    for source in (None, tmp_path / "stopped.ckpt"):
        watch = Watch(None if source else tmp_path / "stopped.ckpt")
        run: dict[str, Any] = {"max_steps": 5, "max_epochs": -1, "accumulate_grad_batches": parts}
        fit = trainer(tmp_path, callbacks=[EMA(**options), watch], limit_val_batches=0, **run)
        images = ShapesDataModule(image_size=16, train_images=48, val_images=8, batch_size=8)
        fit.fit(module(), images, ckpt_path=source, weights_only=True)
        steps = steps[:3] + watch.steps
        found = saved(fit, tmp_path / "a.ckpt")["lpl_lightning_averages"][str(options["decay"])][NAME]
        after = steps[parts - 1 :: parts]
        torch.testing.assert_close(found, naive([after[i] for i in used], decays), atol=1e-7, rtol=0)


def test_only_what_is_trained_is_averaged_and_in_float32(tmp_path: Path) -> None:
    """With LoRA, the weights in bfloat16; validation sees the average, and leaves no bit of the weights changed."""
    trained, watch = module(fine_tuning=LoRA(rank=2)), Watch()
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    ema = EMA(decay=0.9)
    options: dict[str, Any] = {"val_check_interval": 2, "check_val_every_n_epoch": None, "precision": "bf16-true"}
    fit = trainer(tmp_path, max_steps=4, callbacks=[ema, watch], **options)
    before: list[dict[str, torch.Tensor]] = []

    class Compare(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            before.append({name: tensor.detach().clone() for name, tensor in pl_module.named_parameters()})

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            for name, tensor in pl_module.named_parameters() if before else ():
                assert torch.equal(tensor, before[-1][name])

    cast(Any, fit).callbacks.insert(0, Compare())
    fit.fit(trained, data())
    found = saved(fit, tmp_path / "a.ckpt")
    (averages,) = found["lpl_lightning_averages"].values()
    assert averages.keys() == names
    assert {tensor.dtype for tensor in averages.values()} == {torch.float32}
    assert {parameter.dtype for name, parameter in trained.named_parameters() if name in names} == {torch.bfloat16}
    for name, average in averages.items():
        steps = [step[name] for step in before]
        torch.testing.assert_close(average, naive(steps, [0.9] * 3), atol=1e-7, rtol=1e-6)
        assert torch.equal(found["state_dict"][name], steps[-1])


def test_what_is_evaluated_between_trainings_leaves_their_averages(tmp_path: Path) -> None:
    """Though it is of a run that went further; the weights themselves are then that one's."""
    other = trainer(tmp_path, max_steps=9, callbacks=[EMA(decay=0.5)], limit_val_batches=0)
    other.fit(module(), data())
    saved(other, tmp_path / "other.ckpt")
    trained, watch, average = module(), Watch(), EMA(decay=0.5)
    fit = trainer(tmp_path, max_steps=3, callbacks=[average, watch])
    fit.fit(trained, data())
    for _ in range(2):
        fit.validate(trained, data(), ckpt_path=tmp_path / "other.ckpt", verbose=False, weights_only=True)
    fit.fit_loop.epoch_loop.max_steps = 5
    fit.fit(trained, data())
    assert len(watch.steps) == 5
    assert average.in_place == 0.5
    torch.testing.assert_close(key(trained), naive(watch.steps, [0.5] * 4), atol=1e-7, rtol=1e-6)


def test_which_average_is_evaluated(tmp_path: Path) -> None:
    trained, watch = module(), Watch()
    fit = trainer(tmp_path, max_steps=3, callbacks=[EMA(decay=0.5, also=[0.9]), watch], limit_val_batches=0)
    fit.fit(trained, data())
    source, steps = tmp_path / "a.ckpt", watch.steps
    saved(fit, source)
    for options, wanted in (
        ({"decay": 0.5}, naive(steps, [0.5] * 2)),
        ({"decay": 0.5, "also": [0.9], "evaluate": 0.9}, naive(steps, [0.9] * 2)),
        ({"evaluate": "trained"}, steps[-1]),
    ):
        seen, other = Watch(), module()
        run = trainer(tmp_path, callbacks=[EMA(**options), seen])
        run.validate(other, data(), ckpt_path=source, verbose=False, weights_only=True)
        torch.testing.assert_close(seen.validated[0], wanted, atol=1e-7, rtol=0)
        assert torch.equal(key(other), steps[-1])
    # What was loaded for one evaluation is not put in place in another.
    seen, other = Watch(), module()
    run = trainer(tmp_path, callbacks=[EMA(decay=0.5), seen])
    run.validate(other, data(), ckpt_path=source, verbose=False, weights_only=True)
    begin = module()
    run.validate(begin, data(), verbose=False)
    assert torch.equal(seen.validated[1], key(begin))
    with pytest.raises(ValueError, match=r"of decay 0.7, but the checkpoint holds those of \[0.5, 0.9\]"):
        trainer(tmp_path, callbacks=[EMA(decay=0.7)]).validate(module(), data(), ckpt_path=source, weights_only=True)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(plain := module(), data())
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(plain, data())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="holds none: leave EMA out"):
        trainer(tmp_path, callbacks=[EMA()]).validate(
            module(), data(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True
        )
    with pytest.raises(ValueError, match="`evaluate` must be one of"):
        EMA(evaluate=0.5)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_checkpoints_of_lightnings_callback_which_this_was_once(tmp_path: Path) -> None:
    """The average in ``state_dict``, the weights elsewhere: loaded, evaluated and gone on with."""
    trained, watch = module(), Watch()
    fit = trainer(tmp_path, max_steps=3, callbacks=[EMA(decay=0.5), watch], limit_val_batches=0)
    fit.fit(trained, data())
    found = saved(fit, tmp_path / "new.ckpt")
    average, weights = naive(watch.steps, [0.5] * 2), watch.steps[-1]
    averages = found.pop("lpl_lightning_averages")["0.5"]
    found["current_model_state"] = found["state_dict"]
    found["state_dict"] = {name: averages.get(name, tensor) for name, tensor in found["state_dict"].items()}
    found["averaging_state"] = {"n_averaged": torch.tensor(3)}
    found["callbacks"]["EMA"] = {"latest_update_step": 3, "decay": 0.5}
    source = str(tmp_path / "old.ckpt")
    torch.save(found, source)
    torch.testing.assert_close(key(module(weights=source)), weights)
    torch.testing.assert_close(key(module(weights=source, weights_ema=0.5)), average)
    with pytest.raises(ValueError, match=r"has those of decay \[0.5\]"):
        module(weights=source, weights_ema=0.9)
    steps: list[torch.Tensor] = []
    for path in (str(tmp_path / "new.ckpt"), source):
        later = Watch()
        fit = trainer(tmp_path, max_steps=4, callbacks=[EMA(decay=0.5), later], limit_val_batches=0)
        fit.fit(module(), data(), ckpt_path=path, weights_only=True)
        steps += later.steps
    assert torch.equal(*steps)
    new = saved(fit, tmp_path / "later.ckpt")["lpl_lightning_averages"]["0.5"][NAME]
    torch.testing.assert_close(new, 0.5 * average + 0.5 * later.steps[0], atol=1e-7, rtol=0)


def test_before_the_first_update_and_after_an_interruption_the_weights_are_in_place(tmp_path: Path) -> None:
    """Validation at the start of training, which sees no average; and one that ends with an error, between steps."""

    class Fail(Callback):
        steps = 0

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.steps = trainer.global_step
            assert in_place(trainer) == (0.5 if self.steps else None)
            if self.steps:
                raise RuntimeError("stopped")

    trained, watch, fail = module(), Watch(), Fail()
    begin = key(trained)
    fit = trainer(
        tmp_path,
        max_steps=4,
        callbacks=[EMA(decay=0.5), watch, fail],
        num_sanity_val_steps=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    with pytest.raises(RuntimeError, match="stopped"):
        fit.fit(trained, data())
    assert torch.equal(watch.validated[0], begin)
    torch.testing.assert_close(watch.validated[1], naive(watch.steps, [0.5]))
    assert torch.equal(key(trained), watch.steps[-1])


def test_an_evaluation_that_ends_with_an_error_leaves_no_average(tmp_path: Path) -> None:
    """The next one is of the weights that it is given, and a training keeps averages of its own."""

    class Fail(Callback):
        fails = True

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if self.fails and trainer.state.fn == "validate":
                raise RuntimeError("stopped")

    fit = trainer(tmp_path, max_steps=2, callbacks=[EMA(decay=0.5)])
    fit.fit(module(), data())
    fit.save_checkpoint(tmp_path / "first.ckpt")
    fail, watch = Fail(), Watch()
    again = trainer(tmp_path, max_steps=2, callbacks=[EMA(decay=0.5), fail, watch])
    with pytest.raises(RuntimeError, match="stopped"):
        again.validate(module(), data(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    fail.fails = False
    other = module()
    with torch.no_grad():
        other.denoiser.backbone.proj_out.weight.fill_(3.0)
    watch.validated.clear()
    again.validate(other, data(), verbose=False)
    assert (watch.validated[0] == 3).all()
    fail.fails = True
    with pytest.raises(RuntimeError, match="stopped"):
        again.validate(module(), data(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    again.fit(module(), data())
    fail.fails = False
    again.validate(module(), data(), verbose=False)
    again.save_checkpoint(tmp_path / "second.ckpt")
    assert torch.load(tmp_path / "second.ckpt", weights_only=True)["lpl_lightning_averages"].keys() == {"0.5"}


def test_fsdp1_is_refused() -> None:
    class Trainer:
        strategy = FSDPStrategy()

    with pytest.raises(ValueError, match="take lpl_lightning.FSDP2Strategy"):
        EMA().setup(cast(Any, Trainer()), module(), "fit")


def test_a_second_run_goes_on_from_the_weights_and_leaves_other_modules_alone(tmp_path: Path) -> None:
    """With one callback, the average in place after the first run."""
    ema, watch, trained = EMA(decay=0.5), Watch(), module()
    for _ in range(2):
        trainer(tmp_path, max_steps=2, callbacks=[ema, watch], limit_val_batches=0).fit(trained, data())
    assert torch.equal(watch.steps[1], watch.begins[1])
    torch.testing.assert_close(key(trained), naive(watch.steps[2:], [0.5]))
    other = module()
    begin = key(other)
    trainer(tmp_path, max_steps=1, callbacks=[ema, watch], limit_val_batches=0).fit(other, data())
    assert torch.equal(watch.begins[2], begin)


class Unfreeze(BaseFinetuning):
    """Trains the last convolution in the first two epochs, both in the third, and the first one from the fourth on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.first)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.first, optimizer)
        elif epoch == 3:
            pl_module.net.requires_grad_(False)


class Two(Foreign):
    """A module that is not ours, with a layer to unfreeze."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)

    def training_step(self, z0: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return super().training_step(self.first(z0), batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.1)


def test_layers_that_are_unfrozen_and_frozen_in_a_run(tmp_path: Path) -> None:
    """By Lightning's own callback, two steps an epoch; each average is of the steps in which its weight was trained."""
    weights: dict[str, list[torch.Tensor]] = {"net.weight": [], "first.weight": []}

    class Record(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            for name, steps in weights.items():
                steps.append(pl_module.get_parameter(name).detach().clone())

    trained = Two()
    fit(trained, tmp_path, EMA(decay=0.5), Unfreeze(), Record(), steps=8)
    net, first = weights["net.weight"], weights["first.weight"]
    assert torch.equal(first[0], first[3])
    assert not torch.equal(first[3], first[4])
    assert torch.equal(net[5], net[7])
    torch.testing.assert_close(trained.net.weight.detach(), naive(net[:6], [0.5] * 5), atol=1e-7, rtol=0)
    torch.testing.assert_close(trained.first.weight.detach(), naive(first[4:], [0.5] * 3), atol=1e-7, rtol=0)


class TiedNet(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(z).relu())
        return found


class TiedDenoiser(Denoiser):
    def forward(self, z_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        found: torch.Tensor = self.backbone(z_t)
        return found


def tied(**options: Any) -> LatentDiffusionModule:
    torch.manual_seed(0)
    return module(denoiser=TiedDenoiser(TiedNet()), **options)


def test_a_tied_weight_is_one_under_all_its_names(tmp_path: Path) -> None:
    """In checkpoints from the middle of a run and from its end, as it was trained and averaged."""
    steps: list[torch.Tensor] = []

    class Record(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            steps.append(pl_module.denoiser.backbone.first.weight.detach().clone())
            if len(steps) == 3:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    run = trainer(tmp_path, max_steps=3, callbacks=[EMA(decay=0.5), Record()], limit_val_batches=0)
    run.fit(tied(), data())
    run.save_checkpoint(tmp_path / "end.ckpt")
    average = naive(steps, [0.5] * 2)
    assert not torch.equal(average, steps[-1])
    for source in (str(tmp_path / "middle.ckpt"), str(tmp_path / "end.ckpt")):
        for ema, wanted in ((None, steps[-1]), (0.5, average)):
            found = read_state(source, ema)
            torch.testing.assert_close(found["denoiser.backbone.first.weight"], wanted, atol=1e-7, rtol=0)
            torch.testing.assert_close(found["denoiser.backbone.second.weight"], wanted, atol=1e-7, rtol=0)
            weight: torch.Tensor = tied(weights=source, weights_ema=ema).denoiser.backbone.second.weight
            torch.testing.assert_close(weight.detach(), wanted, atol=1e-7, rtol=0)


def test_a_config_that_freezes_more_evaluates_the_whole_average(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=3, callbacks=[EMA(decay=0.5)], limit_val_batches=0)
    run.fit(trained := module(), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    average = read_state(str(tmp_path / "a.ckpt"), 0.5)
    seen: dict[str, torch.Tensor] = {}

    class Look(Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.update({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    frozen = module(fine_tuning=Freeze(["transformer_blocks.0.*", "pos_embed*"]))
    evaluation = trainer(tmp_path, callbacks=[EMA(decay=0.5), Look()])
    evaluation.validate(frozen, data(), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    as_trained = read_state(str(tmp_path / "a.ckpt"))
    assert seen.keys() == average.keys() == trained.state_dict().keys()
    for name, tensor in seen.items():
        torch.testing.assert_close(tensor, average[name], atol=0, rtol=0)
        torch.testing.assert_close(frozen.state_dict()[name], as_trained[name], atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_checkpoints_of_weights_alone_hold_both_too(tmp_path: Path) -> None:
    """Each step's, one that is first written once the average is in place, and one by hand; they can be evaluated."""
    trained, watch = module(), Watch()
    saving = [
        ModelCheckpoint(dirpath=tmp_path, filename="step", every_n_train_steps=3, save_weights_only=True),
        ModelCheckpoint(dirpath=tmp_path, filename="end", every_n_epochs=9, save_last=True, save_weights_only=True),
    ]
    options: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 0}
    run = trainer(tmp_path, max_steps=3, callbacks=[EMA(decay=0.5), watch, *saving], **options)
    run.fit(trained, data())
    run.save_checkpoint(tmp_path / "hand.ckpt", weights_only=True)
    average = naive(watch.steps, [0.5] * 2)
    assert not torch.equal(average, watch.steps[-1])
    for name in ("step", "last", "hand"):
        source = str(tmp_path / f"{name}.ckpt")
        assert "callbacks" not in torch.load(source, weights_only=True)
        assert torch.equal(key(module(weights=source)), watch.steps[-1])
        torch.testing.assert_close(key(module(weights=source, weights_ema=0.5)), average, atol=1e-7, rtol=0)
        seen, other = Watch(), module()
        evaluation = trainer(tmp_path, callbacks=[EMA(decay=0.5), seen])
        evaluation.validate(other, data(), ckpt_path=source, verbose=False, weights_only=True)
        torch.testing.assert_close(seen.validated[0], average, atol=1e-7, rtol=0)
        assert torch.equal(key(other), watch.steps[-1])
    torch.testing.assert_close(key(trained), average, atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match="holds weights alone .* give it as `model.weights`"):
        trainer(tmp_path, max_steps=4, **options).fit(module(), data(), ckpt_path=source, weights_only=True)
    run = trainer(tmp_path, callbacks=[EMA(decay=0.5), saving[0]], **options)
    with pytest.raises(ValueError, match=r"ModelCheckpoint has `save_weights_only`.* of a Foreign would lack"):
        run.fit(Foreign(), DataLoader(cast(Any, torch.zeros(4, 4, 4, 4)), batch_size=4))


def test_after_an_interrupted_fit_an_evaluation_leaves_the_weights(tmp_path: Path) -> None:
    class Raises(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("enough")

    trained, ema = module(), EMA(decay=0.5)
    run = trainer(tmp_path, max_steps=4, callbacks=[ema, Raises()])
    with pytest.raises(RuntimeError, match="enough"):
        run.fit(trained, data())
    before = key(trained).clone()
    run.validate(trained, data(), verbose=False)
    assert torch.equal(key(trained), before)


def test_a_trainer_that_goes_on_goes_on_with_the_averages(tmp_path: Path) -> None:
    trained, ema = module(), EMA(decay=0.5)
    run = trainer(tmp_path, max_steps=2, callbacks=[ema], limit_val_batches=0)
    run.fit(trained, data())
    run.fit_loop.epoch_loop.max_steps = 3
    run.fit(trained, data())
    assert (run.global_step, ema.state_dict()) == (3, {"updates": {"0.5": 3}, "step": 3})
    other = module()
    run.fit_loop.epoch_loop.max_steps = 4
    run.fit(other, data())
    assert ema.state_dict()["updates"] == {"0.5": 1}, "those of another module begin anew"


def by_load(trained: LatentDiffusionModule, state: dict[str, torch.Tensor]) -> None:
    trained.load_state_dict(state)


def by_assignment(trained: LatentDiffusionModule, state: dict[str, torch.Tensor]) -> None:
    trained.load_state_dict(state, assign=True)


def by_data(trained: LatentDiffusionModule, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in trained.state_dict(keep_vars=True).items():
        tensor.data.copy_(state[name])


@pytest.mark.parametrize(
    ("put", "is_average"),
    [(by_load, False), (by_assignment, False), (by_data, False), (by_load, True), (by_assignment, True)],
)
def test_weights_that_are_set_after_a_run_stay(tmp_path: Path, put: Any, is_average: bool) -> None:
    """As of folds with one callback: in the next run, in an evaluation and in a checkpoint by hand."""
    ema, watch, trained = EMA(decay=0.5), Watch(), module()
    begin = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    run = trainer(tmp_path, max_steps=2, callbacks=[ema, watch], limit_val_batches=0)
    run.fit(trained, data())
    assert ema.in_place == 0.5
    if is_average:
        begin = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    wanted = begin[NAME]
    put(trained, {name: tensor.clone() for name, tensor in begin.items()})
    assert torch.equal(saved(run, tmp_path / "a.ckpt")["state_dict"][NAME], wanted)
    trainer(tmp_path, callbacks=[ema, watch]).validate(trained, data(), verbose=False)
    assert torch.equal(watch.validated[-1], wanted)
    assert ema.in_place is None
    trainer(tmp_path, max_steps=2, callbacks=[ema, watch], limit_val_batches=0).fit(trained, data())
    assert torch.equal(watch.begins[1], wanted)
    torch.testing.assert_close(key(trained), naive(watch.steps[2:], [0.5]))


def test_a_module_that_is_moved_goes_on_from_its_weights(tmp_path: Path) -> None:
    """And where one layer is drawn anew, the others do."""
    ema, watch, trained = EMA(decay=0.5), Watch(), module()
    trainer(tmp_path, max_steps=2, callbacks=[ema, watch], limit_val_batches=0).fit(trained, data())
    trained.double().float()
    assert ema.in_place == 0.5
    nn.init.ones_(trained.denoiser.backbone.proj_out.bias)
    trainer(tmp_path, callbacks=[ema, watch]).validate(trained, data(), verbose=False)
    assert ema.in_place is None
    torch.testing.assert_close(watch.validated[-1], naive(watch.steps, [0.5]))
    seen: list[torch.Tensor] = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(pl_module.denoiser.backbone.proj_out.bias.detach().clone())

    trainer(tmp_path, max_steps=1, callbacks=[ema, watch, Look()], limit_val_batches=0).fit(trained, data())
    assert torch.equal(watch.begins[1], watch.steps[1])
    assert torch.equal(seen[0], torch.ones_like(seen[0]))


def test_weights_that_are_set_after_a_run_stay_in_shards_too(tmp_path: Path) -> None:
    said = run_script(Path(__file__).with_name("sharded_folds.py"), tmp_path).stdout
    found = [line for line in said.splitlines() if line.startswith(("first", "again", "set", "moved"))]
    assert found == [
        "first trained",
        "again trained",
        "set [[5.0, 5.0]]",
        "moved trained",
        "moved and set [[5.0, 5.0]]",
    ]
