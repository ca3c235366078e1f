"""Where evaluations lie, what each is of, and what stands in the way of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_kl
from evaluations import data, evaluation, values
from lightning.pytorch.loggers import CSVLogger
from test_module import trainer
from torchvision.utils import save_image

from lpl_lightning import Autoencoder, ClassTokens, Evaluation, ImageFolderDataModule, LatentDiffusionModule
from lpl_lightning.evaluation import Report, SpectrumMetrics, Suite
from lpl_lightning.evaluation.comparison_runs import read_runs
from lpl_lightning.evaluation.generated import GeneratedFolder
from lpl_lightning.frozen import weights_hash

MakeModule = Callable[..., LatentDiffusionModule]


@pytest.fixture
def module(make_module: MakeModule) -> LatentDiffusionModule:
    torch.manual_seed(0)
    return make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8))


def small(**options: Any) -> Evaluation:
    settings: dict[str, Any] = {"num_images": 3, "suite": Suite([SpectrumMetrics()]), "reconstruct": False}
    return evaluation(**(settings | options))


def measured(module: LatentDiffusionModule, folder: Path, callback: Evaluation, **options: Any) -> Report:
    trainer(folder, callbacks=[callback], **options).test(module, data(), verbose=False)
    assert callback.report is not None
    return callback.report


def pictures(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("images/*/*.png")}


def photos(folder: Path, count: int = 20) -> Path:
    folder.mkdir()
    for i in range(count):
        save_image((data().dataset("test")[i]["image"] + 1) / 2, folder / f"{i}.png")
    return folder


# Where


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("kind", ["fit", "fit into a folder", "test", "test into a folder"])
def test_folders_may_be_relative(
    module: LatentDiffusionModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As every config that ships has them: ``save_dir: runs``."""
    monkeypatch.chdir(tmp_path)
    into = {"dirname": "mine"} if "folder" in kind else {}
    logger = CSVLogger("runs", name="", version=0)
    if kind.startswith("fit"):
        callback = small(every_n_steps=1, **into)
        trainer(Path("root"), callbacks=[callback], logger=logger).fit(module, data())
        count, depth = 2, "step-*/3-images-*/report.json"
    else:
        callback = small(**into)
        trainer(Path("root"), callbacks=[callback], logger=logger).test(module, data(), verbose=False)
        count, depth = 1, "report.json" if into else "weights-*/3-images-*/report.json"
    assert callback.folder is not None
    assert callback.folder.is_absolute()
    assert GeneratedFolder(Path("some")).folder == tmp_path / "some"
    found = list(Path("mine" if into else "runs/version_0/evaluation").glob(depth))
    assert len(found) == count
    for path in found:
        assert len(read_runs([str(path)])[0].images) == 3


def test_a_report_never_takes_the_place_of_another(module: LatentDiffusionModule, tmp_path: Path) -> None:
    """Of another suite, number or reference; the images are made once."""
    first = measured(module, tmp_path, small())
    made = pictures(tmp_path)
    assert len(made) == 3
    real = photos(tmp_path / "real")
    ways: list[dict[str, Any]] = [
        {"suite": Suite([SpectrumMetrics(window=True)])},
        {"num_images": 2},
        {"reference": str(real)},
        {"reconstruct": True},
    ]
    (real / "0.png").write_bytes((real / "1.png").read_bytes())
    others = [measured(module, tmp_path, small(**way)) for way in ways]
    assert pictures(tmp_path) == made
    reports = {path.parent: Report.read(path) for path in tmp_path.rglob("report.json")}
    assert len(reports) == 5
    assert sorted(str(values(one)) for one in reports.values()) == sorted(str(values(one)) for one in [first, *others])
    for folder in reports:
        assert len(read_runs([str(folder)])[0].images) == 3
    measured(module, tmp_path, small())
    assert len(list(tmp_path.rglob("report.json"))) == 5
    with pytest.raises(ValueError, match=r"holds 5 reports: .*\(2 images against test images of Shapes.*Give one"):
        read_runs([str(tmp_path)])


def test_a_folder_of_ones_own_keeps_its_report(module: LatentDiffusionModule, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    measured(module, tmp_path, small(dirname=out))
    before = (tmp_path / "out" / "report.json").read_bytes()
    for options, differ in (({"num_images": 2}, "generated"), ({"suite": Suite([SpectrumMetrics(True)])}, "suite")):
        with pytest.raises(ValueError, match=rf"`dirname`: .*out holds a report that was made otherwise \({differ};"):
            measured(module, tmp_path, small(dirname=out, **options))
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    measured(module, tmp_path, small(dirname=out))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`dirname` must be a folder, but .*file is a file"):
        measured(module, tmp_path, small(dirname=str(tmp_path / "file" / "out")))


# What makes images


def test_images_of_another_autoencoder_are_not_taken(module: LatentDiffusionModule, tmp_path: Path) -> None:
    """Of the same class and config, with other weights, or another scale of latents."""
    hashes = [measured(module, tmp_path, small()).images["hash"]]
    torch.manual_seed(7)
    module.autoencoder = Autoencoder(tiny_kl(scaling_factor=0.5, shift_factor=0.1))
    hashes.append(measured(module, tmp_path, small()).images["hash"])
    module.autoencoder = Autoencoder(module.autoencoder.model, scaling_factor=0.7)
    hashes.append(measured(module, tmp_path, small()).images["hash"])
    assert len(set(hashes)) == 3
    assert len(pictures(tmp_path)) == 9


def test_an_autoencoder_is_hashed_once(
    module: LatentDiffusionModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Any] = []

    def watched(model: torch.nn.Module) -> str:
        hashed.append(model)
        return weights_hash(model)

    for name in ("callbacks.evaluation", "evaluation.settings"):
        monkeypatch.setattr(f"lpl_lightning.{name}.weights_hash", watched)
    report = measured(module, tmp_path, small(reconstruct=True))
    assert hashed == [module.autoencoder.model]
    assert report.generation["autoencoder"]["weights"] == weights_hash(module.autoencoder.model)
    trainer(tmp_path, callbacks=[small(every_n_steps=1)]).fit(module, data())
    assert len(hashed) == 2


def test_the_precision_is_that_of_the_images(module: LatentDiffusionModule, tmp_path: Path) -> None:
    full = measured(module, tmp_path, small())
    half = measured(module, tmp_path, small(), precision="bf16-mixed")
    assert (full.generation["trainer_precision"], half.generation["trainer_precision"]) == ("32-true", "bf16-mixed")
    assert full.images["hash"] != half.images["hash"]
    measured(module, tmp_path, small(dirname=str(tmp_path / "out")))
    with pytest.raises(ValueError, match=r"made with other settings \(trainer_precision; see"):
        measured(module, tmp_path, small(dirname=str(tmp_path / "out")), precision="bf16-mixed")


def test_images_that_are_not_finite_are_no_images(module: LatentDiffusionModule, tmp_path: Path) -> None:
    generate = module.generate

    def spoiled(seeds: Any, labels: Any = None, captions: Any = None) -> torch.Tensor:
        images = generate(seeds, labels, captions)
        for place, seed in enumerate(seeds):
            if seed in (6, 7):
                images[place, 1, 2, 3] = float("nan")
        return images

    module.generate = spoiled  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match=r"2 of 5 hold NaN or infinity: seed 6, seed 7\. .*checkpoint"):
        measured(module, tmp_path, small(num_images=10))
    assert sorted(int(path.stem) for path in pictures(tmp_path)) == [0, 1, 2, 3, 4], "the batch before"
    assert not list(tmp_path.rglob("report.json"))


def test_images_that_nothing_tells_of_are_not_taken(module: LatentDiffusionModule, tmp_path: Path) -> None:
    callback = small(dirname=str(tmp_path / "out"))
    measured(module, tmp_path, callback)
    record = tmp_path / "out" / "images" / "settings.json"
    for content in ("", '{"seed": 1', "[1]"):
        record.write_text(content)
        with pytest.raises(ValueError, match=r"settings\.json, which says what made the images beside it, .*dirname"):
            measured(module, tmp_path, callback)
    record.unlink()
    with pytest.raises(ValueError, match=r"holds images, such as 000\d/00000\d\.png, but no settings\.json .*dirname"):
        measured(module, tmp_path, callback)
    assert not record.exists()


# Real images


def test_training_is_measured_against_validation_images(module: LatentDiffusionModule, tmp_path: Path) -> None:
    callback, quick, test = small(every_n_steps=2), small(stage="validate"), small()
    run = trainer(tmp_path, callbacks=[callback, quick, test])
    run.fit(module, data())
    run.validate(module, data(), verbose=False)
    run.test(module, data(), verbose=False)
    in_training, in_validation, in_test = (one.report.reference for one in (callback, quick, test) if one.report)
    assert in_training == in_validation
    assert in_training["name"] == "val images of ShapesDataModule"
    assert in_test["name"] == "test images of ShapesDataModule"
    assert in_test["hash"] != in_training["hash"]
    assert test.report is not None
    assert not any("no test images" in note for note in test.report.notes)


def test_without_test_images_the_report_says_so(make_module: MakeModule, tmp_path: Path) -> None:
    module = make_module(conditioner=ClassTokens(0, token_dim=8, pooled_dim=8))
    root, other = photos(tmp_path / "photos"), photos(tmp_path / "other", 5)
    images = ImageFolderDataModule(root, 16, val_fraction=0.3, num_workers=0, verify=False, interpolation="bilinear")
    callback = small()
    trainer(tmp_path, callbacks=[callback]).test(module, images, verbose=False)
    assert callback.report is not None
    about = callback.report.reference
    assert about["name"] == "val images of ImageFolderDataModule"
    assert (about["folder"], about["held_out"], about["split"]) == (str(root), 0.3, "val")
    assert (about["resize"], about["crop"], about["image_size"]) == ("bilinear, antialiased", "middle square", 16)
    assert any("The data have no test images" in note for note in callback.report.notes)
    assert "test images of" not in (tmp_path / "evaluation").rglob("report.md").__next__().read_text()
    images = ImageFolderDataModule(root, 16, test_root=other, num_workers=0, verify=False)
    trainer(tmp_path, callbacks=[callback]).test(module, images, verbose=False)
    about = callback.report.reference
    assert (about["name"], about["folder"]) == ("test images of ImageFolderDataModule", str(other))
    assert "held_out" not in about
    assert not any("no test images" in note for note in callback.report.notes)
