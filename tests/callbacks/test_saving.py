from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import tiny_kl
from diffusers import AutoencoderKL
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from test_ema import tied
from test_mixin import Foreign, fit
from test_module import trainer
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lpl_lightning import (
    EMA,
    Autoencoder,
    AutoencoderModule,
    ClassTokens,
    LatentDiffusionModule,
    SaveAutoencoder,
    SaveDiffusers,
    SaveWeights,
    ShapesDataModule,
)
from lpl_lightning.autoencoder_module import autoencoder_kl
from lpl_lightning.pretrained import read_state


def small_data() -> ShapesDataModule:
    return ShapesDataModule(image_size=16, train_images=32, val_images=16, batch_size=8)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_saved_weights_are_the_trained_ones(
    make_module: Callable[..., LatentDiffusionModule], tmp_path: Path, dtype: str
) -> None:
    module = make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8))
    trainer(tmp_path, callbacks=[SaveWeights(dtype=dtype)]).fit(module, small_data())  # type: ignore[arg-type]
    saved = read_state(str(tmp_path / "weights.safetensors"))
    state = module.state_dict()
    assert saved.keys() == state.keys()
    (tmp_path / "usual").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode
    for name, tensor in state.items():
        assert saved[name].dtype == getattr(torch, dtype)
        torch.testing.assert_close(saved[name].float(), tensor, atol=1e-3 if dtype == "float16" else 0, rtol=0)


def test_a_tied_weight_is_saved_under_both_names(tmp_path: Path) -> None:
    module = tied()
    trainer(tmp_path, callbacks=[SaveWeights()]).fit(module, small_data())
    saved = read_state(str(tmp_path / "weights.safetensors"))
    assert saved.keys() == module.state_dict().keys()
    for layer in ("first", "second"):
        assert torch.equal(saved[f"denoiser.backbone.{layer}.weight"], module.denoiser.backbone.first.weight)


def test_weights_may_lie_in_a_folder_of_their_own(
    make_module: Callable[..., LatentDiffusionModule], tmp_path: Path
) -> None:
    module = make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8))
    trainer(tmp_path, callbacks=[SaveWeights("a/b.safetensors")]).fit(module, small_data())
    assert read_state(str(tmp_path / "a" / "b.safetensors")).keys() == module.state_dict().keys()


def test_saved_autoencoder_is_scaled_and_loads(tmp_path: Path) -> None:
    module = AutoencoderModule(autoencoder_kl([8, 8], layers_per_block=1, norm_num_groups=4, sample_size=16))
    run = trainer(tmp_path, max_steps=4, max_epochs=1, limit_val_batches=2, callbacks=[SaveAutoencoder()])
    run.fit(module, small_data())
    config = AutoencoderKL.load_config(str(tmp_path / "autoencoder"))
    assert len({path.stat().st_mode for path in (tmp_path / "autoencoder").iterdir()}) == 1
    images = torch.stack([small_data().dataset("val")[i]["image"] for i in range(16)])
    latents = module.autoencoder.encode(images).latent_dist.mode()
    assert config["shift_factor"] == pytest.approx(latents.mean().item(), abs=1e-4)
    assert 1 / config["scaling_factor"] == pytest.approx(latents.std().item(), rel=1e-2)
    loaded = Autoencoder(str(tmp_path / "autoencoder"), sample_posterior=False)
    assert loaded.encode(images).std().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(loaded.decode(loaded.encode(images)), module(images), atol=1e-4, rtol=1e-4)


def test_statistics_are_added_up_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of ``fit`` all is on the CPU, where processes that train on GPUs cannot talk to each other."""
    run = trainer(tmp_path, max_steps=4, max_epochs=1, limit_val_batches=2, callbacks=[SaveAutoencoder()])
    ended: list[bool] = []
    compute = MeanMetric.compute
    teardown = run.strategy.teardown

    def end() -> None:
        ended.append(True)
        teardown()

    def watched(self: MeanMetric) -> Any:
        assert not ended
        return compute(self)

    monkeypatch.setattr(run.strategy, "teardown", end)
    monkeypatch.setattr(MeanMetric, "compute", watched)
    run.fit(AutoencoderModule(tiny_kl(scaling_factor=3.0)), small_data())
    assert ended
    assert AutoencoderKL.load_config(str(tmp_path / "autoencoder"))["scaling_factor"] != 3.0


class Saved(Callback):
    """Writes a checkpoint after each step, before the validation that may follow, and one after each validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}_validated.ckpt")


def scale_after(folder: Path, ckpt_path: Path | None = None, **options: Any) -> tuple[Any, Any]:
    """Shift and scale of the autoencoder that a run leaves."""
    torch.manual_seed(5)
    module = AutoencoderModule(tiny_kl(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    run = trainer(folder, **{"callbacks": [SaveAutoencoder(), Saved(folder)]} | options)
    run.fit(module, small_data(), ckpt_path=ckpt_path, weights_only=True)
    config = AutoencoderKL.load_config(str(folder / "autoencoder"))
    return config["shift_factor"], config["scaling_factor"]


def test_a_run_that_goes_on_has_the_scale_of_the_one_that_did_not_stop(tmp_path: Path) -> None:
    """Past its last validation, whose measure is in the checkpoint, or with nothing left to train but what it was."""
    options: dict[str, Any] = {"val_check_interval": 2, "limit_val_batches": 2}
    whole = scale_after(tmp_path, max_steps=2, **options)
    assert whole[1] != AutoencoderKL().config["scaling_factor"]
    for checkpoint in ("2.ckpt", "2_validated.ckpt"):
        assert scale_after(tmp_path / "done", tmp_path / checkpoint, max_steps=2, **options) == pytest.approx(whole)
    # The validation that `2.ckpt` was written before is made up for by another callback, where there is one.
    assert scale_after(tmp_path / "on", tmp_path / "2_validated.ckpt", max_steps=3, **options) == whole


def test_a_sanity_check_measures_nothing(tmp_path: Path) -> None:
    """Weights that no validation has measured are, at the end."""
    found = scale_after(tmp_path, num_sanity_val_steps=1, val_check_interval=4, limit_val_batches=2)
    assert "SaveAutoencoder" not in torch.load(tmp_path / "2.ckpt", weights_only=True)["callbacks"]
    trained = AutoencoderKL.from_pretrained(tmp_path / "autoencoder", low_cpu_mem_usage=False)
    images = torch.stack([small_data().dataset("val")[i]["image"] for i in range(16)])
    latents = trained.encode(images).latent_dist.mode()
    assert found == pytest.approx((latents.mean().item(), 1 / latents.std(correction=0).item()), rel=1e-3)
    with pytest.warns(UserWarning, match="nothing to measure the latents' scale by, which is left at 0.18215"):
        assert scale_after(tmp_path / "none", limit_val_batches=0) == (None, 0.18215)


def test_the_average_is_measured_and_saved(tmp_path: Path) -> None:
    """Also where there is nothing left to train."""
    options: dict[str, Any] = {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 2}
    callbacks = [EMA(0.5), SaveAutoencoder(), Saved(tmp_path)]
    whole = scale_after(tmp_path, callbacks=callbacks, **options)
    again = [EMA(0.5), SaveAutoencoder(), Saved(tmp_path / "done")]
    assert scale_after(tmp_path / "done", tmp_path / "2.ckpt", callbacks=again, **options) == pytest.approx(whole)
    one, other = (
        load_file(folder / "autoencoder" / "diffusion_pytorch_model.safetensors")
        for folder in (tmp_path, tmp_path / "done")
    )
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert scale_after(tmp_path / "plain", **options) != pytest.approx(whole)


def test_the_measured_scale_takes_the_place_of_one_by_channel(tmp_path: Path) -> None:
    module = AutoencoderModule(tiny_kl(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[5.0] * 4))
    run = trainer(tmp_path, max_steps=4, max_epochs=1, limit_val_batches=2, callbacks=[SaveAutoencoder()])
    run.fit(module, small_data())
    images = torch.stack([small_data().dataset("val")[i]["image"] for i in range(16)])
    latents = Autoencoder(str(tmp_path / "autoencoder"), sample_posterior=False).encode(images)
    assert latents.mean().item() == pytest.approx(0, abs=0.02)
    assert latents.std().item() == pytest.approx(1, abs=0.02)


def test_a_module_without_autoencoder_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="saves the autoencoder of an AutoencoderModule, got Foreign"):
        fit(Foreign(), tmp_path, SaveAutoencoder())


@pytest.mark.parametrize("of", [SaveWeights, SaveAutoencoder, SaveDiffusers])
def test_what_no_run_has_left_is_not_written_over(
    make_module: Callable[..., LatentDiffusionModule], tmp_path: Path, of: type[Any]
) -> None:
    """Such as a checkout of diffusers in the working directory, which without a logger is the run's folder."""

    def module() -> pl.LightningModule:
        if of is SaveAutoencoder:
            return AutoencoderModule(autoencoder_kl([8, 8], layers_per_block=1, norm_num_groups=4, sample_size=16))
        return make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8))

    def run(*given: str) -> None:
        trainer(tmp_path, callbacks=[of(*given)]).fit(module(), small_data())

    default = {SaveWeights: "weights.safetensors", SaveAutoencoder: "autoencoder", SaveDiffusers: "diffusers"}[of]
    place = tmp_path / default if of is SaveWeights else tmp_path / default / "mine.py"
    place.parent.mkdir(exist_ok=True)
    place.write_text("mine")
    with pytest.raises(ValueError, match=rf"name`: .*{default} is there already, and nothing in it says that a run"):
        run()
    for outside in (".", "..", str(tmp_path.parent / "elsewhere")):
        with pytest.raises(ValueError, match="name` must lie in the run's folder"):
            run(outside)
    assert place.read_text() == "mine"
    for _ in range(2):  # its own it writes over
        run("another")
    assert (tmp_path / "another").exists()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_an_autoencoder_trained_without_validation_images_is_saved_too(tmp_path: Path) -> None:
    """The data module has none to measure the scale by, which must not cost the training."""

    class TrainingAlone(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader([{"image": torch.zeros(3, 16, 16)} for _ in range(8)], batch_size=4)  # type: ignore[arg-type]

    module = AutoencoderModule(autoencoder_kl([8, 8], layers_per_block=1, norm_num_groups=4, sample_size=16))
    with pytest.warns(UserWarning, match="nothing to measure the latents' scale by"):
        trainer(tmp_path, callbacks=[SaveAutoencoder()]).fit(module, TrainingAlone())
    assert (tmp_path / "autoencoder" / "config.json").is_file()
