"""The quickstart's promise, whole: a grid, and shapes in it that can be told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from lpl_lightning import LatentDiffusionModule
from lpl_lightning.cli import main
from lpl_lightning.data import ShapesDataset


def shape_classifier() -> nn.Module:
    """A small convolutional network, trained on real images of the data set."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((3, 16), (16, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, 2, 1), nn.BatchNorm2d(channels_out), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 8))
    data = ShapesDataset(8000, seed=11)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=6 * 125)
    for _epoch in range(6):
        for start in range(0, 8000, 64):
            items = [data[i] for i in range(start, start + 64)]
            images, labels = torch.stack([i["image"] for i in items]), torch.tensor([i["label"] for i in items])
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images + 0.1 * torch.randn_like(images)), labels).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    right: Tensor = net(images).argmax(dim=1) == labels
    return right.float().mean().item()


@pytest.mark.slow
def test_the_quickstart_draws_shapes_that_can_be_told_apart(tmp_path: Path) -> None:
    main(["fit", "-c", str(ROOT / "configs" / "quickstart.yaml"), f"--trainer.logger.init_args.save_dir={tmp_path}"])
    run = tmp_path / "quickstart" / "version_0"
    assert len(list((run / "samples").glob("*.png"))) == 2
    module = LatentDiffusionModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True).eval()
    labels = torch.arange(128) % 8
    images = torch.cat([module.generate(range(i, i + 64), labels[i : i + 64]) for i in (0, 64)])
    net = shape_classifier()
    held_out = ShapesDataset(256, split="test", seed=11)
    real = torch.stack([held_out[i]["image"] for i in range(256)])
    on_real = accuracy(net, real, torch.tensor([held_out[i]["label"] for i in range(256)]))
    on_generated = accuracy(net, images, labels)
    print(f"accuracy of a shape classifier: {on_real:.3f} on held-out images, {on_generated:.3f} on generated ones")
    assert on_real > 0.95
    assert on_generated > 0.6
