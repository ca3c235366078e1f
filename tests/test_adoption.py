"""LPL in loops of other projects' kinds, by the lines that losses/README.md gives.

The loops are our own, with the structure and the names of those that the guide is about; a test holds that the guide's
lines stand here as they stand there.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compvis import CompVisKL, frozen_as_they_do
from conftest import ROOT, tiny_kl
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lpl_lightning import Autoencoder, LatentPerceptualLoss, LPLCallback, LPLMixin, estimate_z0

GUIDE = (ROOT / "lpl_lightning" / "losses" / "README.md").read_text().split("## In a loop of your own")[1]


@dataclass
class Run:
    """What a loop did: its losses, the model it trained, the autoencoder it used, and the names in what it saved."""

    model: Any
    vae: Any
    before: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    saved: set[str] = field(default_factory=set)


def check(run: Run, off: Run) -> None:
    """It trains another model than without LPL, and nothing but the model."""
    assert np.isfinite(run.losses).all()
    assert run.saved == off.saved
    assert run.saved, "nothing was saved to compare"
    for module in (run, off):
        for name, weight in module.vae.state_dict().items():
            assert torch.equal(weight, module.before[name].to(weight.dtype)), name
        assert all(parameter.grad is None for parameter in module.vae.parameters())
    trained = dict(off.model.named_parameters())
    assert any(not torch.equal(weight, trained[name]) for name, weight in run.model.named_parameters())


def frozen_kl() -> Any:
    torch.manual_seed(1)
    return tiny_kl(scaling_factor=0.5).requires_grad_(False)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


class Photos(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images with all that is drawn in a step, so that batches of any size see the same."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        images, noise, text = (torch.randn(shape, generator=generator) for shape in ((3, 16, 16), (4, 4, 4), (5, 8)))
        return {
            "pixel_values": images.clamp(-1, 1),
            "noise": noise,
            "timestep": torch.tensor(20 * index),
            "text": text,
        }


# An Accelerate loop, in the way of diffusers' train_text_to_image.py.


def train_with_accelerate(
    folder: Path, on: bool, precision: str = "no", accumulation: int = 1, epochs: int = 2, kind: str = "epsilon"
) -> Run:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation)
    noise_scheduler: Any = DDPMScheduler(prediction_type=kind)
    vae: Any = frozen_kl()
    run = Run(None, vae, weights(vae))
    torch.manual_seed(2)
    unet: Any = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    loader: Any = DataLoader(Photos(), batch_size=8 // accumulation)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    weight_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    vae.to(accelerator.device, dtype=weight_dtype)
    lpl = LatentPerceptualLoss(vae)
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"].to(weight_dtype)).latent_dist.mode()
                latents = latents * vae.config.scaling_factor
                noise, timesteps = batch["noise"].to(weight_dtype), batch["timestep"]
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                target = noise if kind == "epsilon" else noise_scheduler.get_velocity(latents, noise, timesteps)
                model_pred = unet(noisy_latents, timesteps, batch["text"].to(weight_dtype), return_dict=False)[0]
                loss = F.mse_loss(model_pred.float(), target.float())
                if on:
                    z0_hat, noise_to_signal = estimate_z0(noise_scheduler, model_pred, noisy_latents, timesteps)
                    loss = loss + 3.0 * lpl(z0_hat, latents, noise_to_signal).mean()
                accelerator.backward(loss)
                run.losses.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
    run.model = accelerator.unwrap_model(unet)
    accelerator.save_state(str(folder))
    run.saved = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} | set(weights(unet))
    return run


@pytest.mark.parametrize(("precision", "kind"), [("no", "epsilon"), ("bf16", "v_prediction")])
def test_an_accelerate_loop(precision: str, kind: str, tmp_path: Path) -> None:
    run = train_with_accelerate(tmp_path / "on", True, precision, epochs=6, kind=kind)
    check(run, train_with_accelerate(tmp_path / "off", False, precision, epochs=6, kind=kind))
    assert run.losses[-1] < run.losses[0]
    assert run.vae.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_accumulated_batches_have_the_gradient_of_the_whole(tmp_path: Path) -> None:
    whole = train_with_accelerate(tmp_path / "whole", True)
    parts = train_with_accelerate(tmp_path / "parts", True, accumulation=4)
    assert len(parts.losses) == 4 * len(whole.losses)
    other = dict(parts.model.named_parameters())
    for name, weight in whole.model.named_parameters():
        torch.testing.assert_close(weight, other[name], rtol=1e-4, atol=1e-5)


# A bare loop in the way of DiT's, whose loss is a method of a class without schedulers.


class Gaussian:
    """Linear betas, a model that predicts the noise and a variance; float64 numpy arrays of the chain's numbers."""

    def __init__(self) -> None:
        alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        self.sqrt_alphas_cumprod, self.sqrt_one_minus = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
        self.sqrt_recip = np.sqrt(1 / alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / alphas_cumprod - 1)

    @staticmethod
    def at(numbers: Any, t: Tensor) -> Tensor:
        return torch.from_numpy(numbers)[t].float().view(-1, 1, 1, 1)

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self.at(self.sqrt_recip, t) * x_t - self.at(self.sqrt_recipm1_alphas_cumprod, t) * eps

    def training_losses(self, model: Any, x: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        x_t = self.at(self.sqrt_alphas_cumprod, t) * x + self.at(self.sqrt_one_minus, t) * noise
        model_output, variance = model(x_t, t).chunk(2, dim=1)
        terms["pred_xstart"] = self._predict_xstart_from_eps(x_t, t, model_output)
        terms["loss"] = (noise - model_output).square().flatten(1).mean(1)
        terms["loss"] = terms["loss"] + (variance * model_output.detach()).square().flatten(1).mean(1)
        return terms


class Net(nn.Module):
    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = (t.float() / t.float().abs().max().clamp_min(1)).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        predicted: Tensor = self.conv(torch.cat([x, time], dim=1))
        return predicted


def bare_loop(folder: Path, net: Net, step: Callable[[Tensor, Any, LatentPerceptualLoss], Tensor], steps: int) -> Run:
    """Encode, lose, step and save, as those loops do."""
    vae: Any = frozen_kl()
    run = Run(net, vae, weights(vae))
    lpl = LatentPerceptualLoss(vae)
    opt = torch.optim.SGD(net.parameters(), lr=0.05)
    torch.manual_seed(3)
    images = torch.randn(8, 3, 16, 16).clamp(-1, 1)
    for _ in range(steps):
        with torch.no_grad():
            x = vae.encode(images).latent_dist.sample().mul_(0.5)
        loss = step(x, net, lpl)
        opt.zero_grad()
        loss.backward()
        opt.step()
        run.losses.append(loss.item())
    torch.save({"model": net.state_dict(), "opt": opt.state_dict()}, folder / "model.pt")
    run.saved = set(torch.load(folder / "model.pt", weights_only=True)["model"])
    return run


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loop_with_a_model_that_learns_its_variance(autocast: bool, tmp_path: Path) -> None:
    diffusion, vae = Gaussian(), frozen_kl()

    def train(on: bool) -> Run:
        def step(x: Tensor, model: Any, lpl: LatentPerceptualLoss) -> Tensor:
            t = torch.randint(0, 400, (len(x),))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss_dict = diffusion.training_losses(model, x, t, torch.randn_like(x))
                loss = loss_dict["loss"].mean()
                if on:
                    noise_to_signal = torch.from_numpy(diffusion.sqrt_recipm1_alphas_cumprod)[t.cpu()]
                    loss = loss + 3.0 * lpl(loss_dict["pred_xstart"], x, noise_to_signal).mean()
            return loss

        torch.manual_seed(4)
        return bare_loop(tmp_path, Net(8), step, steps=4)

    check(train(True), train(False))
    # What the model says of the variance LPL leaves alone, and the truth is no loss.
    lpl, net, t = LatentPerceptualLoss(vae), Net(8), torch.tensor([10, 300])
    x, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    lpl(diffusion.training_losses(net, x, t, noise)["pred_xstart"], x).sum().backward()
    assert net.conv.weight.grad is not None
    assert net.conv.weight.grad[:4].abs().sum() > 0
    assert net.conv.weight.grad[4:].abs().sum() == 0
    true = diffusion.training_losses(lambda x_t, t: torch.cat([noise, x_t], dim=1), x, t, noise)["pred_xstart"]
    torch.testing.assert_close(true, x, rtol=1e-4, atol=1e-4)


# In the way of diffusers' train_dreambooth_sd3.py: noise added by hand, at the shifted times of a scheduler's copy, and
# a prediction cut in two.


def test_a_loop_of_flow_matching_with_prior_preservation(tmp_path: Path) -> None:
    noise_scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noise_scheduler_copy = copy.deepcopy(noise_scheduler)

    def train(on: bool) -> Run:
        def step(model_input: Tensor, transformer: Any, lpl: LatentPerceptualLoss) -> Tensor:
            noise, indices = torch.randn_like(model_input), torch.randint(0, 1000, (len(model_input),))
            timesteps = noise_scheduler_copy.timesteps[indices]
            sigmas = noise_scheduler_copy.sigmas[indices].view(-1, 1, 1, 1)
            noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
            model_pred = transformer(noisy_model_input, timesteps)
            if on:
                z0_hat, noise_to_signal = estimate_z0(noise_scheduler, model_pred, noisy_model_input, timesteps)
                perceptual = lpl(z0_hat, model_input, noise_to_signal).mean()
                torch.testing.assert_close(noise_to_signal, (sigmas / (1 - sigmas)).flatten(), rtol=1e-4, atol=1e-5)
            model_pred = model_pred * (-sigmas) + noisy_model_input
            if on:
                torch.testing.assert_close(z0_hat, model_pred)
            (model_pred, model_pred_prior), (target, target_prior) = model_pred.chunk(2), model_input.chunk(2)
            loss = F.mse_loss(model_pred, target) + F.mse_loss(model_pred_prior, target_prior)
            if on:
                loss = loss + 3.0 * perceptual
            return loss

        torch.manual_seed(4)
        return bare_loop(tmp_path, Net(4), step, steps=4)

    check(train(True), train(False))


# A bare loop in the way of SiT's: a velocity, and data at t = 1.


class path:
    """As it imports the module where this function lies."""

    @staticmethod
    def expand_t_like_x(t: Tensor, x: Tensor) -> Tensor:
        return t.view(-1, *[1] * (x.ndim - 1))


def transport_losses(model: Any, x1: Tensor, t: Tensor, x0: Tensor) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = {}
    xt = path.expand_t_like_x(t, x1) * x1 + (1 - path.expand_t_like_x(t, x1)) * x0
    model_output = model(xt, t)
    terms["x1_hat"], terms["nsr"] = xt + (1 - path.expand_t_like_x(t, xt)) * model_output, (1 - t) / t
    terms["loss"] = (model_output - (x1 - x0)).square().flatten(1).mean(1)
    return terms


def test_a_loop_with_a_velocity_and_data_at_one(tmp_path: Path) -> None:
    def train(on: bool) -> Run:
        def step(x: Tensor, model: Any, lpl: LatentPerceptualLoss) -> Tensor:
            loss_dict = transport_losses(model, x, torch.rand(len(x)), torch.randn_like(x))
            loss = loss_dict["loss"].mean()
            if on:
                loss = loss + 3.0 * lpl(loss_dict["x1_hat"], x, loss_dict["nsr"]).mean()
            return loss

        torch.manual_seed(4)
        return bare_loop(tmp_path, Net(4), step, steps=12)

    run = train(True)
    check(run, train(False))
    assert sum(run.losses[-4:]) < sum(run.losses[:4])
    x, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    true = transport_losses(lambda xt, t: x - noise, x, torch.tensor([0.2, 0.9]), noise)
    torch.testing.assert_close(true["x1_hat"], x)
    torch.testing.assert_close(true["nsr"], torch.tensor([4.0, 1 / 9]))


# A Lightning project in the way of generative-models: its own classes of autoencoder and loss, EDM's noise levels.


class EngineLoss(nn.Module):
    def forward(self, network: Any, input: Tensor, batch: dict[str, Any]) -> Any:
        sigmas = 0.05 + 0.3 * torch.rand(len(input))
        wide = sigmas.view(-1, 1, 1, 1)
        noised = input + wide * torch.randn_like(input)
        model_output = noised - wide * network(noised / (wide**2 + 1).sqrt(), sigmas.log())
        batch["lpl"] = model_output, input, sigmas
        return ((model_output - input) / wide).square().flatten(1).mean(1)


def engine(lightning: Any, scale_factor: float = 0.5) -> Any:
    """Of either package that Lightning comes as."""

    class DiffusionEngine(LPLMixin, lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.first_stage_model: Any = frozen_as_they_do(CompVisKL(frozen_kl()))
            self.autoencoder = Autoencoder(self.first_stage_model, scaling_factor=scale_factor)
            self.model, self.loss_fn = Net(4), EngineLoss()
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            with torch.no_grad():
                z = scale_factor * self.first_stage_model.encode(batch["pixel_values"]).mean
            loss = self.loss_fn(self.model, z, batch)
            loss_mean = loss.mean() + self.auxiliary_loss(*batch["lpl"])
            self.losses.append(loss_mean.item())
            return loss_mean

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters(), lr=0.05)

    return DiffusionEngine()


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_lightning_project(package: str, precision: str, tmp_path: Path) -> None:
    lightning = importlib.import_module(package)

    def train(on: bool) -> Run:
        module, folder = engine(lightning), tmp_path / str(on)
        run = Run(module.model, module.first_stage_model, weights(module.first_stage_model))
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            precision=precision,
            accumulate_grad_batches=2,
            callbacks=[LPLCallback()] if on else [],
            default_root_dir=folder,
            logger=lightning.loggers.CSVLogger(folder),
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        torch.manual_seed(6)
        trainer.fit(module, DataLoader(Photos(), batch_size=2))
        (path,) = folder.rglob("*.ckpt")
        state = torch.load(path, weights_only=True)["state_dict"]
        engine(lightning).load_state_dict(state, strict=True)
        if on:
            assert trainer.callback_metrics["loss_lpl"] > 0
            assert "lpl_variance_ratio/decoder.up.2.upsample" in trainer.callback_metrics
        run.losses, run.saved = module.losses, set(state)
        return run

    check(train(True), train(False))


# The guide.


def test_the_guides_lines_are_those_of_the_loops_above() -> None:
    here = {line.strip() for line in Path(__file__).read_text().splitlines()}
    lines = [line for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]
    code = [line for line in lines if line and not line.startswith("#")]
    assert len(code) >= 12
    for line in code:
        if line.startswith("from "):
            exec(line, {})
        else:
            assert line in here, line


def table_of_the_guide() -> list[tuple[str, str, str]]:
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \| `(.+?)` \|$", GUIDE, re.MULTILINE)
    assert len(rows) == 8
    return rows


@pytest.mark.parametrize("row", table_of_the_guide(), ids=lambda row: row[0][:40])
def test_the_guides_table_gives_the_clean_latent_of_a_true_prediction(row: tuple[str, str, str]) -> None:
    says, z0_hat, ratio = row
    z0, noise = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    t: Any = torch.tensor([0.2, 0.5, 0.9]).view(-1, 1, 1, 1)
    alpha, sigma, d_alpha, d_sigma = torch.cos(t), torch.sin(t), -torch.sin(t), torch.cos(t)
    scheduler: Any = DDPMScheduler()
    if "diffusers" in says:
        t = torch.tensor([10, 400, 900])
        alpha = scheduler.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
    elif "noise at t = 1" in says:
        alpha, sigma = 1 - t, t
    elif "data at t = 1" in says:
        alpha, sigma = t, 1 - t
    elif "clean latent" in says:
        alpha, sigma = torch.ones_like(t), 3 * t
    z_t = alpha * z0 + sigma * noise
    names: dict[str, Any] = {"z0": z0, "noise": noise, "alpha": alpha, "sigma": sigma, "z_t": z_t, "t": t}
    names |= {"d_alpha": d_alpha, "d_sigma": d_sigma, "estimate_z0": estimate_z0, "scheduler": scheduler}
    stated = re.search(r", `(.+)`$", says)
    others = {"the score": -noise / sigma, "the clean latent": z0}
    names["p"] = eval(stated[1], {}, names) if stated else others.get(says.split(",")[0], noise)
    torch.testing.assert_close(eval(z0_hat, {}, names), z0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(eval(ratio, {}, names).flatten(), (sigma / alpha).flatten(), rtol=1e-4, atol=1e-5)
