"""Images per second that loading gives: from a folder, as torchvision does it, and from a cache of latents.

    python notebooks/loading.py --photos PHOTOS --image_size 256 --count 2000
    python notebooks/loading.py --step_ms 5

PHOTOS holds a sub-folder a class; without it, random latents of 32 x 32 x 4 are written to a cache and loaded. Each
loader runs ``--rounds`` times, in turn with the others, and the median is printed. With ``--step_ms`` a training step
that takes so long, and uses no CPU, asks for each batch: the last column says how much longer a step took than that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lpl_lightning import Autoencoder, ClassTokens, FlowMatching, LatentDiffusionModule
from lpl_lightning.data import ImageFolderDataModule, LatentCacheDataModule
from lpl_lightning.data.latent_cache import FORMAT
from lpl_lightning.data.latent_shards import shard_hash, write_shard
from lpl_lightning.encoding import EncodingTrainer


def torchvision_loader(photos: str, image_size: int, batch_size: int, workers: int) -> DataLoader[Any]:
    """ImageFolder with the transforms of our folder module."""
    steps = [
        v2.Resize(image_size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.CenterCrop(image_size),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
    dataset = ImageFolder(photos, v2.Compose(steps))
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers)


def random_cache(root: Path, count: int) -> Path:
    """A cache of random latents of 32 x 32 x 4, mean and standard deviation, in shards of 2,048."""
    shards = []
    for number, start in enumerate(range(0, count, 2048)):
        size = min(2048, count - start)
        path = root / "train" / f"{number:06d}.tar"
        latent = torch.randn(size, 1, 4, 32, 32).half()
        tensors = {"latent": latent, "latent_std": latent.abs(), "label": torch.arange(size) % 1000}
        write_shard(path, tensors, [{"key": str(start + row), "captions": []} for row in range(size)])
        shards.append(
            {"file": f"train/{path.name}", "items": size, "bytes": path.stat().st_size, "hash": shard_hash(path)}
        )
    manifest = {"format": FORMAT, "finished": True, "autoencoder": None, "text": None, "image_size": 256}
    manifest |= {"class_names": [str(i) for i in range(1000)], "has_captions": False, "shards": {"train": shards}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def rate(batches: Iterable[Any], most: int, step: float) -> tuple[float, float]:
    """Images per second after the first batches, and seconds a step takes beyond its own."""
    images, steps, start = 0, 0, 0.0
    for number, batch in enumerate(batches):
        if number == 3:
            images, steps, start = 0, 0, time.perf_counter()
        time.sleep(step)
        images, steps = images + len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0]), steps + 1
        if images >= most:
            break
    took = time.perf_counter() - start
    return images / took, took / steps - step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=20_000, help="images at most in a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step_ms", type=float, default=0.0)
    parser.add_argument("--autoencoder", default="embedded:autoencoder_shapes")
    args = parser.parse_args()
    size, batch, workers = args.image_size, args.batch_size, args.workers
    with tempfile.TemporaryDirectory() as folder:
        loaders: dict[str, Callable[[], Iterable[Any]]] = {}
        cache = Path(folder) / "cache"
        if args.photos:
            data = ImageFolderDataModule(args.photos, size, batch_size=batch, num_workers=workers, verify=False)
            classes = data.num_classes
            parts: Any = (FlowMatching(), torch.nn.Identity(), ClassTokens(classes, token_dim=8, pooled_dim=8))
            module = LatentDiffusionModule(Autoencoder(args.autoencoder), *parts)
            start = time.perf_counter()
            EncodingTrainer(logger=False).encode(module, data, str(cache))
            count = len(data.dataset("train")) + len(data.dataset("val"))
            print(f"lpl encode: {count / (time.perf_counter() - start):,.0f} images a second, start included")
            images = ImageFolderDataModule(args.photos, size, batch_size=batch, num_workers=workers, verify=False)
            ours, theirs = images.train_dataloader(), torchvision_loader(args.photos, size, batch, workers)
            loaders |= {"torchvision ImageFolder": lambda: theirs, "images": lambda: ours}
        else:
            random_cache(cache, args.count)
        for processes in (0, workers):
            latents = LatentCacheDataModule(cache, batch, processes).train_dataloader()
            loaders[f"latents, {processes} loader processes"] = lambda latents=latents: latents  # type: ignore[misc]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
        for _ in range(args.rounds):
            for name, loader in loaders.items():
                found[name].append(rate(loader(), args.count, args.step_ms / 1000))
        print(f"batch {batch}, {workers} loader processes unless said, {os.cpu_count()} cores, median of {args.rounds}")
        for name, values in found.items():
            images_per_second, beyond = (statistics.median(column) for column in zip(*values, strict=True))
            print(f"{name}: {images_per_second:,.0f} images a second, {1e3 * beyond:.2f} ms a step beyond its own")


if __name__ == "__main__":
    main()
