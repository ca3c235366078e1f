"""What ``lpl profile`` measures, against counts and sizes that are known; of times only what must be so anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from conftest import ROOT, tiny_kl
from families import FAMILIES, Family
from test_mixin import Foreign
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lpl_lightning import Autoencoder, LatentPerceptualLoss, LPLCallback
from lpl_lightning.cli import main
from lpl_lightning.losses import Execution, Subset
from lpl_lightning.profiling import ProfilingTrainer, Report, profile_decoder

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SHORT = ["--steps=1", "--warmup=1", "--data.batch_size=4", "--trainer.accelerator=cpu"]
# Foreign's ratios are 0.10, 0.39, 0.82 and 2.06: two of its four samples pass.
HALF: dict[str, Any] = {"threshold": 0.5, "reference_side": 0}
NAMES = ["without LPL", "with LPL", "four passes, whole batch"]


class Latents(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(cast(Any, list(torch.randn(8, 4, 4, 4))), batch_size=4, shuffle=True)


class Watched(Foreign):
    """Notes the latents of each run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[list[Tensor]] = []

    def on_train_start(self) -> None:
        self.runs.append([])

    def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
        self.runs[-1].append(z0)
        return super().training_step(z0, batch_idx)


def profiled(module: pl.LightningModule, tmp_path: Path, *callbacks: pl.Callback, **options: Any) -> Report:
    steps, warmup = options.pop("steps", 2), options.pop("warmup", 1)
    trainer = ProfilingTrainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **options
    )
    return trainer.profile(module, Latents(), steps, warmup, str(tmp_path / "profile.json"))


def decoder_calls(autoencoder: Autoencoder, module: Watched) -> list[list[tuple[int, bool]]]:
    """By run, of each forward of the decoder: how many samples, and whether with a graph."""
    calls: list[list[tuple[int, bool]]] = []

    def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
        calls.extend([] for _ in range(len(module.runs) - len(calls)))
        calls[-1].append((len(inputs[0]), torch.is_grad_enabled()))

    autoencoder.model.decoder.conv_in.register_forward_pre_hook(hook)
    return calls


def test_the_command_prints_a_table_and_writes_json_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # As in the config that a run saves.
    (tmp_path / "saved.yaml").write_text("ckpt_path: null\nweights_only: null\n")
    main(["profile", "-c", QUICKSTART, "-c", "saved.yaml", *SHORT])
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["profile.json", "saved.yaml"]
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["complete"]
    assert [block["name"] for block in found["blocks"]] == NAMES
    stages = [stage["name"] for stage in found["decoder"]["stages"]]
    for line in (*NAMES, *stages, "LPL takes", "The floor"):
        assert line in said
    for block in found["blocks"]:
        assert block["steps"] == 2
        assert 0 < block["step_min_s"] <= block["step_s"]
        assert block["data_wait_s"] > 0
        assert block["peak_memory_mb"] > 100
        assert block["failure"] is None
    assert found["config"]["compared"] == ["mid", "up_0", "up_1", "up_2"]
    assert found["config"]["latent_shape"] == [4, 16, 16]
    assert found["config"]["threshold_noise_to_signal"] == pytest.approx(1.5)
    assert found["config"]["weight"] == 0.75
    assert found["batch_size"] == 4
    assert 0 < found["samples_decoded"] <= 4
    without, with_lpl, whole = (block["step_s"] for block in found["blocks"])
    assert found["lpl_share_of_step"] == pytest.approx(1 - without / with_lpl)
    assert found["whole_batch_over_lpl"] == pytest.approx(whole / with_lpl)


def test_samples_that_pass_the_gate_are_decoded_and_each_way_has_its_passes(tmp_path: Path) -> None:
    module, autoencoder = Watched(), Autoencoder(tiny_kl())
    calls = decoder_calls(autoencoder, module)
    loss = cast(Any, partial(LatentPerceptualLoss, execution=Execution(chunk_size=1), **HALF))
    report = profiled(module, tmp_path, LPLCallback(loss=loss, autoencoder=autoencoder))
    assert report.complete
    assert (report.samples_decoded, report.batch_size) == (2, 4)
    assert len(module.runs) == 6
    assert [len(steps) for steps in module.runs] == [3] * 6
    for first in (0, 3):
        assert calls[first] == []
        # Of each sample that passed the clean latent, then the estimate.
        assert calls[first + 1] == 3 * 2 * [(1, False), (1, True)]
    # The clean latents, the estimates, and these once more in the backward pass, which is the fourth.
    assert calls[2] == 3 * [(2, False), (2, True), (2, True)]
    assert calls[5][:9] == calls[2]
    for number in (0, 3):
        for run in module.runs[number + 1 : number + 3]:
            assert all(torch.equal(a, b) for a, b in zip(run, module.runs[number], strict=True)), "the same batches"
    assert not torch.equal(module.runs[0][0], module.runs[3][0])
    assert report.decoder is not None
    assert (report.decoder.samples, report.decoder.chunk_size) == (2, 1)


def test_the_trainer_and_the_module_are_left_as_they_were(tmp_path: Path) -> None:
    module, callback = Foreign(), LPLCallback(autoencoder=Autoencoder(tiny_kl()))
    weight = cast(Autoencoder, callback.autoencoder).model.decoder.conv_in.weight
    trainer = ProfilingTrainer(default_root_dir=tmp_path, accelerator="cpu", max_steps=1, callbacks=[callback])
    before = {name: getattr(trainer, name) for name in ("callbacks", "loggers", "profiler", "limit_val_batches")}
    trainer.profile(module, Latents(), steps=1, warmup=0, output=str(tmp_path / "profile.json"))
    assert module.loss_terms == {}
    assert {name: getattr(trainer, name) for name in before} == before
    assert trainer.max_steps == 1
    assert trainer.global_step == 0
    assert weight.is_contiguous(), "not left with channels last"
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_weights_that_came_with_channels_last_stay_so(tmp_path: Path) -> None:
    autoencoder = Autoencoder(tiny_kl().to(memory_format=torch.channels_last))
    profiled(Foreign(), tmp_path, LPLCallback(autoencoder=autoencoder), steps=1)
    assert autoencoder.model.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


class WithAutoencoder(Watched):
    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = Autoencoder(tiny_kl())


@pytest.mark.parametrize(
    ("callbacks", "note"),
    [
        ([], "The config has no LPLCallback"),
        ([LPLCallback(weight="auto")], "The weight is 3 here"),
        ([LPLCallback(weight=0.0)], "The weight is 3 here"),
        ([LPLCallback(budget=0.01)], "LPL is exact here"),
    ],
    ids=["none", "auto", "zero", "budget"],
)
def test_lpl_is_trained_whole_whatever_the_config_leaves_open(
    callbacks: list[pl.Callback], note: str, tmp_path: Path
) -> None:
    module = WithAutoencoder()
    calls = decoder_calls(module.autoencoder, module)
    report = profiled(module, tmp_path, *callbacks, steps=1, warmup=0)
    assert report.config["weight"] == 3.0
    assert any(with_graph for _, with_graph in calls[1]), "not only measured"
    assert any(line.startswith(note) for line in report.notes)
    assert note in report.table()


def test_lpl_at_every_other_step_is_measured_at_each_and_averaged(tmp_path: Path) -> None:
    module = WithAutoencoder()
    calls = decoder_calls(module.autoencoder, module)
    loss = cast(Any, partial(LatentPerceptualLoss, execution=Execution(chunk_size=4), **HALF))
    report = profiled(module, tmp_path, LPLCallback(start_step=7, every_n_steps=4, loss=loss), steps=3)
    assert len(calls[1]) == 4 * 2
    without, with_lpl = (cast(float, block.step_s) for block in report.blocks[:2])
    assert report.average_step_s == pytest.approx(0.75 * without + 0.25 * with_lpl)
    assert "at every 4 steps" in report.table()


def test_the_whole_batch_has_no_random_subset(tmp_path: Path) -> None:
    module = WithAutoencoder()
    calls = decoder_calls(module.autoencoder, module)
    loss = cast(Any, partial(LatentPerceptualLoss, subset=Subset(keep=0.5), **HALF))
    report = profiled(module, tmp_path, LPLCallback(loss=loss), steps=1, warmup=0)
    assert {count for count, _ in calls[1]} == {1}
    assert {count for count, _ in calls[2]} == {2}
    assert report.notes == ["The whole batch is compared without the config's `subset`."]


def test_a_step_that_accumulates_counts_all_its_batches(tmp_path: Path) -> None:
    module = WithAutoencoder()
    loss = cast(Any, partial(LatentPerceptualLoss, **HALF))
    report = profiled(module, tmp_path, LPLCallback(loss=loss), accumulate_grad_batches=2, gradient_clip_val=1.0)
    assert [len(run) for run in module.runs] == [2 * 3] * 6
    assert [len(block.seconds) for block in report.blocks] == [2 * 2] * 3
    assert (report.samples_decoded, report.batch_size) == (2, 4), "of a batch"


def test_a_block_that_fails_is_named_and_the_others_are_measured(tmp_path: Path) -> None:
    module, autoencoder = Watched(), Autoencoder(tiny_kl())

    def refuse(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > 1 and len(module.runs[-1]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    autoencoder.model.decoder.conv_in.register_forward_pre_hook(refuse)
    loss = cast(Any, partial(LatentPerceptualLoss, execution=Execution(chunk_size=1), **HALF))
    report = profiled(module, tmp_path, LPLCallback(loss=loss, autoencoder=autoencoder), warmup=0)
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found == report.as_dict()
    assert not found["complete"]
    assert [block["failure"] for block in found["blocks"]] == [None, None, "OutOfMemoryError: CUDA out of memory."]
    assert [block["steps"] for block in found["blocks"]] == [4, 4, 1], "those before the failure, and no second round"
    assert found["decoder"]["samples"] == 2
    assert found["samples_decoded"] == 2
    assert "failed: OutOfMemoryError: CUDA out of memory." in report.table()
    assert module.loss_terms == {}


def test_parts_that_fail_are_named(tmp_path: Path) -> None:
    module = WithAutoencoder()

    def refuse(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if not module.loss_terms:
            raise RuntimeError("no more")

    module.autoencoder.model.decoder.conv_in.register_forward_pre_hook(refuse)
    report = profiled(module, tmp_path)
    assert report.decoder is None
    assert report.decoder_failure == "RuntimeError: no more"
    assert "failed: RuntimeError: no more" in report.table()
    assert all(block.step_s for block in report.blocks)


def test_what_fails_without_lpl_is_the_error(tmp_path: Path) -> None:
    class Broken(WithAutoencoder):
        def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("of its own")

    module = Broken()
    with pytest.raises(RuntimeError, match="of its own"):
        profiled(module, tmp_path)
    assert module.loss_terms == {}
    assert not list(tmp_path.iterdir())


class NoTerms(WithAutoencoder):
    def auxiliary_loss(self, *latents: Any, **options: Any) -> Tensor:
        return torch.zeros(())


class NoMixin(pl.LightningModule):
    pass


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (WithAutoencoder, {"steps": 0}, "`steps` must be 1 or more, got 0"),
        (WithAutoencoder, {"warmup": -1}, "`warmup` must be 0 or more, got -1"),
        (WithAutoencoder, {"limit_train_batches": 0}, "The data gave no batch to train on"),
        (WithAutoencoder, {"strategy": "ddp_spawn", "devices": 2}, "DDPStrategy trains in other processes"),
        (NoMixin, {}, "LPLCallback needs a module with LPLMixin, got NoMixin"),
        (Foreign, {}, "LPLCallback found no lpl_lightning.Autoencoder"),
        (NoTerms, {}, "NoTerms.training_step never asked for loss terms"),
    ],
    ids=["steps", "warmup", "no batches", "spawn", "no mixin", "no autoencoder", "no terms"],
)
def test_what_cannot_be_profiled_is_refused(
    module: type[pl.LightningModule], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        profiled(module(), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`output` must be a file in a folder that exists, got 'nowhere/profile.json'"):
        main(["profile", "-c", QUICKSTART, *SHORT, "--output=nowhere/profile.json"])
    with pytest.raises(ValueError, match="`output` must be a file in a folder that exists, got '.'"):
        ProfilingTrainer(accelerator="cpu").profile(WithAutoencoder(), Latents(), output=".")
    assert not list(tmp_path.iterdir())


def test_without_an_output_nothing_is_written_or_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = ProfilingTrainer(accelerator="cpu", max_steps=1)
    report = trainer.profile(WithAutoencoder(), Latents(), steps=1, warmup=0, output=None)
    assert report.complete
    assert report.lpl_share is not None
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_a_decoder_as_it_is_has_three_passes_and_no_stages(tmp_path: Path) -> None:
    module = Watched()
    modules = ["decoder.mid_block", "decoder.up_blocks.0"]
    autoencoder = Autoencoder(tiny_kl(), feature_modules=modules)
    calls = decoder_calls(autoencoder, module)
    loss = cast(Any, partial(LatentPerceptualLoss, **HALF))
    report = profiled(module, tmp_path, LPLCallback(loss=loss, autoencoder=autoencoder), warmup=0, steps=1)
    assert [block.name for block in report.blocks] == ["without LPL", "with LPL", "three passes, whole batch"]
    assert calls[2] == [(2, False), (2, True)]
    assert report.decoder is not None
    assert [stage.name for stage in report.decoder.stages] == ["decoder"]
    assert report.decoder.stages[0].comparison_s == report.decoder.comparison_s > 0


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_family_has_its_stages_measured(family: Family) -> None:
    autoencoder = Autoencoder(family.model())
    loss = LatentPerceptualLoss(autoencoder, threshold=1e9, execution=Execution(chunk_size=1))
    z0 = torch.randn(family.z)
    cost = profile_decoder(loss, z0 + 0.1 * torch.randn_like(z0), z0, 1)
    assert cost is not None
    names = [stage.name for stage in cost.stages]
    assert names == [stage.name for stage in autoencoder.stages][: len(names)]
    assert names[-1] == loss.compared[-1]
    assert [stage.name for stage in cost.stages if stage.comparison_s is not None] == list(loss.compared)
    assert all(stage.forward_s > 0 and stage.input_gradient_s > 0 for stage in cost.stages)
    assert sum(stage.comparison_s or 0.0 for stage in cost.stages) == pytest.approx(cost.comparison_s)


def test_stages_add_up_to_the_floor() -> None:
    loss = LatentPerceptualLoss(
        Autoencoder(tiny_kl(block_out_channels=(32, 64, 64))), execution=Execution(fold_upsampling=False)
    )
    z0 = torch.randn(2, 4, 16, 16)
    cost = profile_decoder(loss, z0 + 0.1 * torch.randn_like(z0), z0, 5)
    assert cost is not None
    passes = sum(2 * stage.forward_s + stage.input_gradient_s for stage in cost.stages)
    assert 0.3 < passes / cost.floor_s < 3
    assert 0.3 < (passes + cost.comparison_s) / cost.loss_s < 3
    assert cost.loss_over_floor == cost.loss_s / cost.floor_s


def test_a_loss_that_compares_nothing_has_no_parts(tmp_path: Path) -> None:
    loss = cast(Any, partial(LatentPerceptualLoss, depth=0))
    report = profiled(WithAutoencoder(), tmp_path, LPLCallback(loss=loss), steps=1, warmup=0)
    assert report.decoder is None
    assert report.complete
    assert "decoder," not in report.table()


MEASURED = """
import torch
from lpl_lightning.profiling.steps import PeakMemory

memory = PeakMemory(torch.device("cpu"))
memory.start()
for _ in range(3):
    torch.ones(2**25).mul(2)
memory.stop()
print(memory.above_start, memory.peak)
"""


@pytest.mark.slow
def test_peak_memory_sees_what_is_gone_at_the_end() -> None:
    """In a process of its own, in which nothing that other tests have left comes and goes."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    above_start, peak = map(int, done.stdout.split())
    assert 2**27 < above_start < 2**29
    assert peak > above_start
