"""Images per second from a folder, as we load it and as torchvision does, and from a cache of latents.

    python notebooks/loading.py --step_ms 5
    python notebooks/loading.py --photos PHOTOS
    python notebooks/loading.py --photos PHOTOS --image_size 64 --train_steps 10

PHOTOS holds a sub-folder a class, of which ``--count`` images are taken; without it, random latents of 32 x 32 x 4 are
written to a cache and loaded. With ``--step_ms`` a training step that takes so long, and uses no CPU, asks for each
batch; ``nothing`` is that step with one batch that is there already. With ``--train_steps`` the model of
configs/folder.yaml trains, with the Latent Perceptual Loss. Each runs ``--rounds`` times, in turn with the
others, and the median is printed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import SD3Transformer2DModel
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lpl_lightning import (
    Autoencoder,
    ClassTokens,
    FlowMatching,
    LatentDiffusionModule,
    LatentPerceptualLoss,
    LPLCallback,
    SD3Denoiser,
)
from lpl_lightning.data import (
    HuggingFaceDataModule,
    ImageFolderDataModule,
    LatentCacheDataModule,
    WebDatasetDataModule,
)
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
    return DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=lambda items: dict(zip(("image", "label"), default_collate(items), strict=True)),
    )


def some_photos(root: Path, photos: Path, count: int) -> Path:
    """A folder that links to so many photos of all classes."""
    paths = sorted(path for path in photos.glob("*/*") if path.is_file())
    for path in paths[:: max(1, len(paths) // count)][:count]:
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).symlink_to(path.resolve())
    return root


def tar_shards(root: Path, photos: Path, count: int = 4) -> Path:
    """The same photos in so many shards of WebDataset's layout."""
    root.mkdir()
    paths = sorted(photos.glob("*/*"))
    for shard in range(count):
        with tarfile.open(root / f"{shard:04}.tar", "w") as archive:
            for number, path in enumerate(paths[shard::count]):
                for ending, content in ((path.suffix, path.read_bytes()), (".cls", path.parent.name.encode())):
                    member = tarfile.TarInfo(f"{number * count + shard:09}{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return root


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


def model(autoencoder: str, classes: int, image_size: int) -> LatentDiffusionModule:
    """The model of configs/folder.yaml, with patches of 2 from 128 px on."""
    decoder = Autoencoder(autoencoder)
    channels, side = decoder.latent_channels, image_size // decoder.downscale
    backbone = SD3Transformer2DModel(
        sample_size=side,
        patch_size=1 if image_size < 128 else 2,
        in_channels=channels,
        out_channels=channels,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=64,
        caption_projection_dim=256,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        pos_embed_max_size=max(32, side),
        qk_norm="rms_norm",
    )
    conditioner = ClassTokens(classes, token_dim=256, pooled_dim=256)
    return LatentDiffusionModule(decoder, FlowMatching(), SD3Denoiser(backbone), conditioner)


def rate(batches: Iterator[Any], most: int, step: float) -> float:
    """Images per second after the first batches, while each step sleeps for so many seconds."""
    images, start = 0, 0.0
    for number, batch in enumerate(batches):
        if number == 3:
            images, start = 0, time.perf_counter()
        if step:
            time.sleep(step)
        images += len(next(iter(batch.values())))
        if images >= most:
            break
    return images / (time.perf_counter() - start)


class Clock(pl.Callback):
    """When each training step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note it."""
        self.ends.append(time.perf_counter())


def training_rate(module: LatentDiffusionModule, batches: Iterable[Any], batch_size: int, steps: int) -> float:
    """Images per second of training, loading included, after the first two steps."""
    clock, perceptual = Clock(), LPLCallback(loss=partial(LatentPerceptualLoss, relative_eps=0.1))
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_steps=steps + 2, callbacks=[perceptual, clock], **quiet)
    trainer.fit(module, batches)
    return batch_size * steps / (clock.ends[-1] - clock.ends[1])


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
    parser.add_argument("--train_steps", type=int, default=0)
    parser.add_argument("--autoencoder", default="embedded:autoencoder_shapes")
    args = parser.parse_args()
    if args.train_steps and not args.photos:
        parser.error("--train_steps needs --photos")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size, batch, workers, step = args.image_size, args.batch_size, args.workers, args.step_ms / 1000
    with tempfile.TemporaryDirectory() as folder:
        loaders: dict[str, Iterable[Any]] = {}
        cache = Path(folder) / "cache"
        if args.photos:
            photos = str(some_photos(Path(folder) / "photos", Path(args.photos), args.count))
            data = ImageFolderDataModule(photos, size, batch_size=batch, num_workers=workers, verify=False)
            module = model(args.autoencoder, data.num_classes, size)
            start = time.perf_counter()
            EncodingTrainer(logger=False).encode(module, data, str(cache))
            count = len(data.dataset("train")) + len(data.dataset("val"))
            print(f"lpl encode: {count / (time.perf_counter() - start):,.0f} images a second, start included")
            images = ImageFolderDataModule(photos, size, batch_size=batch, num_workers=workers, verify=False)
            loaders["torchvision's ImageFolder"] = torchvision_loader(photos, size, batch, workers)
            loaders["images"] = images.train_dataloader()
            shards = str(tar_shards(Path(folder) / "shards", Path(photos)))
            names, plain = list(images.class_names), {"batch_size": batch, "num_workers": workers}
            tars = WebDatasetDataModule(shards, size, label="cls", classes=names, val_fraction=0.2, **plain)
            # By a pattern: of a folder alone the library makes splits by words such as "val" in files' names.
            table = HuggingFaceDataModule("imagefolder", size, data_files=f"{photos}/**", label="label", **plain)
            for name, source in {"tar shards": tars, "Hugging Face table": table}.items():
                source.setup("fit")
                loaders[name] = source.train_dataloader()
        else:
            random_cache(cache, args.count)
        for processes in (0, workers):
            latents = LatentCacheDataModule(cache, batch, processes)
            loaders[f"latents, {processes} processes"] = latents.train_dataloader()
        measures: dict[str, Callable[[], float]] = {}
        if step:
            there = next(iter(loaders["latents, 0 processes"]))
            measures["nothing"] = lambda: rate(itertools.repeat(there), args.count, step)
        for name, loader in loaders.items():
            measures[name] = lambda loader=loader: rate(iter(loader), args.count, step)  # type: ignore[misc]
        trained = [
            name
            for name in loaders
            if name not in ("tar shards", "Hugging Face table", f"latents, {workers} processes")
        ]
        for name, loader in ((name, loaders[name]) for name in trained if args.train_steps):
            measures[f"training from {name}"] = lambda loader=loader: training_rate(  # type: ignore[misc]
                module, loader, batch, args.train_steps
            )
        found: dict[str, list[float]] = {name: [] for name in measures}
        for _ in range(args.rounds):
            for name, measure in measures.items():
                found[name].append(measure())
        print(f"batch {batch}, {workers} loader processes unless said, {os.cpu_count()} cores, median of {args.rounds}")
        for name, values in found.items():
            print(f"{name}: {statistics.median(values):,.0f} images a second")


if __name__ == "__main__":
    main()
