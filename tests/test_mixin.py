"""LPL in a Lightning project that knows nothing else of this package."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import tiny_kl
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lpl_lightning import Autoencoder, LatentPerceptualLoss, LPLCallback, LPLMixin
from lpl_lightning.losses import Execution


class Foreign(LPLMixin, pl.LightningModule):
    """A user's own module over latents: one convolution that predicts the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(4, 4, 3, padding=1)

    def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
        sigma = torch.linspace(0.1, 0.9, len(z0)).view(-1, 1, 1, 1)
        alpha = (1 - sigma**2).sqrt()
        noise = torch.randn_like(z0)
        z_t = alpha * z0 + sigma * noise
        prediction = self.net(z_t)
        z0_hat = (z_t - sigma * prediction) / alpha
        loss = nn.functional.mse_loss(prediction, noise)
        return loss + self.auxiliary_loss(z0_hat, z0, (sigma / alpha).flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: pl.LightningModule, tmp_path: Path, *callbacks: pl.Callback, steps: int = 2) -> pl.Trainer:
    torch.manual_seed(0)
    latents: Any = list(torch.randn(8, 4, 4, 4))
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(latents, batch_size=4))
    return trainer


def test_one_line_and_one_callback(tmp_path: Path) -> None:
    autoencoder = Autoencoder(tiny_kl())
    torch.manual_seed(1)
    plain = Foreign()
    twin = copy.deepcopy(plain)
    fit(plain, tmp_path)
    trainer = fit(twin, tmp_path, LPLCallback(weight=3.0, autoencoder=autoencoder))
    assert trainer.callback_metrics["loss_lpl"] > 0
    # The ratios are 0.10, 0.39, 0.82 and 2.06; tau is 3 for latents of side 32, so 0.375 for these of side 4.
    assert trainer.callback_metrics["gate_share"] == 0.25
    assert not torch.equal(plain.net.weight, twin.net.weight)
    assert not twin.loss_terms, "detached at teardown"


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("unfreeze", [pl.LightningModule.unfreeze, nn.Module.requires_grad_])
def test_an_autoencoder_stays_frozen_in_a_module_that_is_unfrozen(
    unfreeze: Any, streamed: bool, tmp_path: Path
) -> None:
    """Both reach the parameters of the autoencoder without asking it."""
    module = Foreign()
    module.autoencoder = Autoencoder(tiny_kl())
    before = [parameter.clone() for parameter in module.autoencoder.parameters()]
    module.freeze()
    unfreeze(module)
    assert all(parameter.requires_grad for parameter in module.net.parameters())
    trained: list[int] = []

    class Watch(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, *_: Any) -> None:
            trained.append(
                sum(p.requires_grad for group in trainer.optimizers[0].param_groups for p in group["params"])
            )

    make = partial(LatentPerceptualLoss, execution=Execution(streamed=streamed), reference_side=0)
    trainer = fit(module, tmp_path, LPLCallback(loss=make), Watch())
    assert trainer.callback_metrics["loss_lpl"] > 0
    assert trained == [2]
    parameters = list(module.autoencoder.parameters())
    assert all(parameter.grad is None for parameter in parameters)
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))


def test_without_a_term_the_loss_is_zero_and_costs_no_gradient() -> None:
    z = torch.randn(2, 4, 4, 4, requires_grad=True)
    assert Foreign().auxiliary_loss(z, z).item() == 0


def test_terms_add_up_by_name() -> None:
    module = Foreign()
    module.add_loss_term("a", lambda z0_hat, z0, nsr: (z0_hat - z0).square().mean())
    module.add_loss_term("b", lambda z0_hat, z0, nsr: torch.tensor(2.0))
    z = torch.randn(2, 4, 4, 4)
    assert module.auxiliary_loss(z + 1, z).item() == pytest.approx(3.0, abs=1e-5)
    with pytest.raises(ValueError, match="a loss term 'a' already"):
        module.add_loss_term("a", lambda z0_hat, z0, nsr: z0.sum())
    assert not copy.deepcopy(module).loss_terms
    module.remove_loss_term("a")
    assert list(module.loss_terms) == ["b"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    class WithoutMixin(pl.LightningModule):
        pass

    with pytest.raises(ValueError, match="needs a module with LPLMixin, got WithoutMixin"):
        LPLCallback().setup(pl.Trainer(logger=False), WithoutMixin(), "fit")
    with pytest.raises(ValueError, match=r"Foreign.autoencoder is NoneType. Give it one by `autoencoder`"):
        fit(Foreign(), tmp_path, LPLCallback())
    with pytest.raises(ValueError, match=r"`autoencoder` must be an lpl_lightning.Autoencoder, got AutoencoderKL"):
        fit(Foreign(), tmp_path, LPLCallback(autoencoder=tiny_kl()))


def test_terms_see_the_prediction_and_nobody_later_does() -> None:
    module, prediction = Foreign(), torch.randn(2, 4, 4, 4)
    seen: list[Tensor | None] = []

    def look(z0_hat: Tensor, z0: Tensor, nsr: Tensor | None) -> Tensor:
        seen.append(module.lpl_prediction)
        return z0.sum()

    module.add_loss_term("look", look)
    module.auxiliary_loss(prediction, prediction, None, prediction=prediction)
    assert module.lpl_prediction is None
    module.auxiliary_loss(prediction, prediction)
    assert seen[0] is prediction
    assert seen[1] is None


def test_a_term_that_is_no_scalar_is_named() -> None:
    class Module(LPLMixin, pl.LightningModule):
        pass

    z0 = torch.zeros(2, 4, 2, 2)
    module = Module()
    module.add_loss_term("own", lambda z0_hat, z0, nsr: z0.flatten(1).mean(dim=1))
    with pytest.raises(ValueError, match=r"The loss term 'own' must give a scalar tensor, got shape \(2,\): take its"):
        module.auxiliary_loss(z0, z0)
    module.remove_loss_term("own")
    module.add_loss_term("own", lambda z0_hat, z0, nsr: 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="got a float"):
        module.auxiliary_loss(z0, z0)
