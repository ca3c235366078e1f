"""``lpl encode``: autoencoder, and text encoders, run over the data once, into a cache of latents.

Items are shared out to shards in their order, so many to each, before anything is read. A shard is made by one process,
from batches that lie within it, and appears whole or not at all; beside it appears a small file that says what is in
it. So an encoding that was killed goes on with the shards that are missing, and what it has made in the end is what it
would have made in one go, byte for byte, on the same kind of machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lpl_lightning.agreement import autoencoder_fingerprint, rounded_fingerprints
from lpl_lightning.arguments import at_least, check_divides, check_sizes
from lpl_lightning.captions import Captions
from lpl_lightning.data.base import REPORT, ImageDataModule, Split
from lpl_lightning.data.batches import drawing
from lpl_lightning.data.faults import Faults, Unreadable, read_faults
from lpl_lightning.data.folder_dataset import ImageFolderDataset
from lpl_lightning.data.latent_cache import FORMAT, MANIFEST
from lpl_lightning.data.latent_shards import UNFINISHED
from lpl_lightning.data.listing import some
from lpl_lightning.data.sources import SourceDataModule
from lpl_lightning.data.streams import StreamDataset
from lpl_lightning.encoding_tasks import Task, Variants, said_of, tasks
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

        Called again after it was stopped, it goes on with the shards that are missing; called with more ``splits``, it
        adds them. Images that cannot be read are left out and named in ``bad_data.jsonl`` of the folder, as the data
        module's ``on_error`` and ``max_bad_share`` say. Images per pass of the autoencoder, and loader processes, are
        those of the data module.

        Args:
            model: The model whose autoencoder, and conditioner, encode.
            datamodule: The data.
            out: Folder of the cache.
            splits: What is encoded.
            dtype: In what latents and embeddings are stored. The error is measured and said.
            crops: How often each training image is cropped, as the data module crops it, from a seed of its own. More
                than one needs a data module that draws crops.
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
        if isinstance(splits, str) or not splits or not {*splits} <= {*get_args(Split)}:
            raise ValueError(f"`splits` must be a list of one or more of {', '.join(get_args(Split))}, got {splits!r}.")
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
        _check_out(folder)
        datamodule.faults.report = folder / REPORT
        if hasattr(datamodule, "verify"):
            datamodule.verify = False  # images are decoded once, here
        if isinstance(datamodule, SourceDataModule):
            datamodule.count_all()
        datamodule.prepare_data()
        sets: dict[Split, Any] = {split: datamodule.dataset(split) for split in dict.fromkeys(splits)}
        if crops > 1 and "train" in sets and _prepared(sets["train"]).get("crop") == "center":
            raise ValueError(
                f"`crops`={crops}: the data crop in the centre, so that all would be the same. Set `crop` of the data "
                "to random, or leave `crops` out."
            )
        by_default = getattr(datamodule, "horizontal_flip", False) or ("train" in sets and _mirrors(sets["train"]))
        mirrored = bool(by_default) if flips is None else flips
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
            "autoencoder_rounded": rounded_fingerprints(model.autoencoder),
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
        from lpl_lightning.encoder import Encoder  # at the top, it would be offered as a model to train

        encoder = Encoder(model, captions, variants, todo, folder, stored, std, size, workers)
        # Bars alone: other callbacks are for models, and they and loggers write into folders of runs.
        trainer = cast(Any, self)
        trainer.loggers = []
        trainer.callbacks = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
        trainer.limit_predict_batches = 1.0  # a config may limit what it predicts
        if encoder.missing():
            self.predict(encoder, return_predictions=False)
        if self.is_global_zero:
            _finish(folder, begun, todo, datamodule.faults)
        return folder


def _described(items: Any) -> dict[str, Any]:
    """What a set is: its class, how many images it has, hashes of names and contents, and what is done to them."""
    names, contents = blake2b(digest_size=16), blake2b(digest_size=16)
    if isinstance(items, StreamDataset):
        names.update(items.described().encode())
    else:
        for index in range(len(items)):
            key = items.key(index) if hasattr(items, "key") else str(index)
            names.update(key.encode(errors="surrogateescape") + b"\0")  # not all names of files are UTF-8
    for said in _contents(items):
        contents.update(repr(said).encode() + b"\0")
    return {
        "class": type(items).__name__,
        "images": len(items),
        "names": names.hexdigest(),
        "contents": contents.hexdigest(),
        "preparation": _prepared(items) or None,
    }


def _contents(items: Any) -> Iterator[object]:
    """What tells images and captions from others of the same names, without reading all of them.

    Keys of tables do so themselves, and what others draw may be different each time.
    """
    if isinstance(items, ImageFolderDataset):
        for index, (path, label) in enumerate(items.files):
            yield os.path.getsize(path), label, tuple(items.captions_of(index))
    elif isinstance(items, StreamDataset):
        items = items.mirrored(0.0)  # a copy: a stream's own place stays where it is
        try:
            with drawing(0, 0):
                item = items.item(0)  # others would have to be read up to
            yield blake2b(item["image"].numpy().tobytes()).digest(), item.get("label"), tuple(items.captions_of(0))
        except Unreadable as fault:
            yield str(fault)


def _prepared(items: Any) -> dict[str, Any]:
    """What is done to images besides the size that they are brought to, where a set says."""
    return dict(items.preparation()) if hasattr(items, "preparation") else {}


def _mirrors(items: Any) -> bool:
    """Whether a set mirrors some of its images."""
    transform = getattr(getattr(items, "prepare", items), "transform", None)
    return bool(getattr(getattr(transform, "covering", transform), "flip_probability", 0.0))


def _check_out(folder: Path) -> None:
    """Refuse a folder that holds something else, before what is bad of the data is written down in it."""
    try:
        found = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
        # What another process is writing is no stranger, nor what was found bad before anything was encoded.
        others = sorted(name for name in found if not name.startswith((MANIFEST, REPORT)))
        if MANIFEST not in found and others and not (folder / MANIFEST).is_file():
            raise ValueError(
                f"`out` must be a new folder, or one that this command has begun, but {folder} holds {some(others)}."
            )
    except OSError as error:
        raise _no_folder(folder, error) from error


def _no_folder(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"`out`: {folder} cannot be a folder to write into ({error}). Give another.")


def _claim(folder: Path, begun: dict[str, Any]) -> None:
    """Note what the cache will be, or see that it is what was begun; each process does, before any writes a shard."""
    path = folder / MANIFEST
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(begun, indent=1))
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        splits = list(known["settings"]["data"])
        was, now = (_flat(_settled(manifest, splits)) for manifest in (known, json.loads(json.dumps(begun))))
    except OSError as error:
        raise _no_folder(folder, error) from error
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`out`: {path} is damaged, or is no manifest of a latent cache ({error!r}). Give another folder, or "
            "delete this one."
        ) from error
    if gone := [split for split in splits if split not in begun["settings"]["data"]]:
        raise ValueError(
            f"`splits` must name all that {folder} holds, {', '.join(gone)} too, or `out` must be another folder."
        )
    differ = [
        f"{key} {json.dumps(was.get(key))} there, {json.dumps(now.get(key))} here"
        for key in dict.fromkeys([*was, *now])
        if was.get(key) != now.get(key)
    ]
    if differ:
        raise ValueError(
            f"`out`: {folder} holds a cache that was begun with other settings ({'; '.join(differ)}). Give another "
            "folder, or delete it."
        )
    for left in folder.glob(f"*/*{UNFINISHED}"):
        left.unlink(missing_ok=True)


def _settled(manifest: Mapping[str, Any], splits: Sequence[str]) -> dict[str, Any]:
    """What must not change while a cache is made: what it was begun with, of the splits that it was begun with."""
    settings = dict(manifest["settings"])
    for name in ("data", "buckets"):
        settings[name] = {split: said for split, said in settings[name].items() if split in splits}
    names = ("format", "autoencoder", "text", "image_size", "class_names", "has_captions")
    return {**{name: manifest.get(name) for name in names}, **settings}


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What differs is named by where it stands."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _finish(folder: Path, begun: Mapping[str, Any], todo: Sequence[Task], faults: Faults) -> None:
    """Write the manifest, with all shards, unless too many images were left out."""
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
    total = sum(len(task.indices) for task in todo)
    if lost := total - sum(counts.values()):
        faults.check_share(lost, total, read_faults(folder / REPORT))
        rank_zero_warn(f"Left out {lost} of {total} images that cannot be read: {folder / REPORT} names them.")
    manifest = {**begun, "finished": True, "images": counts, "rounding_error": error, "shards": kept}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
    size = sum(shard["bytes"] for found in kept.values() for shard in found)
    said = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    rank_zero_info(
        f"Encoded {said} images into {folder}, {size / 1e6:,.1f} MB; {begun['settings']['dtype']} adds an error of "
        f"{relative:.1e} of the latents' size (root mean square), {error['largest']:.1e} at most."
    )
