"""Updates metrics on two CPU processes, with shares that differ, and writes what rank 0 computes.

``python image_ranks.py FOLDER`` reads FOLDER/images.pt and writes FOLDER/values.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.multiprocessing.spawn import start_processes
from torchmetrics import Metric

from lpl_lightning.metrics.reconstruction import Reconstruction
from lpl_lightning.metrics.spectrum import PowerSpectrum
from lpl_lightning.metrics.wavelet import FrechetWaveletDistance

SIDE = 16
SHARES = {"one": [slice(None)], "two": [slice(0, 7), slice(7, None)]}
"""What part of the images a rank takes."""


def values(images: dict[str, torch.Tensor], share: slice, alone: bool) -> dict[str, Any]:
    """What metrics make of a share of the images and of those of the other ranks.

    Of two ranks only the first updates with generated images, all of them.
    """
    spectrum, wavelet = PowerSpectrum(SIDE), FrechetWaveletDistance(SIDE, level=3)
    metrics: list[Metric] = [spectrum, wavelet]
    for metric in metrics:
        metric.update(images["real"][share], real=True)
        if alone or share.start == 0:
            metric.update(images["generated"], real=False)
    reconstruction = Reconstruction()
    reconstruction.update(images["generated"][share], images["real"][share])
    return {
        "spectrum": spectrum.compute()._asdict(),
        "wavelet": wavelet.compute(),
        "reconstruction": reconstruction.compute(),
    }


def work(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = values(torch.load(folder / "images.pt"), SHARES["two"][rank], alone=False)
    if rank == 0:
        torch.save(found, folder / "values.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    start_processes(work, (Path(sys.argv[1]),), nprocs=2, start_method="fork")  # which imports nothing again
