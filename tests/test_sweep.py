from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_dit
from evaluations import Weights, data, evaluation, values
from forked import run_script
from test_mixin import Foreign

from lpl_lightning import EMA, ClassLabels, ClassTokens, FlowMatching, LatentDiffusionModule, Sampler
from lpl_lightning.cli import main
from lpl_lightning.evaluation import Report
from lpl_lightning.sweep import SweepingTrainer

MakeModule = Callable[..., LatentDiffusionModule]


def trainer(folder: Path, **options: Any) -> SweepingTrainer:
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return SweepingTrainer(**(settings | options))


@pytest.fixture
def module(make_module: MakeModule) -> LatentDiffusionModule:
    torch.manual_seed(0)
    return make_module(
        conditioner=ClassTokens(8, token_dim=8, pooled_dim=8),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )


@pytest.mark.slow
def test_each_setting_is_what_a_test_with_it_finds(module: LatentDiffusionModule, tmp_path: Path) -> None:
    swept = trainer(tmp_path / "sweep", callbacks=[evaluation()], limit_test_batches=2)
    found = swept.sweep(module, data(), num_steps=[3, 1])
    assert module.sampler.num_steps == 2
    assert swept.limit_test_batches == 2
    for steps, report in zip((3, 1), found.reports, strict=True):
        module.sampler.num_steps = steps
        callback = evaluation()
        trainer(tmp_path / "test", callbacks=[callback]).test(module, data(), verbose=False)
        assert callback.report is not None
        assert values(report) == values(callback.report)
        assert report.generation["num_steps"] == steps
    assert values(found.reports[0]) != values(found.reports[1])
    folder = tmp_path / "sweep" / "evaluation"
    (table,) = folder.glob("sweep_num_steps_weights-*.md")
    with table.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["num_steps"] for row in rows] == ["3", "1"]
    for row, report in zip(rows, found.reports, strict=True):
        assert {name: float(row[name]) for name in values(report)} == values(report)
    written = json.loads(table.with_suffix(".json").read_text())
    assert [entry["setting"] for entry in written["reports"]] == [3, 1]
    assert "| 3 |" in table.read_text()
    assert "- guidance_scale: 1.5\n" in table.read_text()
    assert "- num_steps" not in table.read_text()
    assert written["shared"]["guidance_scale"] == 1.5
    pytest.importorskip("matplotlib")
    assert table.with_suffix(".png").stat().st_size > 10_000
    # Another sweep of the same argument has its own table.
    kept = table.read_bytes()
    module.sampler.guidance_scale = 2.0
    trainer(tmp_path / "sweep", callbacks=[evaluation()], limit_test_batches=2).sweep(module, data(), num_steps=[3, 1])
    assert len(list(folder.glob("sweep_num_steps_weights-*.md"))) == 2
    assert table.read_bytes() == kept


def test_guidance_in_folders_of_ones_own(module: LatentDiffusionModule, tmp_path: Path) -> None:
    swept = trainer(tmp_path, callbacks=[evaluation(dirname=str(tmp_path / "mine"))])
    found = swept.sweep(module, data(), guidance_scale=[1, 2.5])
    assert module.sampler.guidance_scale == 1.5
    for name, report in zip(("guidance_scale-1", "guidance_scale-2.5"), found.reports, strict=True):
        assert values(Report.read(tmp_path / "mine" / name)) == values(report)
    assert len(list((tmp_path / "mine").glob("sweep_guidance_scale_weights-*.md"))) == 1


def test_averages_of_a_checkpoint(module: LatentDiffusionModule, make_module: MakeModule, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4, callbacks=[EMA(decay=0.5, also=[0.9]), Weights()], limit_val_batches=0)
    run.fit(module, data())
    path = str(tmp_path / "last.ckpt")
    run.save_checkpoint(path)
    found = trainer(tmp_path, callbacks=[evaluation()]).sweep(module, data(), path, ema=[None, 0.5, 0.9])
    assert [report.generation["ema"] for report in found.reports] == [None, 0.5, 0.9]
    assert {report.generation["checkpoint"] for report in found.reports} == {path}
    assert len({report.images["hash"] for report in found.reports}) == 3
    for decay, report in zip((None, 0.5, 0.9), found.reports, strict=True):
        module.load_weights(path, decay)
        callback = evaluation(dirname=str(tmp_path / f"by_hand_{decay}"))
        trainer(tmp_path, callbacks=[callback]).test(module, data(), verbose=False)
        assert callback.report is not None
        assert callback.report.images["hash"] == report.images["hash"]
    (table,) = (tmp_path / "evaluation").glob("sweep_ema_last-*.md")
    assert table.read_text().count("| as trained |") == 1
    assert f"- checkpoint: {path}\n" in table.read_text()


@pytest.mark.slow
def test_averages_are_loaded_into_weights_that_are_sharded(tmp_path: Path) -> None:
    """The test of the first setting has shared them out."""
    said = run_script(Path(__file__).with_name("sharded_sweep.py"), tmp_path).stdout.splitlines()
    plain, sharded = (line.split()[1:] for line in said if line.startswith(("plain ", "sharded ")))
    assert len(set(plain)) == 3
    assert sharded == plain


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "One of `num_steps`, `guidance_scale`, `ema` must be a list, got none"),
        ({"num_steps": [1], "guidance_scale": [2.0]}, "must be a list, got {'num_steps': .1., 'guidance_scale'"),
        ({"num_steps": []}, "must be a list"),
        ({"num_steps": [3, 0]}, r"`num_steps\[1\]` must be 1 or more"),
        ({"num_steps": [3, 3]}, "`num_steps` must hold each setting once"),
        ({"ema": [0.9]}, "`ema` needs `ckpt_path`"),
    ],
)
def test_wrong_settings_are_refused(
    options: dict[str, Any], said: str, module: LatentDiffusionModule, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, callbacks=[evaluation()]).sweep(module, data(), **options)
    assert not list(tmp_path.iterdir())


def test_what_was_finished_is_in_the_table(
    module: LatentDiffusionModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = module.generate

    def ends(*args: Any) -> Any:
        if module.sampler.num_steps == 2:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(module, "generate", ends)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, callbacks=[evaluation()]).sweep(module, data(), num_steps=[1, 2, 3])
    (table,) = tmp_path.rglob("sweep_num_steps_weights-*.csv")
    with table.open() as file:
        assert [row["num_steps"] for row in csv.DictReader(file)] == ["1"]


def test_too_many_steps_and_no_images_are_refused_beforehand(make_module: MakeModule, tmp_path: Path) -> None:
    chain = make_module(dit=True)
    with pytest.raises(ValueError, match="`num_steps` must be 1000 or less, the steps of the chain, got 2000"):
        trainer(tmp_path, callbacks=[evaluation()]).sweep(chain, data(), num_steps=[1, 2000])
    assert chain.sampler.num_steps == 2
    Sampler(num_steps=2000).check(FlowMatching())
    with pytest.raises(ValueError, match=r"`evaluation.num_images` must be 1 or more, got 0"):
        trainer(tmp_path, callbacks=[evaluation(num_images=0)]).sweep(make_module(), data(), num_steps=[1])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_swept_is_refused(
    module: LatentDiffusionModule, make_module: MakeModule, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="`model` must be a LatentDiffusionModule, got Foreign"):
        trainer(tmp_path).sweep(Foreign(), data(), num_steps=[1])
    free = make_module(conditioner=ClassLabels(0), denoiser=tiny_dit(num_embeds_ada_norm=1))
    with pytest.raises(ValueError, match="`guidance_scale`: the model knows no classes or captions"):
        trainer(tmp_path).sweep(free, data(), guidance_scale=[1.0, 2.0])
    with pytest.raises(ValueError, match="no `fast_dev_run`"):
        trainer(tmp_path, fast_dev_run=True).sweep(module, data(), num_steps=[1])
    with pytest.raises(ValueError, match="several Evaluations of `lpl test`"):
        trainer(tmp_path, callbacks=[evaluation(), evaluation(dirname="a")]).sweep(module, data(), num_steps=[1])
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data())
    plain = trainer(tmp_path)
    plain.strategy.connect(module)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="has none"):
        trainer(tmp_path).sweep(module, data(), str(tmp_path / "plain.ckpt"), ema=[None, 0.9])
    assert not list(tmp_path.rglob("*.png")), "before anything is generated"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the embedded model, few steps and images."""
    config = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
    options = ["--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path), "--data.val_images", "60"]
    evaluated = ["--evaluation.num_images", "50", "--evaluation.cache", "false", "--evaluation.reconstruct", "false"]
    saved = tmp_path / "saved.yaml"
    saved.write_text("weights_only: null\nckpt_path: null\n")  # as the config that `lpl fit` saves has them
    main(["sweep", "-c", config, "-c", str(saved), *options, *evaluated, "--num_steps", "[1, 2]"])
    assert "Sweep of `num_steps`" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`lpl sweep` needs trained weights"):
        main(["sweep", "-c", config, *options, "--num_steps", "[1]", "--model.weights", "null"])
    with pytest.raises(ValueError, match="evaluates during training, which `lpl sweep` is not"):
        main(["sweep", "-c", config, *options, "--num_steps", "[1]", "--evaluation.every_n_steps", "5"])
