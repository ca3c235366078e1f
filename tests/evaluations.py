"""What tests of evaluations share: a small suite, data and what watches the weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lpl_lightning import Evaluation, ShapesDataModule
from lpl_lightning.evaluation import FeatureMetrics, Report, SpectrumMetrics, Suite, WaveletMetrics
from lpl_lightning.metrics import ModuleFeatures


class Corners(nn.Module):
    """Six features of an image: mean and corner of each channel; with a weight, which a checkpoint could hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * torch.cat([images.mean((2, 3)), images[:, :, 0, 0]], dim=1)


def suite() -> Suite:
    return Suite(
        [FeatureMetrics(ModuleFeatures(Corners()), kernel_subset=8), SpectrumMetrics(), WaveletMetrics(level=3)]
    )


def evaluation(**options: Any) -> Evaluation:
    settings: dict[str, Any] = {"num_images": 24, "suite": suite(), "cache": False, "batch_size": 5} | options
    return Evaluation(**settings)


def data() -> ShapesDataModule:
    return ShapesDataModule(image_size=16, train_images=32, val_images=20, batch_size=8)


def values(report: Report) -> dict[str, float]:
    return {name: value.value for name, value in report.values.items()}


class Weights(Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.training: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.training.append(all(part.training for part in pl_module.denoiser.modules()))
        self.steps.append(pl_module.denoiser.backbone.proj_out.weight.detach().clone())
