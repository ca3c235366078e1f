from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from evaluations import Weights, data
from forked import run_ranks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from test_images import Letters
from test_lpl_callback import Late
from test_mixin import Foreign
from test_module import trainer
from torch.utils.data import DataLoader

from lpl_lightning import DDPM, EDM, EMA, ClassTokens, FlowMatching, LatentDiffusionModule, LossByNoise, LPLCallback
from lpl_lightning.arguments import NotFiniteError
from lpl_lightning.callbacks.loss_by_noise import read_loss_by_noise
from lpl_lightning.losses import LatentPerceptualLoss
from lpl_lightning.noise import NoiseProcess

MakeModule = Callable[..., LatentDiffusionModule]


@pytest.fixture
def module(make_module: MakeModule) -> LatentDiffusionModule:
    torch.manual_seed(0)
    return make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8))


def lpl() -> LPLCallback:
    return LPLCallback(
        loss=lambda autoencoder: LatentPerceptualLoss(autoencoder, reference_side=0, threshold=3.0, mask_outliers=False)
    )


def validated(
    module: LatentDiffusionModule, folder: Path, *callbacks: Callback, batch_size: int = 8, **options: Any
) -> dict[str, Any]:
    images = data()
    images.batch_size = batch_size
    trainer(folder, callbacks=[*callbacks], limit_val_batches=1.0, **options).validate(module, images, verbose=False)
    return read_loss_by_noise(next(folder.rglob("loss_by_noise_*.json")))


def numbers(found: Mapping[str, Any]) -> list[float]:
    return [value for level in found["levels"] for value in level.values()]


def test_each_image_at_each_level_as_by_hand(module: LatentDiffusionModule, tmp_path: Path) -> None:
    """The mean of one image and one level at a time, with noise that is standard normal and the image's own."""
    seen: list[torch.Tensor] = []
    noised = module.noise.noised

    def watched(z0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> Any:
        seen.append(noise)
        return noised(z0, noise, t)

    module.noise.noised = watched  # type: ignore[method-assign]
    found = validated(module, tmp_path, LossByNoise([0.5, 4.0]), lpl(), batch_size=20)
    of_images = [noise for noise in seen if noise.shape == seen[-1].shape]  # and not of what is checked beforehand
    first, second, drawn = of_images[0], of_images[1], of_images[-1]  # the loss itself, then each level
    assert torch.equal(second, drawn)
    assert not torch.equal(first, drawn)
    assert drawn.mean().abs() < 0.1
    assert drawn.std() == pytest.approx(1, abs=0.1)
    perceptual = LatentPerceptualLoss(module.autoencoder, reference_side=0, threshold=3.0, mask_outliers=False)
    for level in found["levels"]:
        t = level["level"] / (1 + level["level"])  # z_t = (1 - t) z0 + t noise
        assert level["noise_to_signal"] == pytest.approx(level["level"], rel=1e-5)
        assert level["log_snr"] == pytest.approx(-2 * math.log(level["level"]), rel=1e-4)
        assert level["t"] == pytest.approx(1000 * t, rel=1e-5)
        errors, offs, losses = [], [], []
        for i in range(20):
            item = data().dataset("val")[i]
            model: Any = module.autoencoder.model
            with torch.no_grad():
                z0 = (model.encode(item["image"][None]).latent_dist.mean - 0.1) * 0.5
                z_t = (1 - t) * z0 + t * drawn[i]
                condition = module.conditioner({"label": torch.tensor([item["label"]])}, 1)
                velocity = module.denoiser(z_t, torch.tensor([1000 * t]), condition)
                z0_hat = z_t - t * velocity
                losses.append(perceptual(z0_hat, z0, torch.tensor([level["level"]])))
            errors.append((velocity - (drawn[i] - z0)).square().mean())
            offs.append((z0_hat - z0).square().mean())
        for name, values in (("prediction_mse", errors), ("loss_diffusion", errors), ("estimate_mse", offs)):
            each = torch.stack(values)
            assert level[name] == pytest.approx(float(each.mean()), rel=1e-4)
            assert level[f"{name}_se"] == pytest.approx(float(each.std() / math.sqrt(20)), rel=1e-3)
        assert level["loss_lpl"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-3)
    assert found["levels"][0]["loss_lpl"] > 0
    assert found["levels"][1]["loss_lpl"] == 0  # past the gate
    assert found["made"]["images"] == 20
    assert found["made"]["noise"] == "FlowMatching"


@pytest.mark.parametrize("reduction", ["mean", "sum", "mean_passed"])
def test_each_sample_counts_whatever_the_reduction(
    module: LatentDiffusionModule, tmp_path: Path, reduction: Any
) -> None:
    def reduced(autoencoder: Any) -> LatentPerceptualLoss:
        return LatentPerceptualLoss(autoencoder, reference_side=0, mask_outliers=False, reduction=reduction)

    found = [
        validated(module, tmp_path / name, LossByNoise([0.5, 4.0]), callback)
        for name, callback in (("each", lpl()), ("reduced", LPLCallback(loss=reduced)))
    ]
    assert numbers(found[0]) == numbers(found[1])


def test_a_denoiser_of_zeros_errs_by_the_target(module: LatentDiffusionModule, tmp_path: Path) -> None:
    for parameter in module.denoiser.backbone.proj_out.parameters():
        parameter.data.zero_()
    found = validated(module, tmp_path, LossByNoise([1.0]))
    images = torch.stack([data().dataset("val")[i]["image"] for i in range(20)])
    model: Any = module.autoencoder.model
    z0 = (model.encode(images).latent_dist.mean - 0.1) * 0.5
    # E |noise - z0|^2 = 1 + E z0^2, and z0_hat - z0 = (noise - z0) / 2 at equal parts.
    expected = 1 + float(z0.square().mean())
    assert found["levels"][0]["prediction_mse"] == pytest.approx(expected, rel=0.15)
    assert found["levels"][0]["estimate_mse"] == pytest.approx(found["levels"][0]["prediction_mse"] / 4, rel=1e-4)


def test_nothing_depends_on_batches_order_or_times(module: LatentDiffusionModule, tmp_path: Path) -> None:
    expected = numbers(validated(module, tmp_path / "a", LossByNoise()))
    torch.manual_seed(7)
    assert numbers(validated(module, tmp_path / "b", LossByNoise(), batch_size=3)) == pytest.approx(expected, rel=1e-4)
    other = numbers(validated(module, tmp_path / "c", LossByNoise(seed=1)))
    assert other != pytest.approx(expected, rel=1e-3)
    limited = trainer(tmp_path / "d", callbacks=[LossByNoise()], limit_val_batches=1)
    limited.validate(module, data(), verbose=False)
    made = read_loss_by_noise(next((tmp_path / "d").rglob("*.json")))["made"]
    assert made["images"] == 8


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """With 19 images: the second process is given one of the first's, which counts once."""
    found = []
    for devices in (1, 2):
        script = Path(__file__).with_name("evaluation_ranks.py")
        run_ranks(script, devices, tmp_path / str(devices), "validate", devices=devices)
        found.append(read_loss_by_noise(next((tmp_path / str(devices)).rglob("*.json"))))
    one, two = found
    assert one["made"] == two["made"]
    assert one["made"]["images"] == 19
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-4)


def test_files_and_logs(module: LatentDiffusionModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, callbacks=[LossByNoise([0.5, 2.0])], logger=CSVLogger(tmp_path), limit_val_batches=1.0)
    (logged,) = run.validate(module, data(), verbose=False)
    (plain,) = trainer(tmp_path, limit_val_batches=1.0).validate(module, data(), verbose=False)
    assert logged["val_loss"] == plain["val_loss"]
    path = next(tmp_path.rglob("loss_by_noise_weights-*.json"))
    found = read_loss_by_noise(path)
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    for level, row, said in zip(found["levels"], rows, ("0.5", "2"), strict=True):
        assert {name: float(value) for name, value in row.items()} == level
        assert logged[f"val_loss_diffusion_at_{said}"] == pytest.approx(level["loss_diffusion"], rel=1e-5)
    assert "| sigma / alpha |" in capsys.readouterr().out
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="no loss by noise level"):
        read_loss_by_noise(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="by `lpl validate`"):
        read_loss_by_noise(tmp_path / "nothing.json")
    pytest.importorskip("matplotlib")
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_one_image_has_no_standard_error(
    module: LatentDiffusionModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the same photo is one image."""
    images = data()
    photo = images.dataset("val")[3]
    images.val_dataloader = lambda: DataLoader(cast(Any, [photo, photo]), batch_size=2)  # type: ignore[method-assign]
    trainer(tmp_path, callbacks=[LossByNoise([0.5])], limit_val_batches=1).validate(module, images, verbose=False)
    path = next(tmp_path.rglob("loss_by_noise_weights-*.json"))
    found = read_loss_by_noise(path)
    assert found["made"]["images"] == 1
    (level,) = found["levels"]
    assert level["prediction_mse"] > 0
    assert level["prediction_mse_se"] is None
    assert ",," in path.with_suffix(".csv").read_text()
    assert "±" not in capsys.readouterr().out


def test_in_training(make_module: MakeModule, tmp_path: Path) -> None:
    """Of the averaged weights, and nothing of the training changes."""

    def run(name: str, *callbacks: Callback) -> tuple[list[torch.Tensor], Any]:
        torch.manual_seed(0)
        module = make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8))
        weights = Weights()
        fitted = trainer(tmp_path / name, callbacks=[EMA(decay=0.5), weights, *callbacks], max_steps=4)
        torch.manual_seed(1)
        fitted.fit(module, data())
        return weights.steps, fitted

    with_it, fitted = run("with", LossByNoise(in_training=True))
    without, other = run("without", LossByNoise())
    assert all(torch.equal(one, two) for one, two in zip(with_it, without, strict=True))
    assert fitted.callback_metrics["val_loss"] == other.callback_metrics["val_loss"]
    found = read_loss_by_noise(next((tmp_path / "with" / "validation").glob("loss_by_noise_step-00000004-*.json")))
    assert found["made"]["ema"] == 0.5
    assert not list((tmp_path / "without").rglob("*.json"))


@pytest.mark.parametrize("noise", [DDPM(), DDPM("v_prediction"), FlowMatching(), EDM()], ids=lambda n: type(n).__name__)
def test_times_of_noise_levels(noise: NoiseProcess) -> None:
    wanted = torch.tensor([0.05, 0.5, 2.0, 10.0])
    alpha, sigma = noise.alpha_sigma(noise.time_at(wanted))
    # A DDPM has but a thousand of them.
    torch.testing.assert_close(sigma / alpha, wanted, rtol=0.05 if isinstance(noise, DDPM) else 1e-5, atol=0)


def test_captions_and_bfloat16(make_module: MakeModule, tmp_path: Path) -> None:
    module = make_module(conditioner=Letters())
    full = numbers(validated(module, tmp_path / "32", LossByNoise()))
    half = numbers(validated(module, tmp_path / "16", LossByNoise(), precision="bf16-mixed"))
    assert half == pytest.approx(full, rel=0.1)
    assert half != full


def test_others_pass_by_and_wrong_levels_are_refused(module: LatentDiffusionModule, tmp_path: Path) -> None:
    foreign = trainer(tmp_path, callbacks=[LossByNoise(in_training=True)], limit_val_batches=0)
    foreign.fit(Foreign(), DataLoader(cast(Any, torch.rand(8, 4, 4, 4)), batch_size=4))
    trainer(tmp_path, callbacks=[LossByNoise()], fast_dev_run=1).validate(module, data(), verbose=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"`noise_to_signal\[1\]` must be above 0"):
        LossByNoise([1.0, 0.0])
    for wrong in ([], [1.0, 1.0]):
        with pytest.raises(ValueError, match="one level or more, each once"):
            LossByNoise(wrong)


def test_another_model_or_other_images_have_files_of_their_own(module: LatentDiffusionModule, tmp_path: Path) -> None:
    found = [validated(module, tmp_path, LossByNoise([0.5])) for _ in range(2)]
    assert numbers(found[0]) == numbers(found[1])
    assert len(list(tmp_path.rglob("loss_by_noise_weights-*.json"))) == 1

    def count() -> int:
        return len(list(tmp_path.rglob("loss_by_noise_weights-*.json")))

    with torch.no_grad():
        module.denoiser.backbone.proj_out.bias.add_(0.1)
    validated(module, tmp_path, LossByNoise([0.5]))
    assert count() == 2
    with torch.no_grad():
        module.autoencoder.model.encoder.conv_in.bias.add_(0.1)
    validated(module, tmp_path, LossByNoise([0.5]))
    assert count() == 3
    images = data()
    images.seed = 3
    run = trainer(tmp_path, callbacks=[LossByNoise([0.5])], limit_val_batches=1.0)
    run.validate(module, images, verbose=False)
    assert count() == 4
    validated(module, tmp_path, LossByNoise([0.5, 1.0]))
    validated(module, tmp_path, LossByNoise([0.5]), lpl())
    assert count() == 6


def test_what_the_last_batch_is_still_to_raise_comes_before_the_report(
    module: LatentDiffusionModule, tmp_path: Path
) -> None:
    """A sample that is not finite counts as zero until an accelerator tells of it."""
    callback = lpl()
    with pytest.raises(NotFiniteError, match="arose in the estimate z0_hat"):
        validated(module, tmp_path, LossByNoise([0.5]), callback, Late(callback))
    assert not list(tmp_path.rglob("loss_by_noise_*"))
