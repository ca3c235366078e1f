from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_kl, tiny_sd3
from evaluations import Corners, Weights, data, evaluation, suite, values
from forked import FORKED, run_ranks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from safetensors.torch import load_file
from test_images import Letters
from test_mixin import Foreign
from test_module import trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image

from lpl_lightning import EMA, Autoencoder, ClassTokens, Evaluation, FlowMatching, LatentDiffusionModule, Sampler
from lpl_lightning.evaluation import (
    FeatureMetrics,
    ReconstructionMetrics,
    Report,
    SpectrumMetrics,
    Suite,
    evaluate_folder,
)
from lpl_lightning.evaluation.measure import Role
from lpl_lightning.metrics import ModuleFeatures

MakeModule = Callable[..., LatentDiffusionModule]


@pytest.fixture
def module(make_module: MakeModule) -> LatentDiffusionModule:
    torch.manual_seed(0)
    return make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8))


def measured(module: LatentDiffusionModule, tmp_path: Path, callback: Evaluation, images: Any = None) -> Report:
    trainer(tmp_path, callbacks=[callback]).test(module, images or data(), verbose=False)
    assert callback.report is not None
    return callback.report


def read_image(path: Path) -> Tensor:
    with Image.open(path) as image:
        found: Tensor = pil_to_tensor(image)
        return found


def photographed(folder: Path) -> Path:
    """The test images as files."""
    folder.mkdir()
    for i in range(20):
        save_image((data().dataset("test")[i]["image"] + 1) / 2, folder / f"{i}.png")
    return folder


def assert_close(found: Report, expected: Report, rtol: float = 1e-5) -> None:
    assert values(found).keys() == values(expected).keys()
    for name, value in values(expected).items():
        assert values(found)[name] == pytest.approx(value, rel=rtol, abs=1e-7), name


def test_a_test_equals_lpl_evaluate_of_the_same_images(module: LatentDiffusionModule, tmp_path: Path) -> None:
    callback = evaluation(reconstruct=False)
    run = trainer(tmp_path, callbacks=[callback], logger=CSVLogger(tmp_path))
    (logged,) = run.test(module, data(), verbose=False)
    folder = next((tmp_path / "lightning_logs").glob("*/evaluation/weights-*/24-images-*"))
    assert callback.folder == folder
    report = Report.read(folder)
    images = folder / report.images["folder"]
    assert images.resolve() == folder.parent / "images"
    real = photographed(tmp_path / "real")
    other = evaluate_folder(str(images), str(real), suite(), str(tmp_path / "out"), cache=False)
    assert_close(report, other)
    assert report.images["hash"] == other.images["hash"]
    assert report.reference["hash"] == other.reference["hash"]
    assert len(values(report)) == 11
    for name, value in values(report).items():
        assert logged[f"test_{name}"] == pytest.approx(value, rel=1e-5)
    made = report.generation
    assert made["num_steps"] == 2
    assert made["guidance_scale"] == 1.5
    assert made["seed"] == 0
    assert made["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert (report.images["count"], report.reference["count"]) == (24, 20)
    assert {"report.md", "report.json", "samples.safetensors", "spectra.csv"} <= set(os.listdir(folder))
    picture = (module.generate([9], [1])[0] + 1) * 127.5
    assert (read_image(images / "0001" / "000009.png") - picture).abs().max() <= 0.51


def test_reconstructions_are_the_autoencoders_means(module: LatentDiffusionModule, tmp_path: Path) -> None:
    report = measured(module, tmp_path, evaluation(suite=Suite([ReconstructionMetrics(), SpectrumMetrics()])))
    images = torch.stack([data().dataset("test")[i]["image"] for i in range(20)])
    model: Any = module.autoencoder.model
    with torch.no_grad():
        again = model.decode(model.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    psnr = -10 * ((again - images) / 2).square().mean((1, 2, 3)).log10()
    assert values(report)["reconstruction_psnr"] == pytest.approx(float(psnr.mean()), rel=1e-5)
    folder = next((tmp_path / "evaluation").glob("*/24-images-*"))
    assert load_file(folder / "samples.safetensors")["reconstruction_psnr"] == pytest.approx(psnr, rel=1e-4)


def test_values_depend_on_no_batch_size(module: LatentDiffusionModule, tmp_path: Path) -> None:
    first = measured(module, tmp_path / "a", evaluation())
    second = measured(module, tmp_path / "b", evaluation(batch_size=24))
    assert module.training
    # Pixels may round otherwise in a batch of another size.
    assert_close(second, first, rtol=1e-2)


def test_images_that_are_there_are_not_made_again(module: LatentDiffusionModule, tmp_path: Path) -> None:
    callback = evaluation(num_images=16, reconstruct=False)
    first = measured(module, tmp_path, callback)
    images = sorted(tmp_path.rglob("*.png"))
    kept = images[0].stat().st_mtime_ns
    images[3].unlink()
    made: list[int] = []
    generate = module.generate

    def watched(seeds: Any, labels: Any = None, captions: Any = None) -> Tensor:
        made.extend(seeds)
        return generate(seeds, labels, captions)

    module.generate = watched  # type: ignore[method-assign, assignment]
    more = measured(module, tmp_path, evaluation(num_images=24, reconstruct=False))
    assert len(list(tmp_path.rglob("*.png"))) == 24 + 2  # with a plot of spectra each
    assert sorted(made) == sorted([int(images[3].stem), *range(16, 24)])
    assert images[0].stat().st_mtime_ns == kept
    assert (first.images["count"], more.images["count"]) == (16, 24)
    # Of a folder that holds more, those asked for.
    assert_close(measured(module, tmp_path, evaluation(num_images=16, reconstruct=False)), first, 1e-2)
    measured(module, tmp_path, evaluation(dirname=str(tmp_path / "out")))
    with pytest.raises(ValueError, match=r"made with other settings \(generate_seed;"):
        measured(module, tmp_path, evaluation(dirname=str(tmp_path / "out"), seed=1))
    module.sampler = Sampler(num_steps=3)
    with pytest.raises(
        ValueError, match=r"made with other settings \(guidance_scale, num_steps; .* Give another folder"
    ):
        measured(module, tmp_path, evaluation(dirname=str(tmp_path / "out")))


def measure_300(folder: Path) -> None:
    """What a process does until it is killed, and another one then."""
    torch.manual_seed(0)
    parts = (FlowMatching(), tiny_sd3(), ClassTokens(8, token_dim=8, pooled_dim=8))
    module = LatentDiffusionModule(Autoencoder(tiny_kl()), *parts, sampler=Sampler(4))
    callback = evaluation(num_images=300, dirname=str(folder), batch_size=4)
    trainer(folder, callbacks=[callback]).test(module, data(), verbose=False)


def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    killed, last = (FORKED.Process(target=measure_300, args=(tmp_path / "out",)) for _ in range(2))
    killed.start()
    while killed.is_alive() and len(list(tmp_path.rglob("*.png"))) < 20:
        time.sleep(0.02)
    killed.kill()
    killed.join()
    there = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert 20 <= len(there) < 300
    assert not (tmp_path / "out" / "report.json").exists()
    last.start()
    last.join()
    assert last.exitcode == 0
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert Report.read(tmp_path / "out").images["count"] == 300


@pytest.mark.filterwarnings("ignore:The `save_last`", "ignore:Checkpoint directory .* exists")
def test_during_training(make_module: MakeModule, tmp_path: Path) -> None:
    """Each n steps, of the averaged weights; nothing of the training changes, and checkpoints hold no network of it."""

    def run(name: str, *callbacks: Callback) -> tuple[Any, Weights, LatentDiffusionModule]:
        torch.manual_seed(0)
        module = make_module(
            conditioner=ClassTokens(8, token_dim=8, pooled_dim=8),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        torch.manual_seed(1)
        weights, generate = Weights(), module.generate

        def watched(*asked: Any) -> Tensor:
            assert not any(part.training for part in module.modules())
            return generate(*asked)

        module.generate = watched  # type: ignore[method-assign, assignment]
        run = trainer(
            tmp_path / name,
            max_steps=4,
            callbacks=[EMA(decay=0.5), *callbacks, weights],
            logger=CSVLogger(tmp_path / name, name="", version=0),
            log_every_n_steps=3,
            enable_checkpointing=True,
            accumulate_grad_batches=2,
            max_epochs=4,
        )
        run.fit(module, data())
        return run, weights, module

    best = ModelCheckpoint(monitor="eval_frechet_wavelet", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    # Resizing draws random numbers, which are not those of the training.
    callback = evaluation(every_n_steps=2, reference=str(photographed(tmp_path / "real")))
    watched, weights, _ = run("with", callback, best)
    _, plain, _ = run("without", ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}"))
    assert all(torch.equal(one, other) for one, other in zip(weights.steps, plain.steps, strict=True))
    assert all(weights.training)
    folders = sorted((tmp_path / "with" / "version_0" / "evaluation").glob("*/24-images-*"))
    assert [folder.parent.name[:13] for folder in folders] == ["step-00000002", "step-00000004"]
    last = Report.read(folders[-1])
    assert last.generation["ema"] == 0.5
    assert last.generation["global_step"] == 4
    rows = (tmp_path / "with" / "version_0" / "metrics.csv").read_text()
    for name, value in values(last).items():
        assert f"eval_{name}" in rows
        assert float(watched.callback_metrics[f"eval_{name}"]) == pytest.approx(value, rel=1e-5)
    for step in (2, 4):
        with_it, without = (
            torch.load(tmp_path / name / "version_0" / "checkpoints" / f"step={step}.ckpt", weights_only=True)
            for name in ("with", "without")
        )
        assert with_it["state_dict"].keys() == without["state_dict"].keys()
        assert not any("Corners" in str(key) for key in with_it["callbacks"])
    # The images are those of the average that the checkpoint of that step holds.
    torch.manual_seed(0)  # the same autoencoder, which checkpoints do not hold
    average = make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8))
    average.load_weights(str(tmp_path / "with" / "version_0" / "checkpoints" / "step=4.ckpt"), ema=0.5)
    picture = (average.generate([9], [1])[0] + 1) * 127.5
    assert (read_image(folders[-1].parent / "images" / "0001" / "000009.png") - picture).abs().max() <= 0.51
    average.load_weights(str(tmp_path / "with" / "version_0" / "checkpoints" / "step=4.ckpt"))
    trained = (average.generate([9], [1])[0] + 1) * 127.5
    assert (trained - picture).abs().max() > 1


def test_what_cannot_be_measured_is_refused_at_once(
    module: LatentDiffusionModule, make_module: MakeModule, tmp_path: Path
) -> None:
    def refused(said: str, model: Any = module, **options: Any) -> None:
        for every, call in ((None, "test"), (1, "fit")):
            callback = evaluation(every_n_steps=every, **options)
            with pytest.raises(ValueError, match=said):
                getattr(trainer(tmp_path, callbacks=[callback]), call)(model, data())
        assert not list(tmp_path.rglob("*.png"))

    refused("covariance of 6 features needs 6 images or more, got 4 generated ones", num_images=4)
    refused(
        "Corners: balls to the neighbour 30 need 31 images",
        suite=Suite([FeatureMetrics(ModuleFeatures(Corners()), neighbours=30)]),
    )
    missing = tmp_path / "nothing"
    with pytest.raises(FileNotFoundError, match="`reference` must be a folder"):
        trainer(tmp_path, callbacks=[evaluation(reference=str(missing))]).test(module, data(), verbose=False)
    with pytest.raises(ValueError, match="Evaluation generates with a LatentDiffusionModule, got Foreign"):
        trainer(tmp_path, callbacks=[evaluation(every_n_steps=1)], limit_val_batches=0).fit(
            Foreign(), data().train_dataloader()
        )
    for wrong in ({"num_images": -1}, {"batch_size": 0}, {"every_n_steps": 0}, {"num_workers": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
            evaluation(**wrong)


def test_other_peoples_modules_and_trial_runs_pass_by(module: LatentDiffusionModule, tmp_path: Path) -> None:
    callback = evaluation()
    trainer(tmp_path, callbacks=[callback], fast_dev_run=1).test(module, data(), verbose=False)
    assert callback.report is None
    assert not list(tmp_path.iterdir())


class Listening(SpectrumMetrics):
    """Keeps the captions of the generated images."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[int, str] = {}

    def update(self, images: Tensor, role: Role, index: Tensor, captions: Sequence[str] | None = None) -> None:
        super().update(images, role, index, captions)
        if role == "generated":
            self.heard |= dict(zip(index.tolist(), captions or [], strict=True))


def test_captions_go_round(make_module: MakeModule, tmp_path: Path) -> None:
    module, listening = make_module(conditioner=Letters()), Listening()
    report = measured(module, tmp_path, evaluation(suite=Suite([listening]), num_images=6))
    assert listening.heard == dict(enumerate(data().sample_captions(6)))
    first = next((tmp_path / "evaluation").glob("*/images/0000/000000.txt"))
    assert first.read_text() == data().sample_captions(1)[0]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    own = evaluation(
        suite=Suite([SpectrumMetrics()]), num_images=3, prompts=str(prompts), dirname=str(tmp_path / "own")
    )
    other = measured(module, tmp_path, own)
    texts = [path.read_text() for path in sorted((tmp_path / "own").rglob("*.txt"))]
    assert texts == ["a cat", "a dog", "a cat"]
    assert other.generation["prompts_blake2b"] != report.generation["prompts_blake2b"]


def test_a_loader_without_a_data_module(module: LatentDiffusionModule, tmp_path: Path) -> None:
    callback, expected = evaluation(dirname=str(tmp_path / "a")), measured(module, tmp_path, evaluation())
    loader: Any = DataLoader(data().dataset("test"), batch_size=3)
    trainer(tmp_path, callbacks=[callback]).test(module, loader, verbose=False)
    assert callback.report is not None
    assert_close(callback.report, expected)
    assert callback.report.reference["hash"] == expected.reference["hash"]
    stream: Any = [next(iter(loader))]
    with pytest.raises(ValueError, match="found no set of images .* give it `reference`"):
        trainer(tmp_path, callbacks=[evaluation()]).test(module, iter_only(stream), verbose=False)


def iter_only(batches: list[Any]) -> Any:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(batches)

    return DataLoader(Stream(), batch_size=None)


def test_a_folder_as_reference_and_the_cache(
    module: LatentDiffusionModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = photographed(tmp_path / "real")
    expected = measured(module, tmp_path, evaluation())
    for _ in range(2):  # the second from what the first has kept
        report = measured(module, tmp_path, evaluation(reference=str(real), cache=True))
        assert_close(report, expected, rtol=1e-3)
    assert report.reference["name"] == str(real)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3


def test_what_an_autoencoder_gives_back_is_kept_by_its_precision(
    module: LatentDiffusionModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that either holds are the same weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = str(photographed(tmp_path / "real"))
    model = module.autoencoder.model.bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        cached, anew = (
            values(measured(module, tmp_path, Evaluation(24, reference=real, suite=Suite(suite), cache=cache)))
            for cache in (True, False)
            for suite in [[SpectrumMetrics(), ReconstructionMetrics()]]
        )
        assert cached == anew
        found.append(cached["reconstruction_psnr"])
    assert found[0] != found[1]


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    script = Path(__file__).with_name("evaluation_ranks.py")
    reports = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        run_ranks(script, devices, folder, devices=devices)
        reports.append(Report.read(next((folder / "evaluation").rglob("report.json"))))
    one, two = reports
    assert one.images["hash"] == two.images["hash"]
    assert one.reference["hash"] == two.reference["hash"]
    assert_close(two, one)
    assert json.loads(json.dumps(one.generation)) == two.generation


def test_in_validation(module: LatentDiffusionModule, tmp_path: Path) -> None:
    """What a test of the validation images finds; a test passes it by, and it passes by a validation of training."""
    callback, other = evaluation(stage="validate", suite=None, num_images=6), evaluation(dirname=str(tmp_path / "test"))
    run = trainer(tmp_path, callbacks=[callback, other], max_steps=4)
    run.fit(module, data())
    assert "val_loss" in run.callback_metrics
    assert callback.report is None
    (logged,) = run.validate(module, data(), verbose=False)
    report = callback.report
    assert report is not None
    assert other.report is None
    assert logged["val_reconstruction_psnr"] == pytest.approx(values(report)["reconstruction_psnr"], rel=1e-5)
    assert (report.images["count"], report.reference["count"]) == (6, 20)
    assert report.reference["name"] == "val images of ShapesDataModule"
    assert "val_loss" in logged
    callback.report = None
    run.test(module, data(), verbose=False)
    assert callback.report is None
    assert other.report is not None
    assert other.report.reference["hash"] != report.reference["hash"]
    nothing = evaluation(num_images=0)
    trainer(tmp_path, callbacks=[nothing]).test(module, data(), verbose=False)
    assert nothing.report is None
    with pytest.raises(ValueError, match="`stage` must be test or validate"):
        evaluation(stage="fit")


@pytest.mark.parametrize("data_module", [True, False])
def test_a_validation_without_real_images_is_of_the_losses_alone(
    data_module: bool,
    module: LatentDiffusionModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As of latents that were encoded beforehand; a test, which is for images, is refused."""
    images = data()
    monkeypatch.setattr(type(images), "has_images", False)
    images.setup("validate")
    loaded: Any = images if data_module else iter_only([next(iter(images.val_dataloader()))])
    callback = evaluation(stage="validate", num_images=3)
    with caplog.at_level("INFO"):
        (logged,) = trainer(tmp_path, callbacks=[callback]).validate(module, loaded, verbose=False)
    assert "val_loss" in logged
    assert callback.report is None
    assert caplog.text.count("No images are drawn to be compared: the data hold no real ones. Give `--valid") == 1
    if data_module:
        with pytest.raises(ValueError, match="ShapesDataModule holds latents: give it `reference`"):
            trainer(tmp_path, callbacks=[evaluation()]).test(module, images, verbose=False)


def test_other_images_are_measured_anew(module: LatentDiffusionModule, tmp_path: Path) -> None:
    callback, others = evaluation(), data()
    run = trainer(tmp_path, callbacks=[callback])
    reports = []
    for images in (data(), others, others):
        others.seed = 5
        run.test(module, images, verbose=False)
        assert callback.report is not None
        reports.append(callback.report)
    first, second, third = (report.reference["hash"] for report in reports)
    assert first != second == third
    assert_close(reports[1], measured(module, tmp_path / "alone", evaluation(), others))
