"""Every config, through the command line, on real models."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import ROOT, tiny_taesd
from forked import LPL, Script
from PIL import Image

from lpl_lightning import Autoencoder, LatentDiffusionModule
from lpl_lightning.captioning.batches import Share
from lpl_lightning.captioning.journal import Journal
from lpl_lightning.cli import LPLCLI, WITHOUT_TRAINER, main
from lpl_lightning.evaluation import compare

CONFIGS = ROOT / "configs"
SHORT = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.batch_size=4",
]
FEW_STEPS = ["--model.sampler.num_steps=2"]
FEW = [*FEW_STEPS, '--stand_ins={"lpl_lightning.SampleGrid": {"num_images": 2}}']
"""Small grids, where they are not looked at."""


def in_folder(tmp_path: Path) -> list[str]:
    return [f"--trainer.logger.init_args.save_dir={tmp_path / 'runs'}"]


def last_run(tmp_path: Path) -> Path:
    return max((tmp_path / "runs").glob("*/version_*"), key=lambda p: p.stat().st_mtime)


def logged(run: Path) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    with (run / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append(float(value))
    return columns


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of small photos-to-be, and a saved autoencoder beside them."""
    for name, color in (("cat", (200, 80, 30)), ("dog", (20, 90, 160))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            image = Image.new("RGB", (40 + i, 36), color)
            image.putpixel((i, i), (255, 255, 255))
            image.save(tmp_path / "photos" / name / f"{i}.png")
    tiny_taesd(latent_channels=16).save_pretrained(tmp_path / "vae")
    return tmp_path / "photos"


def folder_args(photos: Path) -> list[str]:
    """Of ``configs/folder.yaml``, for so few photos a model of one layer."""
    sizes = {"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64}
    return [
        *(f"--model.denoiser.backbone.{name}={size}" for name, size in sizes.items()),
        f"--data.root={photos}",
        "--data.num_workers=0",
        f"--model.autoencoder.model={photos.parent / 'vae'}",
        "--model.conditioner.num_classes=2",
    ]


def test_quickstart_trains_with_lpl_and_draws(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    main(["fit", "-c", str(CONFIGS / "quickstart.yaml"), *SHORT, *FEW_STEPS, *in_folder(tmp_path)])
    run = last_run(tmp_path)
    metrics = logged(run)
    for name in ("loss", "loss_diffusion", "loss_lpl", "gate_share", "images_per_second"):
        assert name in metrics
    grid = run / "samples" / "step-00000002.png"
    with Image.open(grid) as image:
        assert image.size == (8 * 66 + 2, 8 * 66 + 2)
    assert f"Samples: {grid}" in caplog.text


@pytest.mark.parametrize(
    ("options", "said", "table"),
    [
        ([], True, False),
        (["--trainer.enable_model_summary=true"], True, False),
        (["--trainer.enable_model_summary=false"], False, False),
        (["--summary.start=false"], False, True),
        (["--trainer.callbacks+=lightning.pytorch.callbacks.ModelSummary"], True, True),
    ],
)
def test_a_run_says_once_what_is_trained(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: bool,
    table: bool,
) -> None:
    main(["fit", "-c", str(CONFIGS / "autoencoder_shapes.yaml"), *SHORT, *in_folder(tmp_path), *options])
    assert ("trainable parameters " in caplog.text) == said
    assert ("Trainable params" in caplog.text + capsys.readouterr().out) == table


def test_autoencoder_shapes(tmp_path: Path) -> None:
    main(["fit", "-c", str(CONFIGS / "autoencoder_shapes.yaml"), *SHORT, *in_folder(tmp_path)])
    assert (last_run(tmp_path) / "autoencoder" / "config.json").is_file()


def test_the_same_module_trains_an_autoencoder_on_a_folder(photos: Path, tmp_path: Path) -> None:
    args = ["fit", "-c", str(CONFIGS / "autoencoder_shapes.yaml"), *SHORT, *in_folder(tmp_path)]
    data = ["--data=lpl_lightning.ImageFolderDataModule", f"--data.root={photos}", "--data.image_size=32"]
    main([*args, *data, "--data.num_workers=0", "--data.batch_size=4"])
    assert Autoencoder(str(last_run(tmp_path) / "autoencoder")).latent_channels == 4


def test_denoiser_shapes(tmp_path: Path) -> None:
    main(["fit", "-c", str(CONFIGS / "denoiser_shapes.yaml"), *SHORT, *FEW, *in_folder(tmp_path)])
    assert (last_run(tmp_path) / "weights.safetensors").is_file()


@pytest.mark.parametrize("overlay", [[], ["-c", str(CONFIGS / "lpl.yaml")]], ids=["without_lpl", "with_lpl"])
def test_folder_with_and_without_the_overlay(photos: Path, tmp_path: Path, overlay: list[str]) -> None:
    main(
        ["fit", "-c", str(CONFIGS / "folder.yaml"), *overlay]
        + [*SHORT, *FEW, *folder_args(photos), *in_folder(tmp_path)]
    )
    metrics = logged(last_run(tmp_path))
    assert ("loss_lpl" in metrics) == bool(overlay)
    assert len(list((last_run(tmp_path) / "samples").iterdir())) == 2, "the overlay appends, it does not replace"


def test_post_training_validation_and_prediction_from_a_checkpoint(photos: Path, tmp_path: Path) -> None:
    base = ["-c", str(CONFIGS / "folder.yaml"), *FEW, *folder_args(photos), *in_folder(tmp_path)]
    main(["fit", *base, *SHORT])
    checkpoint = last_run(tmp_path) / "checkpoints" / "last.ckpt"
    main(["fit", *base, "-c", str(CONFIGS / "lpl.yaml"), *SHORT, f"--model.weights={checkpoint}"])
    assert "loss_lpl" in logged(last_run(tmp_path))
    main(["validate", *base, f"--ckpt_path={checkpoint}", "--trainer.enable_progress_bar=false"])
    out = tmp_path / "out"
    main(
        ["predict", *base, f"--ckpt_path={checkpoint}", f"--writer.dirname={out}", "--data.num_generate=3"]
        + ["--trainer.enable_progress_bar=false"]
    )
    assert sorted(p.parent.name + "/" + p.name for p in out.rglob("*.png")) == [
        "0000/000000.png",
        "0000/000002.png",
        "0001/000001.png",
    ]


def test_a_run_saves_the_config_that_makes_it_again(tmp_path: Path) -> None:
    main(["fit", "-c", str(CONFIGS / "quickstart.yaml"), *SHORT, *FEW, *in_folder(tmp_path)])
    first = last_run(tmp_path)
    main(["fit", "-c", str(first / "config.yaml")])
    second = last_run(tmp_path)
    assert second != first
    assert logged(first)["loss"] == logged(second)["loss"]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("given", [True, False])
def test_a_run_leaves_the_users_own_config_alone(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a logger the run's folder is where one stands; with one it may be that of the run that is repeated."""
    monkeypatch.chdir(tmp_path)
    own = Path("config.yaml")
    text = "# mine\n" + (CONFIGS / "quickstart.yaml").read_text()
    own.write_text(text)
    config = str(own) if given else str(CONFIGS / "quickstart.yaml")
    nothing = ["--trainer.max_steps=0", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    with caplog.at_level("INFO"):
        main(["fit", "-c", config, *nothing, "--trainer.logger=false", "--trainer.callbacks=null"])
    assert own.read_text() == text
    assert f"{tmp_path / 'config.yaml'} is left as it is" in caplog.text
    assert ("config.yaml    " in caplog.text) == given, "the summary names it where it is the run's"
    if given:
        logger = [
            "--trainer.logger=CSVLogger",
            "--trainer.logger.save_dir=..",
            f"--trainer.logger.name={tmp_path.name}",
        ]
        main(["fit", "-c", config, *nothing, *logger, "--trainer.logger.version=", "--trainer.callbacks=null"])
        assert own.read_text() == text


def test_a_checkpoint_of_the_command_line_builds_its_own_parts(photos: Path, tmp_path: Path) -> None:
    main(["fit", "-c", str(CONFIGS / "folder.yaml"), *FEW, *SHORT, *folder_args(photos), *in_folder(tmp_path)])
    checkpoint = last_run(tmp_path) / "checkpoints" / "last.ckpt"
    module = LatentDiffusionModule.load_from_checkpoint(checkpoint, weights_only=True)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert module.sampler.num_steps == 2
    assert module.generate([0], [1]).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("*.yaml")))
def test_every_key_of_a_config_is_explained(name: str) -> None:
    """A comment stands above each block of keys; no config is a bare list of settings."""
    lines = (CONFIGS / name).read_text().splitlines()
    comments = sum(line.lstrip().startswith("#") for line in lines)
    assert comments >= 0.3 * (len(lines) - comments)


@pytest.mark.parametrize(
    ("words", "count"),
    [(["fit"], 1), (["--help"], 0), (["-c", "CONFIG", "fit"], len(LPLCLI.subcommands()))],
    ids=["command", "help", "config_first"],
)
def test_arguments_are_added_of_the_command_that_is_called(
    words: list[str],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those of all take longer to add than one's take to read; a file before the command may be of any."""
    added = []
    add = LPLCLI.add_arguments_to_parser

    def counted(self: LPLCLI, parser: Any) -> None:
        added.append(parser)
        add(self, parser)

    monkeypatch.setattr(LPLCLI, "add_arguments_to_parser", counted)
    own = tmp_path / "all.yaml"
    own.write_text(yaml.safe_dump({"fit": yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())}))
    words = [str(own) if word == "CONFIG" else word for word in words]
    with pytest.raises(SystemExit) as ended:
        main(words if words == ["--help"] else [*words, *(["-c", str(CONFIGS / "quickstart.yaml")]), "--print_config"])
    assert ended.value.code == 0
    assert len(added) == count
    said = capsys.readouterr().out
    assert all(f"    {name} " in said for name in LPLCLI.subcommands()) == (words == ["--help"])


def test_print_config_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*args: str) -> Any:
        with pytest.raises(SystemExit):
            main(["fit", *args, "--print_config"])
        return capsys.readouterr().out

    first = printed("-c", str(CONFIGS / "quickstart.yaml"))
    (tmp_path / "again.yaml").write_text(first)
    again = printed("-c", str(tmp_path / "again.yaml"))
    assert yaml.safe_load(first) == yaml.safe_load(again)
    assert yaml.safe_load(first)["model"]["init_args"]["weights"] == "embedded:denoiser_shapes"


def test_print_config_prints_what_a_run_would_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the stand-ins of all files, also where it is laid under another that has some."""

    def printed(*names: str) -> Any:
        with pytest.raises(SystemExit):
            main(["fit", *(word for name in names for word in ("-c", name)), "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("stand_ins: {lpl_lightning.Sampler: {num_steps: 7}}")
    second.write_text("stand_ins: {lpl_lightning.FlowMatching: {shift: 3.0}}")
    whole = printed(str(CONFIGS / "quickstart.yaml"), str(first), str(second))
    parts = whole["model"]["init_args"]
    assert parts["sampler"]["init_args"]["num_steps"] == 7
    assert parts["noise"]["init_args"]["shift"] == 3
    assert set(whole["stand_ins"]) == {"lpl_lightning.Sampler", "lpl_lightning.FlowMatching"}
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(whole))
    assert printed(str(tmp_path / "printed.yaml"), str(second)) == whole
    assert "stand_ins" in printed()


def test_a_checkpoint_is_left_at_the_end(photos: Path, tmp_path: Path) -> None:
    """Also where the run ends in the middle of an epoch and between two validations."""
    args = ["fit", "-c", str(CONFIGS / "folder.yaml"), *FEW, *SHORT, *folder_args(photos), *in_folder(tmp_path)]
    main([*args, "--trainer.val_check_interval=1000", "--trainer.max_steps=1"])
    assert torch.load(last_run(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda photos: shutil.rmtree(photos), "`root` must be a folder of images, but .* does not exist"),
        (lambda photos: list(map(shutil.rmtree, [*photos.iterdir()])), "`root` must hold images, but no file"),
        (lambda photos: shutil.rmtree(photos / "cat"), "`num_classes`=2 of the conditioner .* has 1 classes"),
    ],
    ids=["missing", "empty", "a_class_is_gone"],
)
def test_a_bad_folder_is_one_clear_error(
    photos: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(photos)
    args = ["fit", "-c", str(CONFIGS / "folder.yaml"), *SHORT, *folder_args(photos), *in_folder(tmp_path)]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(args)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_unreadable_photo_among_good_ones_is_one_warning(photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "bad.png").write_bytes((photos / "cat" / "1.png").read_bytes()[:60])
    args = ["fit", "-c", str(CONFIGS / "folder.yaml"), *FEW, *SHORT, *folder_args(photos), *in_folder(tmp_path)]
    with pytest.warns(UserWarning, match=r"Left out 1 of 17 images that cannot be read: .*bad\.png"):
        main(args)
    assert len(logged(last_run(tmp_path))["loss"]) == 2


def test_prediction_needs_weights_and_a_failed_one_stands_in_no_ones_way(photos: Path, tmp_path: Path) -> None:
    base = ["-c", str(CONFIGS / "folder.yaml"), *FEW, *folder_args(photos), *in_folder(tmp_path)]
    base += ["--trainer.enable_progress_bar=false", "--data.num_generate=2", f"--writer.dirname={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match="`lpl predict` needs trained weights"):
        main(["predict", *base])
    with pytest.raises((ValueError, FileNotFoundError)):
        main(["predict", *base, f"--ckpt_path={tmp_path / 'nowhere.ckpt'}"])
    assert not (tmp_path / "out").exists()


BAD = [
    (["--model.sampler.num_stepz=3"], "num_stepz"),
    (["--data.image_size=30"], "`image_size`=30"),
    (["--model.conditioner.num_classes=5", "--model.weights=null"], "has 8 classes"),
    (["--model.denoiser.backbone.num_layers=3"], "embedded:denoiser_shapes are of another model"),
    (["--model.autoencoder.model=./nowhere"], "`model`='./nowhere' does not exist"),
    (["--model.weights=./nowhere.ckpt"], "`weights`='./nowhere.ckpt' does not exist"),
    (["--data.batch_size=0"], "`batch_size` must be 1 or more, got 0"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[a[0].split("=")[0] for a, _ in BAD])
def test_bad_input_is_one_clear_error(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as raised:
        main(["fit", "-c", str(CONFIGS / "quickstart.yaml"), *SHORT, *in_folder(tmp_path), *args])
    said = str(raised.value) + capsys.readouterr().err
    assert message in said
    if not isinstance(raised.value, SystemExit):
        assert len(str(raised.value)) < 400, "the message is the error, not a dump of the config"


def test_the_last_checkpoint_of_a_run_or_none(tmp_path: Path) -> None:
    """Not the model as it was drawn, which Lightning would take without more than a warning."""
    tiny = ["-c", str(CONFIGS / "quickstart.yaml"), "-c", str(CONFIGS / "tiny.yaml"), *in_folder(tmp_path)]
    tiny += ["--trainer.enable_progress_bar=false", "--ckpt_path=last"]
    commands = {
        "validate": ["--validation.num_images=0"],
        "test": ["--evaluation.num_images=4"],
        "predict": ["--data.num_generate=2", f"--writer.dirname={tmp_path / 'images'}"],
        "sweep": ["--num_steps=[1]", "--evaluation.num_images=4"],
    }
    for name, options in commands.items():
        with pytest.raises(
            ValueError, match=f"`ckpt_path` is last, and there is no checkpoint in .*: give `lpl {name}"
        ):
            main([name, *tiny, *options])
    main(["fit", *tiny, "--trainer.max_steps=2"])
    for name, options in commands.items():
        main([name, *tiny, *options])
    assert len(list((tmp_path / "images").rglob("*.png"))) == 2


ONLY_STEPS = [
    "--trainer.accelerator=cpu",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.callbacks=[{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 1}}]",
    "--data.batch_size=2",
]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_training_goes_on_with_a_run_of_the_same_weights_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of all runs in the logger's folder; wherever the weights lie by now."""
    command = ["fit", "-c", str(CONFIGS / "quickstart.yaml"), *ONLY_STEPS, *in_folder(tmp_path), "--ckpt_path=last"]
    main([*command, "--trainer.max_steps=1", "--model.weights=null"])
    (base,) = last_run(tmp_path).rglob("*.ckpt")
    command.append("--trainer.max_steps=2")
    said = f"{base} is passed over.*its run began from no `model.weights`, this one begins from {base}"
    with pytest.warns(UserWarning, match=said):
        main([*command, f"--model.weights={base}"])
    assert "No checkpoint to go on with in" in caplog.text
    own = last_run(tmp_path)
    assert len(logged(own)["loss"]) == 2
    main([*command, f"--model.weights={shutil.copy(base, tmp_path / 'moved.ckpt')}"])
    (newest,) = own.rglob("*.ckpt")
    assert f"`trainer.max_steps` is 2, and {newest} is of step 2: nothing is left to do." in caplog.text
    # What a run's own config calls the last is of these, too.
    for run, checkpoint in ((base.parents[1], base), (own, newest)):
        given = ["predict", "-c", str(run / "config.yaml"), "--data.num_generate=1", *FEW_STEPS]
        with pytest.warns(UserWarning, match="is passed over") if run != own else nullcontext():
            main([*given, f"--writer.dirname={tmp_path / run.name}"])
        assert yaml.safe_load((last_run(tmp_path) / "config.yaml").read_text())["ckpt_path"] == str(checkpoint)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_saved_config_goes_on_and_hides_no_newer_checkpoint(tmp_path: Path) -> None:
    command = ["fit", "-c", str(CONFIGS / "quickstart.yaml"), *ONLY_STEPS, *in_folder(tmp_path)]
    main([*command, "--trainer.max_steps=1", "--ckpt_path=last"])
    first = last_run(tmp_path)
    main(["fit", "-c", str(first / "config.yaml"), "--trainer.max_steps=2"])
    second = last_run(tmp_path)
    assert len(logged(second)["loss"]) == 1
    assert {yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] for run in (first, second)} == {"last"}
    predict = ["predict", "-c", str(second / "config.yaml"), "--data.num_generate=1", *FEW_STEPS]
    main([*predict, f"--writer.dirname={tmp_path / 'images'}"])
    (newest,) = second.rglob("*.ckpt")
    assert yaml.safe_load((last_run(tmp_path) / "config.yaml").read_text())["ckpt_path"] == str(newest)
    (oldest,) = first.rglob("*.ckpt")
    main([*command, "--trainer.max_steps=2", f"--ckpt_path={oldest}"])
    third = last_run(tmp_path)
    predict[2] = str(third / "config.yaml")
    with pytest.raises(
        ValueError, match=f"{third / 'config.yaml'} names {oldest}, from which its run went on: give `l"
    ):
        main(predict)
    main([*predict, f"--ckpt_path={oldest}", f"--writer.dirname={tmp_path / 'older'}"])
    # A config of one's own that names a checkpoint beside it means that.
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    mine = shutil.copy(oldest, tmp_path / "mine" / "checkpoints" / "chosen.ckpt")
    saved = yaml.safe_load((third / "config.yaml").read_text())
    predict[2] = str(tmp_path / "mine" / "mine.yaml")
    Path(predict[2]).write_text(yaml.safe_dump(saved | {"ckpt_path": str(mine)}))
    main([*predict, f"--writer.dirname={tmp_path / 'mine' / 'images'}"])


def test_two_of_lpl_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two LPLCallbacks .* Leave configs/lpl.yaml out"):
        main(["fit", *(word for name in ("quickstart", "lpl") for word in ("-c", str(CONFIGS / f"{name}.yaml")))])
    twice = tmp_path / "ema.yaml"
    twice.write_text("trainer: {callbacks+: [lpl_lightning.EMA, lpl_lightning.EMA]}")
    with pytest.raises(ValueError, match="two EMAs .* such as by `stand_ins: {lpl_lightning.EMA: "):
        main(["fit", "-c", str(CONFIGS / "quickstart.yaml"), "-c", str(twice)])


def test_an_autoencoder_predicts_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`lpl predict` generates images, which an AutoencoderModule does not"):
        main(["predict", "-c", str(CONFIGS / "autoencoder_shapes.yaml"), *in_folder(tmp_path)])


@pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback with a model that overrides")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_lightnings_averages_and_time_limit(tmp_path: Path) -> None:
    """They copy the module, and come after all other callbacks; a run goes on with its own kind of optimizer alone."""
    tiny = ["fit", "-c", str(CONFIGS / "quickstart.yaml"), "-c", str(CONFIGS / "tiny.yaml"), *in_folder(tmp_path)]
    tiny += ["--trainer.enable_progress_bar=false", "--trainer.max_time=00:01:00:00", "--ckpt_path=last"]
    averages = ["--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging"]
    main([*tiny, *averages, "--trainer.max_steps=2"])
    with pytest.raises(ValueError, match="The checkpoint's optimizer is no SGD: .* give the checkpoint as `model.wei"):
        main([*tiny, *averages, "--trainer.max_steps=4", "--model.optimizer=torch.optim.SGD"])
    main([*tiny, *averages, "--trainer.max_steps=4"])


def test_a_checkpoint_of_another_model_is_refused(photos: Path, tmp_path: Path) -> None:
    base = ["fit", "-c", str(CONFIGS / "folder.yaml"), *FEW, *SHORT, *folder_args(photos), *in_folder(tmp_path)]
    main(base)
    checkpoint = last_run(tmp_path) / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="of another model"):
        main([*base, f"--ckpt_path={checkpoint}", "--model.denoiser.backbone.num_layers=2"])


def test_prediction_goes_on_in_another_process(tmp_path: Path) -> None:
    """What the first process recorded is what the second one finds, whatever the order of Python's sets."""
    out = tmp_path / "out"
    command = ["predict", "-c", str(CONFIGS / "quickstart.yaml"), *FEW, f"--writer.dirname={out}"]
    command += ["--trainer.accelerator=cpu", *in_folder(tmp_path), "--trainer.enable_progress_bar=false"]
    environment = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    other = [sys.executable, "-m", "lpl_lightning", *command, "--data.num_generate=1"]
    done = subprocess.run(other, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = out.rglob("*.png")
    written = made.stat().st_mtime_ns
    main([*command, "--data.num_generate=2"])
    assert len(list(out.rglob("*.png"))) == 2
    assert made.stat().st_mtime_ns == written


def test_a_signal_ends_what_is_no_training(tmp_path: Path) -> None:
    """Lightning's loops over what is predicted, and ours over what is measured, do not look for one."""
    options = ["--data.num_generate=100000", f"--writer.dirname={tmp_path / 'out'}", "--trainer.accelerator=cpu"]
    predicting = Script(LPL, "predict", "-c", str(CONFIGS / "quickstart.yaml"), *FEW, *options, *in_folder(tmp_path))
    while not list(tmp_path.rglob("*.png")) and predicting.process.is_alive():
        time.sleep(0.1)
    predicting.process.terminate()
    assert predicting.end(60).returncode == 128 + signal.SIGTERM
    assert list(tmp_path.rglob("*.png"))


LOSS = "--trainer.callbacks.loss.init_args"


def test_the_losss_options_from_the_command_line(tmp_path: Path) -> None:
    options = [
        "--trainer.callbacks.weight=auto",
        "--trainer.callbacks.calibration_steps=1",
        f'{LOSS}.depth=["up_0", "image"]',
        f"{LOSS}.threshold.flow_t=0.9",
        f"{LOSS}.depth_weights=[0.5, 2]",
        f"{LOSS}.statistics=separate",
    ]
    main(["fit", "-c", str(CONFIGS / "quickstart.yaml"), *SHORT, *FEW, *options, *in_folder(tmp_path)])
    metrics = logged(last_run(tmp_path))
    assert "lpl_depth/image" in metrics
    assert "lpl_depth/up_1" not in metrics
    assert metrics["lpl_weight"][0] == 0 < metrics["lpl_weight"][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([f"{LOSS}.threshold={{nsr: 2, flow_t: 0.5}}"], "`threshold` must be given in exactly one of the units nsr"),
        ([f"{LOSS}.depth=[up_9]"], "`depth` must name stages among"),
        ([f"{LOSS}.preset=rgb", f"{LOSS}.quantile=0.7"], "`quantile` must lie from 0 to below 0.5"),
        (["--trainer.callbacks.target_share=2", "--trainer.callbacks.weight=auto"], "`target_share` must lie between"),
    ],
    ids=["two units", "stage", "quantile", "share"],
)
def test_a_bad_option_of_the_loss_is_one_clear_sentence(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(["fit", "-c", str(CONFIGS / "quickstart.yaml"), *SHORT, *options, *in_folder(tmp_path)])


def test_a_test_of_an_untrained_model_is_refused(photos: Path, tmp_path: Path) -> None:
    base = ["test", "-c", str(CONFIGS / "folder.yaml"), *FEW, *folder_args(photos), *in_folder(tmp_path)]
    base += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    with pytest.raises(ValueError, match="`lpl test` needs trained weights.*For the loss alone, set .*num_images 0"):
        main(base)
    main([*base, "--evaluation.num_images=0"])
    assert not list(tmp_path.rglob("report.json"))


def test_what_is_refused_on_the_terminal_is_one_line(tmp_path: Path) -> None:
    args = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    done = Script(LPL, *args).end()
    assert done.returncode == 1
    said = f"`runs`: there is no {tmp_path / 'a'}. Give the folder of an evaluation, or its report.json."
    assert done.stderr.strip() == f"lpl: error: {said}"
    told = Script(LPL, *args, LPL_TRACEBACK="1").end()
    assert told.returncode == 1
    assert "Traceback (most recent call last)" in told.stderr
    assert told.stderr.strip().splitlines()[-1] == f"FileNotFoundError: {said}"
    with pytest.raises(FileNotFoundError, match="there is no"):
        main(args)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["test", "--ckpt_path=best"], "`ckpt_path` must be a checkpoint or last, got best"),
        (["predict", "--writer.dirname=FILE"], "`dirname` must be a folder, but FILE is a file"),
        (["predict", "--trainer.devices=0"], "`Trainer(devices='0')` value is not"),
    ],
)
def test_what_would_be_a_traceback_is_one_line(
    command: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.touch()
    words = [word.replace("FILE", str(file)) for word in command[1:]]
    options = ["--trainer.accelerator=cpu", *in_folder(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lpl", command[0], "-c", str(CONFIGS / "quickstart.yaml"), *options, *words])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main()
    signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == 1
    assert f"lpl: error: {said.replace('FILE', str(file))}" in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An error that another library raises is none of our refusals."""
    monkeypatch.setattr(sys, "argv", ["lpl", "compare", str(tmp_path), str(tmp_path)])
    monkeypatch.setitem(WITHOUT_TRAINER, "compare", _stumbles)
    with pytest.raises(ValueError, match="invalid literal"):
        main()
    monkeypatch.setitem(WITHOUT_TRAINER, "compare", compare)
    with pytest.raises(SystemExit):
        main()


def _stumbles(runs: list[str]) -> None:
    int("x")


@pytest.mark.parametrize("key", ["suite", "evaluation.suite", "validation.suite"])
def test_a_suite_that_is_not_there_is_named(key: str) -> None:
    command = ["evaluate", "images"] if key == "suite" else ["test", "-c", str(CONFIGS / "quickstart.yaml")]
    for given in ([f"--{key}", "nope.yaml"], [f"--{key}=nope.yaml"]):
        with pytest.raises(FileNotFoundError, match=f"`{key}`: there is no file nope.yaml"):
            main([*command, *given])


def test_a_run_that_ends_for_its_loss_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a ``FloatingPointError`` of another's code is, only its traceback says."""
    config = ["-c", str(CONFIGS / "quickstart.yaml"), "-c", str(CONFIGS / "tiny.yaml"), *in_folder(tmp_path)]
    guard = "{class_path: lpl_lightning.StepGuard, init_args: {policy: raise}}"

    def train(how: str) -> None:
        spoils = f"{{class_path: test_cli.Spoils, init_args: {{how: {how}}}}}"
        monkeypatch.setattr(sys, "argv", ["lpl", "fit", *config, f"--trainer.callbacks=[{spoils}, {guard}]"])
        main()

    with pytest.raises(SystemExit) as ended:
        train("loss")
    assert ended.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lpl: error: Optimizer step 0 is not finite: the loss. The weights are as they were")
    with pytest.raises(FloatingPointError, match="of another"):
        train("error")
    monkeypatch.setenv("LPL_TRACEBACK", "1")
    with pytest.raises(FloatingPointError, match="Optimizer step 0 is not finite"):
        train("loss")


class Spoils(pl.Callback):
    """Makes a step end in one of two ways."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if self.how == "error":
            raise FloatingPointError("of another")
        loss.data.fill_(float("nan"))


def test_a_share_that_another_process_has_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(runs: list[str]) -> None:
        with Journal(tmp_path, ["a.png"], Share()):
            pass

    monkeypatch.setattr(sys, "argv", ["lpl", "compare", str(tmp_path), str(tmp_path)])
    monkeypatch.setitem(WITHOUT_TRAINER, "compare", write)
    with Journal(tmp_path, ["a.png"], Share()):
        with pytest.raises(SystemExit):
            main()
        assert re.fullmatch(r"lpl: error: \S+part-0-of-1\.jsonl is being .*`shard`\.\n", capsys.readouterr().err)
        monkeypatch.setenv("LPL_TRACEBACK", "1")
        with pytest.raises(BlockingIOError, match="is being written"):
            main()


def test_a_run_of_settings_that_no_checkpoint_holds_is_refused_before_it_starts(tmp_path: Path) -> None:
    args = [
        "fit",
        "--seed_everything=0",
        "--model=test_cli.Odd",
        "--data=lpl_lightning.ShapesDataModule",
        "--data.image_size=16",
    ]
    with pytest.raises(ValueError, match="`model`: the hyperparameter 'own' is a Own, which could not"):
        main([*args, "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.max_steps=1"])


class Odd(pl.LightningModule):
    """Saves what cannot be saved."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"own": Odd.Own()})

    class Own:
        """No plain value."""
