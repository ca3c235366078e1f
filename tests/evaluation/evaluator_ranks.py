"""Evaluates as one of several CPU processes: ``python evaluator_ranks.py RANK WORLD FOLDER``.

FOLDER/data.pt holds images and captions; what was found is written to FOLDER/RANK.pt, and the first process's report
and samples to FOLDER/report.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from conftest import tiny_kl
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.evaluation.cache import ReferenceCache
from lpl_lightning.evaluation.evaluator import Evaluator
from lpl_lightning.evaluation.feature_metrics import FeatureMetrics
from lpl_lightning.evaluation.image_metrics import CaptionMetrics, SpectrumMetrics, WaveletMetrics
from lpl_lightning.evaluation.measure import Sets
from lpl_lightning.evaluation.reconstruction_metrics import ReconstructionMetrics
from lpl_lightning.evaluation.suite import Suite
from lpl_lightning.metrics.classifier_features import InceptionFeatures
from lpl_lightning.metrics.clip_score import CLIPScore
from lpl_lightning.metrics.features import ModuleFeatures

SIDE = 16
TOWER: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


class Projection(nn.Module):
    """A small network: images of any size to ``dim`` numbers of spread and mean."""

    def __init__(self, dim: int = 6, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(dim, 48, generator=generator))
        self.bias = nn.Parameter(torch.randn(dim, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return (nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ self.weight.T + self.bias).tanh() * 3 + 1


class Images(Dataset[dict[str, Any]]):
    """Images in memory, and how many of them were read."""

    def __init__(self, images: Tensor, captions: Sequence[str] | None = None) -> None:
        self.images, self.captions, self.read = images, captions, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read += 1
        item = {"image": self.images[index]}
        return item if self.captions is None else {**item, "caption": self.captions[index]}


def photos(count: int, seed: int, contrast: float = 1.0, side: int = SIDE) -> Tensor:
    """Smooth images of 8 bits with some noise, (count, 3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 2 - 1
    images = nn.functional.interpolate(coarse, (side, side), mode="bilinear") * contrast
    images = images + 0.1 * torch.randn(count, 3, side, side, generator=generator)
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def small_autoencoder() -> Autoencoder:
    """Untrained, f = 4, whose posterior is wide."""
    torch.manual_seed(1)
    return Autoencoder(tiny_kl())


def save_tower_config(folder: Path) -> str:
    """What loads a small open_clip model with weights drawn anew."""
    folder.mkdir()
    preprocessing = {"interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TOWER, "preprocess_cfg": preprocessing}))
    return f"random:local-dir:{folder}"


def whole_suite(tower: str, inception: bool = False) -> Suite:
    """Every measure there is, for few images."""
    torch.manual_seed(2)
    networks = [InceptionFeatures("random:")] if inception else []
    return Suite(
        [
            FeatureMetrics(ModuleFeatures(Projection()), "some", 1, True, 9, True, max_images=20, allow_few=True),
            FeatureMetrics(ModuleFeatures(Projection(9, 1)), "all", 1, True, 9, True, allow_few=True),
            *(FeatureMetrics(network, neighbours=1, memorization=True, allow_few=True) for network in networks),
            SpectrumMetrics(),
            WaveletMetrics(allow_few=True),
            CaptionMetrics(CLIPScore(tower)),
            ReconstructionMetrics(),
        ]
    )


def evaluate(data: dict[str, Any], folder: Path, batch_size: int, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Values, hashes and samples that a run finds; the first process writes them too."""
    suite = whole_suite(data["tower"], data["inception"])
    sets = Sets(SIDE, len(data["real"]), len(data["generated"]), captions=True, autoencoder="small")
    cache = ReferenceCache(data["cache"])
    evaluator = Evaluator(suite, torch.device("cpu"), cache, batch_size, 0, rank, world_size, progress=False)
    autoencoder = small_autoencoder()
    real = Images(data["real"])
    evaluator.take_real(real, sets, {"name": "real"}, "key", autoencoder)
    report = evaluator.measure(Images(data["generated"], data["captions"]), "generated", {})
    if rank == 0:
        evaluator.write(report, folder / "report")
    values = {name: torch.tensor([value.value, value.std or 0.0]) for name, value in report.values.items()}
    samples = {name: tensor for measure in suite for name, tensor in measure.samples().items()}
    hashes = {"images": report.images["hash"], "reference": report.reference["hash"]}
    return {"values": values, "samples": samples, "hashes": hashes, "read": real.read}


def run(rank: int, world_size: int, folder: Path) -> None:
    """One of the processes."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world_size)
    data = torch.load(folder / "data.pt")
    found = evaluate(data, folder, 4, rank, world_size)
    torch.save(found | {"again": evaluate(data, folder, 4, rank, world_size)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
