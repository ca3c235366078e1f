from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_module import trainer
from torch import Tensor, nn

from lpl_lightning import AutoencoderModule, ShapesDataModule
from lpl_lightning.autoencoder_module import autoencoder_kl


class Difference(nn.Module):
    """Stands where LPIPS would: a trained-looking network on both images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 2, 3)

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        difference: Tensor = self.net(reconstruction) - self.net(image)
        return difference.square().mean(dim=(1, 2, 3), keepdim=True)


def small() -> AutoencoderModule:
    return AutoencoderModule(
        autoencoder_kl([8, 16], layers_per_block=1, norm_num_groups=4, sample_size=16),
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3),
    )


def data() -> ShapesDataModule:
    return ShapesDataModule(image_size=16, train_images=64, val_images=16, batch_size=8)


def test_training_raises_the_psnr(tmp_path: Path) -> None:
    module, run = small(), trainer(tmp_path, max_steps=60, max_epochs=-1)
    before = run.validate(module, data(), verbose=False)[0]["val_psnr"]
    run.fit(module, data())
    assert run.validate(module, data(), verbose=False)[0]["val_psnr"] > before + 3


def test_psnr_and_latent_statistics_in_closed_form(tmp_path: Path) -> None:
    module, run = small(), trainer(tmp_path, limit_val_batches=2, limit_test_batches=1)
    metrics = run.validate(module, data(), verbose=False)[0]
    images = torch.stack([data().dataset("val")[i]["image"] for i in range(16)])
    with torch.no_grad():
        error = (module(images).clamp(-1, 1) - images).square().mean()
        latents = module.autoencoder.encode(images).latent_dist.mode()
    assert metrics["val_psnr"] == pytest.approx((10 * torch.log10(4 / error)).item(), abs=1e-3)
    mean, std = module.latent_statistics()
    assert mean == pytest.approx(latents.mean().item(), abs=1e-5)
    assert std == pytest.approx(latents.std(correction=0).item(), rel=1e-3)
    run.test(module, data(), verbose=False)
    assert module.latent_statistics() == (mean, std), "those of the validation"


def test_latent_statistics_of_half_precision_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small()
    latents = 300 * torch.randn(8, 4, 8, 8).half()
    posterior = SimpleNamespace(
        sample=lambda generator=None: latents, mode=lambda: latents, kl=lambda: latents.new_ones(8)
    )
    monkeypatch.setattr(module.autoencoder, "encode", lambda images: SimpleNamespace(latent_dist=posterior))
    monkeypatch.setattr(module.autoencoder, "decode", lambda z: SimpleNamespace(sample=torch.zeros(8, 3, 32, 32)))
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    module.validation_step({"image": torch.zeros(8, 3, 32, 32)}, 0)
    assert module.latent_statistics()[1] == pytest.approx(latents.double().std(correction=0).item(), rel=1e-4)


def test_losses_of_processes_are_brought_together(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small()
    logged: dict[str, bool] = {}
    monkeypatch.setattr(module, "log", lambda name, value, sync_dist=False, **_: logged.update({name: sync_dist}))
    batch = {"image": torch.zeros(1, 3, 16, 16)}
    module.training_step(batch, 0)
    assert set(logged.values()) == {False}
    logged.clear()
    module.validation_step(batch, 0)
    # A metric of torchmetrics is brought together by itself.
    assert logged == {"val_loss": True, "val_loss_l1": True, "val_loss_kl": True, "val_psnr": False}


def test_kl_is_in_nats_per_latent_element(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small()
    logged: dict[str, Tensor] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    module.training_step({"image": images}, 0)
    posterior = module.autoencoder.encode(images).latent_dist
    element = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar)
    torch.testing.assert_close(logged["loss_kl"], element.mean())
    torch.testing.assert_close(logged["loss"], logged["loss_l1"] + module.kl_weight * logged["loss_kl"])


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_was_stopped_is_the_run_that_was_not(tmp_path: Path) -> None:
    """Bit for bit, also of a process that was seeded otherwise; each sample of the posterior is drawn by its number."""
    whole, rest = small(), small()
    for seed, module, begun in ((3, whole, None), (4, rest, str(tmp_path / "step=2.ckpt"))):
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        run = trainer(tmp_path, max_steps=4, limit_val_batches=0, enable_checkpointing=True, callbacks=[saving])
        pl.seed_everything(seed, verbose=False)
        run.fit(module, data(), ckpt_path=begun, weights_only=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], tensor), name


def test_a_perceptual_loss_pulls_but_is_neither_trained_nor_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    perceptual = Difference()
    module = AutoencoderModule(small().autoencoder, perceptual=perceptual, perceptual_weight=0.5)
    logged: dict[str, Tensor] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    loss = module.training_step({"image": torch.rand(2, 3, 16, 16)}, 0)
    loss.backward()
    expected = logged["loss_l1"] + module.kl_weight * logged["loss_kl"] + 0.5 * logged["loss_perceptual"]
    torch.testing.assert_close(logged["loss"], expected)
    assert logged["loss_perceptual"] > 0
    assert perceptual.net.weight.grad is None
    assert not any("perceptual" in name for name in module.state_dict())


def test_a_perceptual_loss_that_a_validation_moves_is_trained_with_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning validates in inference mode, whose tensors could take part in no graph."""

    class Elsewhere(Difference):
        there = False

        def to(self, *args: Any, **kwargs: Any) -> Any:
            if not self.there:
                super().to(torch.float64)
                super().to(torch.float32)  # into new storage, as a move to an accelerator is
            self.there = True
            return self

    module = AutoencoderModule(small().autoencoder, perceptual=Elsewhere())
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    batch = {"image": torch.rand(2, 3, 16, 16)}
    with torch.inference_mode():
        module.test_step(batch, 0)
    module.training_step(batch, 0).backward()


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match="`image_size`=17 of the data must be divisible by 2"):
        run.fit(small(), ShapesDataModule(image_size=17))
    run.fit(AutoencoderModule(autoencoder_kl([8], layers_per_block=1, norm_num_groups=4)), data())
    run.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="the checkpoint are of another model"):
        trainer(tmp_path).fit(small(), data(), ckpt_path=str(tmp_path / "other.ckpt"))


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`norm_num_groups`=4 must divide .* got \[6\]"):
        autoencoder_kl([8, 6], norm_num_groups=4)
