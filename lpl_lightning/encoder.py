"""Encoding the items of a data set, batch by batch, into shards of latents."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lpl_lightning.captions import Captions
from lpl_lightning.data.latent_shards import MOST_BYTES, shard_hash, write_shard
from lpl_lightning.data.listing import some
from lpl_lightning.encoding_tasks import Task, Variants, is_whole, said_of
from lpl_lightning.evaluation.report import write_whole
from lpl_lightning.module import LatentDiffusionModule

__all__ = ["Encoder"]


class Encoder(pl.LightningModule):
    """Encodes the batches of tasks and writes shards."""

    def __init__(
        self,
        module: LatentDiffusionModule,
        text: Captions | None,
        variants: Variants,
        tasks: Sequence[Task],
        out: Path,
        dtype: torch.dtype,
        std: bool,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards may be left than processes
        self.autoencoder, self.text = module.autoencoder, text
        self.variants, self.tasks, self.out, self.dtype_stored, self.std = variants, tasks, out, dtype, std
        self.chunk, self.num_workers = batch_size, num_workers
        self._in_shard = Counter[str]()
        for task in tasks:
            self._in_shard[task.file] += len(task.indices)
        self._parts: list[dict[str, Any]] = []

    def missing(self) -> list[str]:
        """The shards that are not there yet."""
        return [file for file in dict.fromkeys(task.file for task in self.tasks) if not is_whole(self.out / file)]

    def predict_dataloader(self) -> Any:
        """This process's share of the shards that are not there yet."""
        missing = self.missing()
        self.trainer.strategy.barrier()  # all have seen the same before any writes
        own = set(missing[self.trainer.global_rank :: self.trainer.world_size])
        return _Batches(self.variants, [task for task in self.tasks if task.file in own], self.num_workers)

    @torch.no_grad()
    def predict_step(self, loaded: _Loaded, batch_idx: int) -> Tensor:
        """Encode a batch and, after the last of a shard, write it; gives the number of its items."""
        batch = loaded.batch
        task: Task = batch["task"]
        if batch["items"]:
            self._parts.append({**self._encoded(batch), "items": batch["items"]})
            if len(self._parts) == 1:
                self._check_size(task.file)
        if task.is_last:
            self._write(task.file)
            self._parts = []
        return torch.tensor(len(batch["items"]))

    def on_predict_end(self) -> None:
        """Wait until all processes have written theirs."""
        self.trainer.strategy.barrier()

    def _encoded(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images: Tensor = batch["image"]  # (N, V, 3, H, W)
        means, deviations = [], []
        for part in images.flatten(0, 1).split(self.chunk):
            mean, deviation = self.autoencoder.posterior(part.to(self.device))
            means.append(mean.float().cpu())
            deviations.append(None if deviation is None or not self.std else deviation.float().cpu())
        found = {"latent": torch.cat(means)}
        kept = [deviation for deviation in deviations if deviation is not None]
        if kept:
            found["latent_std"] = torch.cat(kept)
        keys = [item["key"] for item in batch["items"]]
        stored = {name: self._rounded(x, name, keys).unflatten(0, images.shape[:2]) for name, x in found.items()}
        error = stored["latent"].flatten(0, 1).double() - found["latent"].double()
        # Largest error, and sums of squared errors and of squares.
        stored["_rounding"] = torch.stack(
            [error.abs().max(), error.square().sum(), found["latent"].double().square().sum()]
        )[None]
        for name in ("original_size", "crop_top_left", "label"):
            if name in batch:
                stored[name] = batch[name].cpu()
        stored["target_size"] = torch.tensor(images.shape[-2:]).expand(len(images), 2)
        if self.text is not None:
            stored |= self._texts([item["captions"] for item in batch["items"]], keys)
        return stored

    def _check_size(self, file: str) -> None:
        """Refuse shards that would be too large, by the first batch of one, before it is encoded to its end."""
        (part,) = self._parts
        tensors = [value for name, value in part.items() if name != "items" and not name.startswith("_")]
        each = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / len(part["items"])
        if (wanted := each * self._in_shard[file]) > MOST_BYTES:
            raise ValueError(
                f"`shard_size`: {file} would hold {self._in_shard[file]:,} images of {each / 2**20:.4g} MiB each, "
                f"{wanted / 2**30:.1f} GiB, but a shard, which lies in memory until it is written, must stay below "
                f"{MOST_BYTES / 2**30:.0f} GiB. Give {max(1, int(MOST_BYTES / each))} or fewer, and another `out`, or "
                f"delete {self.out}."
            )

    def _rounded(self, tensor: Tensor, name: str, keys: Sequence[str]) -> Tensor:
        """Numbers as they are stored."""
        rounded = tensor.to(self.dtype_stored)
        if not rounded.isfinite().all():
            largest = tensor.abs().max()
            raise ValueError(
                f"What is made of {some(keys)} does not fit {self.dtype_stored}: the largest number of `{name}` is "
                f"{largest:.4g}. Set `dtype` to bfloat16 or float32, or see whether the model gives numbers at all."
            )
        return rounded

    def _texts(self, captions: Sequence[Sequence[str]], keys: Sequence[str]) -> dict[str, Tensor]:
        assert self.text is not None
        flat = [text for texts in captions for text in (texts or [""])]
        parts = [vars(self.text.encode(flat[at : at + self.chunk])) for at in range(0, len(flat), self.chunk)]
        found = {"_captions": torch.tensor([max(1, len(texts)) for texts in captions])}
        for name in ("tokens", "mask", "pooled"):
            tensors = [part[name].cpu() for part in parts if part[name] is not None]
            if tensors:
                kept, name = torch.cat(tensors), f"text_{name}"
                found[name] = self._rounded(kept, name, keys) if kept.is_floating_point() else kept
        return found

    def _write(self, file: str) -> None:
        path = self.out / file
        tensors = {}
        if self._parts:
            names = [name for name in self._parts[0] if name != "items"]
            tensors = {name: torch.cat([part[name] for part in self._parts]) for name in names}
        items = [item for part in self._parts for item in part["items"]]
        rounding = tensors.pop("_rounding", torch.zeros(1, 3, dtype=torch.float64))
        if "_captions" in tensors:
            tensors["caption_start"] = torch.cat([torch.zeros(1, dtype=torch.long), tensors.pop("_captions").cumsum(0)])
        said: dict[str, Any] = {"file": file, "items": len(items)}
        try:
            if items:
                write_shard(path, tensors, items)
                said |= {"bytes": path.stat().st_size, "hash": shard_hash(path)}
                said |= {"size": tensors["target_size"][0].tolist(), "latent": list(tensors["latent"].shape[2:])}
            rounded = [float(rounding[:, 0].max()), *rounding[:, 1:].sum(0).tolist()]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(said_of(path), json.dumps({**said, "rounding": rounded}))
        except OSError as error:
            raise OSError(
                f"`out`: {path} cannot be written ({error}). The shards that are finished stay: make room, and call "
                "the same command again."
            ) from error


class _Batches:
    """Loads tasks; no ``DataLoader`` itself, which Lightning would build anew in its own way for predictions."""

    def __init__(self, variants: Variants, tasks: Sequence[Task], num_workers: int) -> None:
        self.variants, self.tasks, self.num_workers = variants, tasks, num_workers

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Any]:
        sampler: Any = self.tasks
        generator = torch.Generator()  # seeds of workers are drawn from it
        options: dict[str, Any] = {"sampler": sampler, "num_workers": self.num_workers, "generator": generator}
        return iter(DataLoader(self.variants, batch_size=None, collate_fn=cast(Any, _Loaded), **options))


class _Loaded:
    """A batch as it was read: Lightning does not look in here, and so rounds nothing to ``trainer.precision``."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch
