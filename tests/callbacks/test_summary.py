"""What a run says when it starts and ends, against what is counted and found independently."""

from __future__ import annotations

import logging
import math
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, image_batch, tiny_kl, tiny_taesd
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lpl_lightning import (
    DDPM,
    Autoencoder,
    LatentDiffusionModule,
    LatentPerceptualLoss,
    LPLCallback,
    LPLMixin,
    RunSummary,
)
from lpl_lightning.cli import main
from lpl_lightning.multiply_adds import of_decoder, of_denoiser, of_encoder

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def trainer(tmp_path: Path, *callbacks: Any, **options: Any) -> Trainer:
    given: dict[str, Any] = {"max_steps": 2, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Trainer(callbacks=[*callbacks], default_root_dir=tmp_path, **(given | options))


def batches(*of: Any) -> Any:
    given: Any = list(of)
    return DataLoader(given, batch_size=None)


def said(caplog: pytest.LogCaptureFixture, name: str) -> str:
    found = re.findall(rf"^  {re.escape(name)} +(.*)$", caplog.text, re.MULTILINE)
    assert len(found) == 1, caplog.text
    return str(found[0])


def test_the_start_of_a_run(
    make_module: Callable[..., LatentDiffusionModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(dit=True, noise=DDPM("v_prediction"))
    for block in module.denoiser.backbone.transformer_blocks:
        block.requires_grad_(False)
    lpl = LPLCallback(weight=2.5, every_n_steps=2, loss=lambda a: LatentPerceptualLoss(a, depth=2))
    trainer(tmp_path, lpl, RunSummary()).fit(module, batches(image_batch(1)))
    backbone = sum(p.numel() for p in module.denoiser.parameters())
    frozen = sum(p.numel() for block in module.denoiser.backbone.transformer_blocks for p in block.parameters())
    own = sum(p.numel() for p in module.autoencoder.parameters())
    assert said(caplog, "trainable parameters") == f"{backbone - frozen:,} (denoiser {backbone - frozen:,})"
    assert said(caplog, "frozen parameters") == f"{own + frozen:,} (autoencoder {own:,}, denoiser {frozen:,})"
    assert said(caplog, "latents") == "4 x 4 x 4, of images of 16 x 16"
    assert said(caplog, "LPL") == "weight 2.5, comparing mid, up_0"
    # tau = 3 for sides of 32 is 3/8 for sides of 4.
    alpha, sigma = module.noise.alpha_sigma(torch.arange(1000.0))
    step = int((sigma / alpha <= 3 / 8).sum()) - 1
    near = int((sigma / alpha).log().sub(math.log(3 / 8)).abs().argmin())
    units = f"sigma / alpha 0.375, SNR 7.111, log SNR 1.962, DDPM step {step}, flow t 0.2727, t of DDPM {near}"
    assert said(caplog, "threshold") == units
    share = (step + 1) / 1000  # each step is as likely
    assert said(caplog, "past the gate") == f"{share:.0%} of training samples, as their times are drawn"
    each = 3 * (of_decoder(module.autoencoder, (1, 4, 4, 4), ["mid", "up_0"]) or 0)
    denoiser = of_denoiser(module.denoiser, (1, 4, 4, 4), module.conditioner) or 0
    rest = (3 - frozen / backbone) * denoiser + (of_encoder(module.autoencoder, (1, 3, 16, 16)) or 0)
    part = share * each / 2 / (share * each / 2 + rest)
    assert said(caplog, "estimated cost").startswith(f"LPL {part:.0%} of a step's multiply-adds: ")
    assert "its threshold is" not in caplog.text, "it is said once"


def test_it_is_quiet_where_the_model_summary_is(
    make_module: Callable[..., LatentDiffusionModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = batches(image_batch(2))
    trainer(tmp_path, RunSummary(), LPLCallback(), enable_model_summary=False).fit(make_module(), data)
    assert "trainable parameters" not in caplog.text
    assert f"Run ended at step 2: {tmp_path}" in caplog.text
    assert "its threshold is" in caplog.text
    caplog.clear()
    trainer(tmp_path / "quiet", RunSummary(start=False, end=False)).fit(make_module(), data)
    assert "trainable parameters" not in caplog.text
    assert "Run ended" not in caplog.text
    trainer(tmp_path / "dry", RunSummary(start=True), fast_dev_run=True).fit(make_module(), data)
    assert "trainable parameters" in caplog.text
    assert "Run ended" not in caplog.text, "it leaves no files"


class Own(LPLMixin, LightningModule):
    """Somebody's module, on latents of sides that only its batches tell."""

    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = Autoencoder(tiny_kl())
        self.net = nn.Conv2d(4, 4, 1)
        self.added: list[list[str]] = []

    def training_step(self, z0: Tensor, batch_idx: int) -> Tensor:
        self.added.append(list(self.loss_terms))
        z0_hat = self.net(z0)
        loss: Tensor = (z0_hat - z0).square().mean()
        return loss + self.auxiliary_loss(z0_hat, z0, torch.tensor([0.1, 0.2, 9.0, 9.0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_a_floor_of_the_variances_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Since the decoder decides whether there is one, unless the user does."""
    module = Own()
    module.autoencoder = Autoencoder(tiny_taesd())
    trainer(tmp_path, RunSummary(), LPLCallback()).fit(module, batches(torch.randn(4, 4, 8, 8)))
    assert said(caplog, "LPL") == "weight 3, comparing mid, up_0, up_1, up_2, variances with relative_eps 0.1"
    caplog.clear()
    without = LPLCallback(loss=partial(LatentPerceptualLoss, statistics="none", relative_eps=0.1))
    trainer(tmp_path / "without", RunSummary(), without).fit(module, batches(torch.randn(4, 4, 8, 8)))
    assert said(caplog, "LPL") == "weight 3, comparing mid, up_0, up_1, up_2"


def test_a_module_of_anyones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Own()
    data = batches(*[torch.randn(4, 4, 8, 8)] * 2)
    trainer(tmp_path, RunSummary(), LPLCallback()).fit(module, data)
    assert said(caplog, "trainable parameters") == "20 (net 20)"
    assert said(caplog, "latents") == "4 x 8 x 8"
    assert said(caplog, "threshold").startswith("sigma / alpha 0.75, ")
    assert said(caplog, "past the gate") == "50% of the samples of the first batch"
    each = 3 * (of_decoder(module.autoencoder, (1, 4, 8, 8), module.autoencoder.feature_names) or 0) / 1e9
    assert said(caplog, "estimated cost").startswith(
        f"LPL {each / 2:.3g} G multiply-adds a sample: {each:.3g} G for each"
    )
    assert module.added == [["lpl", "run_summary"], ["lpl"]]
    assert not module.loss_terms


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.slow
def test_the_commands_of_the_end_run(
    make_module: Callable[..., LatentDiffusionModule],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rich: Any = pytest.importorskip("rich")
    monkeypatch.chdir(tmp_path)
    base = [word for name in ("quickstart", "tiny") for word in ("-c", str(ROOT / "configs" / f"{name}.yaml"))]
    folder = "--trainer.logger.init_args.save_dir=the runs"
    rich.reconfigure(width=200, force_terminal=True)  # Lightning's bar where rich is
    try:
        main(["fit", *base, "--data.num_generate=2", folder])
    finally:
        rich.reconfigure()
    shown = capsys.readouterr().out
    for name in ("loss_diffusion:", "loss_lpl:", "gate_share:", "images_per_second:"):
        assert name in shown, "the bar has names whole"
    run = Path("the runs/quickstart/version_0")
    assert said(caplog, "checkpoint") == str(run / "checkpoints" / "last.ckpt")
    for name in ("config.yaml", "metrics.csv", "samples"):
        assert said(caplog, name) == str(run / name)
        assert (run / name).exists()
    commands = [said(caplog, name) for name in ("measure it", "draw from it")]
    assert "then compare it" not in caplog.text
    for command in commands:
        main(shlex.split(command)[1:])
    assert len(list((run / "generated").rglob("*.png"))) == 2
    assert len(list((run / "evaluation").rglob("report.json"))) == 1
    caplog.clear()
    logger = CSVLogger("the runs", "quickstart")
    after = Path(logger.log_dir)
    after.mkdir()
    (after / "config.yaml").touch()
    trainer(tmp_path, RunSummary(), logger=logger, log_every_n_steps=1).fit(make_module(), batches(image_batch(2)))
    assert said(caplog, "then compare it") == shlex.join(["lpl", "compare", str(run), str(after)])
    assert "config.yaml" not in caplog.text, "it is of no run that the trainer knows of"
