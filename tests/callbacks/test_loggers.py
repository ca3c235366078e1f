"""Every logger of a trainer gets scalars, and those that have pictures grids, spectra and losses by noise level."""

from __future__ import annotations

import csv
import importlib.util
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from conftest import ROOT
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from PIL import Image

from lpl_lightning.cli import main
from lpl_lightning.run_folder import log_picture, run_folder

SCALARS = {"loss", "loss_lpl", "gate_share", "val_loss", "val_loss_diffusion_at_1", "eval_spectrum_log_difference"}
PICTURES = {"samples", "loss_by_noise", "eval_spectra"}


def fit(tmp_path: Path, loggers: str) -> None:
    every = "{class_path: lpl_lightning.Evaluation, init_args: {num_images: 4, every_n_steps: 2, suite: SUITE}}"
    suite = "{class_path: lpl_lightning.evaluation.Suite, init_args: {measures: [MEASURE]}}"
    every = every.replace("SUITE", suite.replace("MEASURE", "lpl_lightning.evaluation.SpectrumMetrics"))
    (tmp_path / "more.yaml").write_text(
        f"trainer:\n  logger: {loggers}\n  enable_progress_bar: false\n  callbacks+: [{every}]\n"
        "loss_by_noise: {in_training: true, noise_to_signal: [0.5, 1.0]}\n"
    )
    quickstart, tiny = (str(ROOT / "configs" / f"{name}.yaml") for name in ("quickstart", "tiny"))
    main(["fit", "-c", quickstart, "-c", tiny, "-c", str(tmp_path / "more.yaml")])


def logger(name: str, folder: Path, more: str = "") -> str:
    return f"{{class_path: lightning.pytorch.loggers.{name}, init_args: {{save_dir: {folder}, name: run{more}}}}}"


HAS_WANDB = importlib.util.find_spec("wandb") is not None


@pytest.mark.slow
def test_several_loggers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's folder is the run's; CSV has no pictures, which lie beside its table."""
    pytest.importorskip("matplotlib")
    loggers = [logger("CSVLogger", tmp_path / "csv"), logger("TensorBoardLogger", tmp_path / "board")]
    sent: list[dict[str, Any]] = []
    if HAS_WANDB:  # without network
        monkeypatch.setenv("WANDB_SILENT", "true")
        run_of_wandb: Any = import_module("wandb.sdk.wandb_run").Run
        log = run_of_wandb.log

        def listened(self: Any, data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            sent.append(data)
            log(self, data, *args, **kwargs)

        monkeypatch.setattr(run_of_wandb, "log", listened)
        (tmp_path / "wandb").mkdir()  # wandb 0.19 takes another folder where there is none
        loggers.append(logger("WandbLogger", tmp_path / "wandb", ", offline: true"))
    fit(tmp_path, f"[{', '.join(loggers)}]")
    run = tmp_path / "csv" / "run" / "version_0"
    with (run / "metrics.csv").open() as file:
        assert set(csv.DictReader(file).fieldnames or []) >= SCALARS
    assert (run / "config.yaml").is_file()
    assert len(list(run.glob("samples/*.png"))) == 2
    assert len(list(run.glob("validation/loss_by_noise_*.png"))) == 1
    (spectra,) = run.glob("evaluation/*/*/spectra.png")
    reading: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    board = reading.EventAccumulator(str(tmp_path / "board" / "run" / "version_0")).Reload()
    assert set(board.Tags()["scalars"]) >= SCALARS
    assert set(board.Tags()["images"]) == PICTURES
    assert [event.step for event in board.Images("samples")] == [0, 2]
    (shown,) = board.Images("eval_spectra")
    with Image.open(spectra) as image:
        assert (shown.step, shown.width, shown.height) == (2, *image.size)
    if HAS_WANDB:
        wandb: Any = import_module("wandb")
        wandb.finish()
        assert set().union(*sent) >= SCALARS | PICTURES
        assert all(isinstance(found[name][0], wandb.Image) for found in sent for name in PICTURES & set(found))
        assert len(list(tmp_path.glob("wandb/wandb/offline-run-*/files/media/images/samples_*.png"))) == 2


@pytest.mark.skipif(not HAS_WANDB, reason="no wandb: with it the test above looks at what it is sent, too")
def test_runs_of_weights_and_biases_have_folders_of_their_own(tmp_path: Path) -> None:
    own = WandbLogger(save_dir=tmp_path, project="mine", version="abc", offline=True)
    assert run_folder(pl.Trainer(logger=own, accelerator="cpu")) == tmp_path / "mine" / "abc"


class Elsewhere(Logger):
    """A logger as others write them, without pictures."""

    save_dir = "somewhere"
    name = "mine"
    version: int | str = 3

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any) -> None:
        pass


def test_each_logger_has_a_folder_for_each_run(tmp_path: Path) -> None:
    def folder(loggers: Any) -> Path | None:
        return run_folder(pl.Trainer(logger=loggers, default_root_dir=tmp_path, accelerator="cpu"))

    elsewhere = Elsewhere()
    assert folder(elsewhere) == Path("somewhere/mine/version_3")
    elsewhere.version = "abc"
    assert folder([elsewhere, CSVLogger(tmp_path)]) == Path("somewhere/mine/abc")
    assert folder(CSVLogger(tmp_path, "a")) == tmp_path / "a" / "version_0"
    assert folder(TensorBoardLogger(tmp_path, "b", version="c")) == tmp_path / "b" / "c"
    assert folder(False) == tmp_path
    # Pictures are not asked of it.
    log_picture(pl.Trainer(logger=elsewhere, accelerator="cpu"), "nothing", Path("nowhere.png"))
