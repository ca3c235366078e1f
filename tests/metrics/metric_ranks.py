"""Computes metrics as one of two CPU processes, which see different samples: ``python metric_ranks.py RANK FOLDER``.

FOLDER/data.pt holds features, images and captions; what was computed is written to FOLDER/RANK.pt.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lpl_lightning.metrics.clip_score import CLIPScore
from lpl_lightning.metrics.frechet import FrechetDistance
from lpl_lightning.metrics.gaussian import GaussianStatistics


def measure(data: dict[str, Any], shares: slice, folder: Path) -> dict[str, Any]:
    """What the metrics make of some of the data."""
    dim = data["real"].shape[1]
    statistics, distance = GaussianStatistics(dim), FrechetDistance(dim)
    for batch in data["real"][shares].split(7):
        statistics.update(batch)
        distance.update(batch, real=True)
    for batch in data["generated"][shares].split(5):
        distance.update(batch, real=False)
    score = CLIPScore(f"local-dir:{folder / 'tower'}")
    score.update(data["images"][shares], data["captions"][shares])
    return {"gaussian": tuple(statistics.compute()), "distance": distance.compute(), "score": score.compute()}


def run(rank: int, folder: Path) -> None:
    """One of the processes: the first has the first three samples, the other the rest."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    data = torch.load(folder / "data.pt")
    torch.save(measure(data, slice(0, 3) if rank == 0 else slice(3, None), folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
