"""Photos of many shapes that can be told apart after they were resized and cropped, and what watches them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from lpl_lightning.data.buckets import AspectBuckets
from lpl_lightning.data.folder import ImageFolderDataModule

BUCKETS = AspectBuckets(4, 2.0)
SHAPES = [(32, 32), (48, 30), (30, 48), (32, 40), (20, 60), (60, 20), (40, 30)]
"""Heights and widths that go round."""


def colour(index: int) -> tuple[int, int, int]:
    """Of the image of a number, up to 256."""
    return index, 255 - index, 128


def number(image: Tensor) -> int:
    """Which image it is, of (3, H, W) in [-1, 1]."""
    return round((float(image[0].mean()) + 1) * 127.5)


def write(root: Path, count: int = 40, name: str = "{}.png") -> Path:
    """Images of one colour each, of the shapes above."""
    root.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        height, width = SHAPES[index % len(SHAPES)]
        pixels = np.broadcast_to(np.array(colour(index), np.uint8), (height, width, 3))
        Image.fromarray(np.ascontiguousarray(pixels)).save(root / name.format(f"{index:03}"))
    return root


def photos(root: Path, batch_size: int = 4, **options: Any) -> ImageFolderDataModule:
    settings: dict[str, Any] = {
        "image_size": 32,
        "num_workers": 0,
        "val_fraction": 0.3,
        "buckets": BUCKETS,
        "verify": False,
        "crop": "random",
    }
    return ImageFolderDataModule(root, batch_size=batch_size, **(settings | options))


Said = tuple[tuple[int, ...], list[tuple[int, ...]]]


def said(batch: dict[str, Any]) -> Said:
    """Size of a batch, and of each image its number and the place of its crop, which is drawn."""
    items = zip(batch["image"], batch["crop_top_left"].tolist(), strict=True)
    return tuple(batch["image"].shape[2:]), [(number(image), *place) for image, place in items]


class Seen(Callback):
    """Batches of training and validation."""

    def __init__(self) -> None:
        self.train: list[Said] = []
        self.val: list[Said] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.train.append(said(batch))

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.val.append(said(batch))


class Mean(pl.LightningModule):
    """One number, trained on the images' mean."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.line(batch["image"].mean(dim=(1, 2, 3))[:, None]).square().mean()
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nothing."""

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)
