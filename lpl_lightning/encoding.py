"""``lpl encode``: autoencoder, and text encoders, run over the data once, into a cache of latents.

Items are shared out to shards in their order, so many to each, before anything is read. A shard is made by one process,
from batches that lie within it, and appears whole or not at all; beside it appears a small file that says what is in
it. So an encoding that was killed goes on with the shards that are missing, and what it has made in the end is what it
would have made in one go, byte for byte, on the same kind of machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info

from lpl_lightning.agreement import autoencoder_fingerprint
from lpl_lightning.arguments import at_least, check_divides, check_sizes
from lpl_lightning.captions import Captions
from lpl_lightning.data.base import REPORT, ImageDataModule, Split
from lpl_lightning.data.latent_cache import FORMAT, MANIFEST
from lpl_lightning.data.latent_shards import UNFINISHED
from lpl_lightning.data.listing import some
from lpl_lightning.data.streams import StreamDataset
from lpl_lightning.encoder import Encoder, Task, Variants, said_of, tasks
from lpl_lightning.evaluation.report import write_whole
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.sweep import SweepingTrainer

__all__ = ["EncodingTrainer"]

Precision = Literal["float16", "bfloat16", "float32"]


class EncodingTrainer(SweepingTrainer):
    """Lightning's trainer, with ``encode``, ``sweep``, ``replay`` and ``profile`` beside its own commands."""

    def encode(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        out: str = "latents",
        splits: Sequence[Literal["train", "val", "test"]] = ("train", "val"),
        dtype: Precision = "float16",
        crops: int = 1,
        flips: bool | None = None,
        std: bool = True,
        text: bool = False,
        shard_size: int = 2048,
        seed: int = 0,
    ) -> Path:
        """Encode the data once, into a folder that ``LatentCacheDataModule`` trains from.

        Called again after it was stopped, it goes on with the shards that are missing. Images that cannot be read are
        left out and named in ``bad_data.jsonl`` of the folder, as the data module's ``on_error`` and
        ``max_bad_share`` say. Images per pass of the autoencoder, and loader processes, are those of the data module.

        Args:
            model: The model whose autoencoder, and conditioner, encode.
            datamodule: The data.
            out: Folder of the cache.
            splits: What is encoded.
            dtype: In what latents and embeddings are stored. The error is measured and said.
            crops: How often each training image is cropped, as the data module crops it, from a seed of its own.
            flips: Whether each crop of a training image is stored mirrored too. By default as the data module's
                ``horizontal_flip`` says.
            std: Whether the posterior's standard deviation is stored, so that training may draw from it.
            text: Whether the captions' embeddings are stored too.
            shard_size: Images in a shard.
            seed: Of the crops.

        Returns:
            The folder.

        Raises:
            ValueError: The data are not such that items can be asked for by position, the model does not fit, or the
                folder holds another cache.
            OSError: A shard cannot be written, as where the disk is full.
        """
        at_least(1, crops=crops, shard_size=shard_size)
        if getattr(self, "fast_dev_run", False) or isinstance(self.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError("`lpl encode` needs its files and this process: no `fast_dev_run`, no spawned strategy.")
        if dtype not in get_args(Precision):
            raise ValueError(f"`dtype` must be one of {', '.join(get_args(Precision))}, got {dtype!r}.")
        if not isinstance(model, LatentDiffusionModule) or not isinstance(datamodule, ImageDataModule):
            raise ValueError(
                "`lpl encode` needs a LatentDiffusionModule and an ImageDataModule, got "
                f"{type(model).__name__} and {type(datamodule).__name__}."
            )
        if not datamodule.has_images:
            raise ValueError(f"`data` must hold images, but {type(datamodule).__name__} holds latents already.")
        captions = model.conditioner if text and isinstance(model.conditioner, Captions) else None
        if text and captions is None:
            raise ValueError(f"`text`: the model goes by {type(model.conditioner).__name__}, not by Captions.")
        check_divides(datamodule.image_size, model.autoencoder.downscale)
        why = f"the autoencoder downscales by {model.autoencoder.downscale}"
        check_sizes(datamodule.image_sizes, model.autoencoder.downscale, why)
        folder = Path(out).expanduser().absolute()
        datamodule.faults.report = folder / REPORT
        if hasattr(datamodule, "verify"):
            datamodule.verify = False  # images are decoded once, here
        datamodule.prepare_data()
        sets: dict[Split, Any] = {split: datamodule.dataset(split) for split in dict.fromkeys(splits)}
        mirrored = bool(getattr(datamodule, "horizontal_flip", False)) if flips is None else flips
        if mirrored and any(not hasattr(items, "mirrored") for split, items in sets.items() if split == "train"):
            raise ValueError(f"`flips`: {type(datamodule).__name__} does not mirror images. Leave it out.")
        both = [0.0, 1.0] if mirrored else [0.0]
        per_batch = max(1, datamodule.batch_size // (crops * len(both)))
        # Images of a shard are of one size.
        buckets = {split: found for split in sets if (found := datamodule.assignment(split)) is not None}
        groups = {s: [m.tolist() for m in buckets[s].members] if s in buckets else [range(len(sets[s]))] for s in sets}
        todo = [task for split, own in groups.items() for task in tasks(split, own, shard_size, per_batch)]
        encoders = {
            "autoencoder": {
                "class": type(model.autoencoder.model).__name__,
                "fingerprint": autoencoder_fingerprint(model.autoencoder),
                "precision": str(model.autoencoder.dtype),
            },
            "text": None if captions is None else {"fingerprint": captions.embedding_key()},
        }
        settings = {
            "dtype": dtype,
            "crops": crops,
            "flips": mirrored,
            "std": std,
            "shard_size": shard_size,
            "batch_size": datamodule.batch_size,
            "seed": seed,
            "data": {split: _described(items) for split, items in sets.items()},
            "buckets": {split: found.sizes for split, found in buckets.items()},
        }
        begun = {
            "format": FORMAT,
            "finished": False,
            **encoders,
            "image_size": datamodule.image_size,
            "class_names": list(datamodule.class_names),
            "has_captions": datamodule.has_captions,
            "settings": settings,
            "versions": {name: version(name) for name in ("lpl-lightning", "torch", "diffusers", "pillow")},
        }
        _claim(folder, begun)
        variants = Variants(sets, buckets, datamodule.faults, crops, both, seed)
        stored: torch.dtype = getattr(torch, dtype)
        size, workers = datamodule.batch_size, datamodule.num_workers
        encoder = Encoder(model, captions, variants, todo, folder, stored, std, size, workers)
        # Bars alone: other callbacks are for models, and they and loggers write into folders of runs.
        trainer = cast(Any, self)
        trainer.loggers = []
        trainer.callbacks = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
        if encoder.missing():
            self.predict(encoder, return_predictions=False)
        if self.is_global_zero:
            _finish(folder, begun, todo)
        return folder


def _described(items: Any) -> dict[str, Any]:
    """What a set is: its class, how many images it has, a hash of their names, and what is done to them."""
    digest = blake2b(digest_size=16)
    if isinstance(items, StreamDataset):
        digest.update(items.described().encode())
    else:
        for index in range(len(items)):
            digest.update((items.key(index) if hasattr(items, "key") else str(index)).encode() + b"\0")
    return {
        "class": type(items).__name__,
        "images": len(items),
        "names": digest.hexdigest(),
        "preparation": items.preparation() if hasattr(items, "preparation") else None,
    }


def _claim(folder: Path, begun: dict[str, Any]) -> None:
    """Note what the cache will be, or see that it is what was begun."""
    path = folder / MANIFEST
    if not path.is_file():
        if folder.is_dir() and (others := sorted(entry.name for entry in folder.iterdir())):
            raise ValueError(
                f"`out` must be a new folder, or one that this command has begun, but {folder} holds {some(others)}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(begun, indent=1))
        return
    known, begun = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(begun))
    differ = [
        f"{key} {json.dumps(was.get(key))} there, {json.dumps(now.get(key))} here"
        for was, now in ((known, begun), (known.get("settings", {}), begun["settings"]))
        for key in now
        if key not in ("finished", "settings", "versions") and was.get(key) != now[key]
    ]
    if differ:
        raise ValueError(
            f"`out`: {folder} holds a cache that was begun with other settings ({'; '.join(differ)}). Give another "
            "folder, or delete it."
        )
    for left in folder.rglob(f"*{UNFINISHED}"):
        left.unlink(missing_ok=True)


def _finish(folder: Path, begun: Mapping[str, Any], todo: Sequence[Task]) -> None:
    """Write the manifest, with all shards."""
    shards: dict[str, list[dict[str, Any]]] = {}
    for split, file in dict.fromkeys((task.split, task.file) for task in todo):
        shards.setdefault(split, []).append(json.loads(said_of(folder / file).read_text(encoding="utf-8")))
    rounding = torch.tensor([shard.pop("rounding") for found in shards.values() for shard in found]).double()
    relative = float((rounding[:, 1].sum() / rounding[:, 2].sum().clamp(min=1e-30)).sqrt())
    error = {"largest": float(rounding[:, 0].max()), "relative": relative}
    kept = {split: [shard for shard in found if shard["items"]] for split, found in shards.items()}
    counts = {split: sum(shard["items"] for shard in found) for split, found in kept.items()}
    if empty := [split for split, count in counts.items() if not count]:
        raise ValueError(f"None of the {empty[0]} images can be read: {folder / REPORT} names them.")
    manifest = {**begun, "finished": True, "images": counts, "rounding_error": error, "shards": kept}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
    size = sum(shard["bytes"] for found in kept.values() for shard in found)
    said = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    rank_zero_info(
        f"Encoded {said} images into {folder}, {size / 1e6:,.1f} MB; {begun['settings']['dtype']} adds an error of "
        f"{relative:.1e} of the latents' size (root mean square), {error['largest']:.1e} at most."
    )
