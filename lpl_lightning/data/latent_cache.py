"""Training from latents that were encoded before, by ``lpl encode``: images are read, resized and encoded once.

A cache is a folder of ``manifest.json``, which says what made it and lists its shards, and of the shards
(``latent_shards``). Batches hold, in place of ``image``,

- ``latent`` (B, C, h, w), mean of the autoencoder's scaled latents, and ``latent_std``, where the posterior has a width
  and it was stored, both in the type stored: ``LatentDiffusionModule`` draws from the two in float32, anew each time;
- ``text``, embeddings of the captions, where they were encoded too, in place of ``caption``;
- ``label``, ``original_size``, ``crop_top_left`` and ``target_size`` as images have them.

The Latent Perceptual Loss needs no images: it compares what the decoder makes of clean latents and of their estimates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lpl_lightning.data.base import STAGE_SPLITS, ImageDataModule, Split
from lpl_lightning.data.batches import EpochPlan, Request
from lpl_lightning.data.bucketed import BucketedPlan, bucketed_loader, described
from lpl_lightning.data.buckets import Assignment
from lpl_lightning.data.faults import Faults, OnError
from lpl_lightning.data.latent_shards import LatentShard, shard_hash
from lpl_lightning.data.listing import some
from lpl_lightning.draws import mixed
from lpl_lightning.file_names import inside

__all__ = ["FORMAT", "MANIFEST", "CachedLatents", "LatentCacheDataModule", "read_manifest"]

MANIFEST = "manifest.json"
FORMAT = "lpl_lightning latent cache 1"

_KEPT = ("image_size", "class_names", "has_captions", "autoencoder", "text", "shards")
_BY_VARIANT = ("latent", "latent_std", "original_size", "crop_top_left")
_BY_ITEM = ("label", "target_size")
_TEXT = "text_"

Numbers = npt.NDArray[np.int64]


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest of a cache.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is something else, or the encoding was not finished.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"`root` must be a folder that `lpl encode --out {root}` has written, but {path} does not exist."
        )
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its `format` is {found['format']!r}")
        is_whole = bool(found["finished"])
        if is_whole and (lacking := [key for key in _KEPT if key not in found]):
            raise ValueError(f"it has no {', '.join(lacking)}")
        for shard in (one for shards in found["shards"].values() for one in shards) if is_whole else ():
            inside(root, shard["file"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of a latent cache as this version writes it: {error}.") from error
    if not is_whole:
        raise ValueError(f"{root} is not finished: call the `lpl encode` that began it again, and it goes on.")
    return found


class CachedLatents(Dataset[dict[str, Any]]):
    """Items of shards, in their order.

    As an item, each is its first variant with its first caption. In training batches, a variant (crop, mirrored or
    not) and a caption are drawn each time.

    Args:
        paths: The shards.
        counts: How many items each has.
        assignment: Which size the image of each item has, where there are several.
    """

    runs_in_thread = True

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], assignment: Assignment | None = None) -> None:
        self.paths, self.assignment = list(paths), assignment
        self.starts = np.cumsum([0, *counts])
        self._shards: dict[int, LatentShard] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": {}}  # a process maps files into its own memory

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        none = np.zeros(1, dtype=np.uint64)
        batch = self._taken(np.array([index]), none, none)
        return {key: {n: t[0] for n, t in v.items()} if isinstance(v, dict) else v[0] for key, v in batch.items()}

    def batch(self, request: Request) -> dict[str, Any]:
        """A training batch."""
        indices = np.asarray(request.indices, dtype=np.int64)
        drawn = (mixed(request.seed, request.epoch, indices, stream) for stream in (0, 1))
        return self._taken(indices, *drawn)

    def captions(self, index: int) -> list[str]:
        """Captions of an item."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        found: list[str] = self.shard(number).item(index - int(self.starts[number]))["captions"]
        return found

    def shard(self, number: int) -> LatentShard:
        """A shard, mapped when it is first asked for."""
        if number not in self._shards:
            self._shards[number] = LatentShard(self.paths[number])
        return self._shards[number]

    def _taken(
        self, indices: Numbers, variant: npt.NDArray[np.uint64], caption: npt.NDArray[np.uint64]
    ) -> dict[str, Any]:
        """Items by position; of V variants and K captions those that the numbers modulo V and K say."""
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        edges = [0, *(np.flatnonzero(np.diff(numbers[order])) + 1).tolist(), len(order)]
        parts: dict[str, list[Tensor]] = {}
        captions: dict[int, str] = {}
        for first, last in pairwise(edges):
            own = order[first:last]
            shard = self.shard(int(numbers[own[0]]))
            rows = indices[own] - self.starts[numbers[own[0]]]
            for name, rows_of in _rows(shard, rows, variant[own], caption[own]):
                parts.setdefault(name, []).append(rows_of)
            if f"{_TEXT}tokens" not in parts and f"{_TEXT}pooled" not in parts:
                for place, row in zip(own.tolist(), rows.tolist(), strict=True):
                    if texts := shard.item(row)["captions"]:
                        captions[place] = texts[int(caption[place] % np.uint64(len(texts)))]
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        tensors = {name: torch.cat(found).index_select(0, back) for name, found in parts.items()}
        batch: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TEXT)}
        text = {name.removeprefix(_TEXT): tensor for name, tensor in tensors.items() if name.startswith(_TEXT)}
        if text:
            batch["text"] = text
        elif captions:
            batch["caption"] = [captions[place] for place in range(len(indices))]
        return batch


def _rows(
    shard: LatentShard, rows: Numbers, variant: npt.NDArray[np.uint64], caption: npt.NDArray[np.uint64]
) -> Iterator[tuple[str, Tensor]]:
    """What a shard's tensors hold of some of its items."""
    items = torch.from_numpy(rows)
    variants = shard.tensors["latent"].shape[1]
    chosen = torch.from_numpy(rows * variants + (variant % np.uint64(variants)).astype(np.int64))
    for name, tensor in shard.tensors.items():
        if name in _BY_VARIANT:
            yield name, tensor.flatten(0, 1).index_select(0, chosen)
        elif name in _BY_ITEM:
            yield name, tensor.index_select(0, items)
    starts = shard.tensors.get("caption_start")
    if starts is not None:
        first, last = (starts[items + step].numpy() for step in (0, 1))
        which = torch.from_numpy(first + (caption % (last - first).astype(np.uint64)).astype(np.int64))
        for name, tensor in shard.tensors.items():
            if name.startswith(_TEXT):
                yield name, tensor.index_select(0, which)


class LatentCacheDataModule(ImageDataModule):
    """Latents from a folder that ``lpl encode`` has written.

    Args:
        root: The folder.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 loads in the training process, which suffices for latents of 32 x 32.
        verify: Read all shards once before the first step and compare their hashes with the manifest's. Otherwise their
            sizes are looked at.
        on_error: What becomes of shards that are missing, cut off or, with ``verify``, changed: ``skip`` leaves their
            images out, with a warning; ``raise`` ends the run.
        max_bad_share: Share of images, in [0, 1], that lie in such shards above which the run ends all the same.
        report: File that names these shards, a JSON object a line; by default ``bad_data.jsonl`` in the run's folder.
        num_generate: How many images ``lpl predict`` generates.
        generate_seed: Generated image ``i`` is drawn from seed ``generate_seed + i``.
        prompts: Text file of the captions that ``lpl predict`` goes round, one a line; None takes those of the
            validation images.

    Raises:
        FileNotFoundError: There is no cache.
        ValueError: It is none, or not finished.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 32,
        num_workers: int = 0,
        verify: bool = False,
        on_error: OnError = "raise",
        max_bad_share: float = 0.1,
        report: str | Path | None = None,
        num_generate: int = 64,
        generate_seed: int = 0,
        prompts: str | Path | None = None,
    ) -> None:
        self.root = Path(root).expanduser().absolute()
        self.manifest = read_manifest(self.root)
        faults = Faults(on_error, max_bad_share, None if report is None else Path(report).expanduser().absolute())
        size = int(self.manifest["image_size"])
        super().__init__(size, batch_size, num_workers, num_generate, generate_seed, prompts, faults)
        self.verify = verify
        self._datasets: dict[Split, CachedLatents] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of the images that were encoded."""
        return tuple(self.manifest["class_names"])

    @property
    def has_captions(self) -> bool:
        """Whether the images had captions."""
        return bool(self.manifest["has_captions"])

    @property
    def has_images(self) -> bool:
        """False: batches hold latents."""
        return False

    @property
    def encoded_by(self) -> Mapping[str, str | None]:
        """Fingerprints of the ``autoencoder`` and, or None, of the ``text`` encoders, which the model's must equal."""
        return {part: self.manifest[part]["fingerprint"] if self.manifest[part] else None for part in _ENCODERS}

    @property
    def encoded_by_rounded(self) -> Sequence[str]:
        """Fingerprints of the autoencoder that encoded with its weights in lower precisions; they are its own too."""
        return tuple(self.manifest.get("autoencoder_rounded", ()))

    def validation_captions(self) -> Iterator[str]:
        """The first caption of each validation image, in order."""
        if self.has_captions:
            dataset = self.dataset("val")
            yield from (dataset.captions(index)[0] for index in range(len(dataset)))

    def setup(self, stage: str | None = None) -> None:
        """Look at the shards that a stage needs.

        Raises:
            ValueError: Shards are missing or damaged, and are not to be skipped, or are too many.
        """
        self._write_faults_into_run()
        for split in STAGE_SPLITS.get(stage, ("train", "val", "test")):
            # A run that does not validate needs no images for it.
            if split != "val" or stage != "fit" or getattr(self.trainer, "limit_val_batches", True):
                self.dataset(split)

    def dataset(self, split: Split) -> CachedLatents:
        """The latents of one split; those of validation for tests, where none were encoded for them."""
        shards: Mapping[str, list[dict[str, Any]]] = self.manifest["shards"]
        source: Split = "val" if split == "test" and "test" not in shards else split
        if source not in shards:
            raise ValueError(
                f"{self.root} holds no {source} images, only {some(shards)}: add them by `lpl encode --splits`."
            )
        if source not in self._datasets:
            self._datasets[source] = self._opened(shards[source])
        return self._datasets[source]

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of all images that were encoded."""
        shards = [shard for found in self.manifest["shards"].values() for shard in found]
        sizes = {(int(height), int(width)) for height, width in (shard.get("size", ()) for shard in shards)}
        return tuple(sorted(sizes)) or super().image_sizes

    def training_batches(self, batch_size: int) -> tuple[Dataset[dict[str, Any]], EpochPlan]:
        """The training latents, and which make the batches of an epoch: of one size each."""
        dataset = self.dataset("train")
        if dataset.assignment is None:
            return super().training_batches(batch_size)
        plan = BucketedPlan(dataset.assignment, batch_size)
        if not len(plan):
            raise ValueError(
                f"No size of {self.root} has {batch_size} images, a batch of all processes: lower `batch_size`, or "
                "encode with fewer buckets."
            )
        if plan.never:
            # Images would have been cropped to a size with more; latents have the size that they were encoded at.
            rank_zero_warn(
                f"{plan.never} of {len(dataset)} images of {self.root} are never trained on: of their sizes there are "
                f"fewer than {batch_size}, a batch of all processes. Lower `batch_size`, or encode anew with "
                f"`--data.batch_size {batch_size}`, which crops them to sizes that fill a batch."
            )
        rank_zero_info(described(plan))
        return dataset, plan

    def _eval_loader(self, split: Split) -> DataLoader[dict[str, Any]]:
        dataset = self.dataset(split)
        if dataset.assignment is None:
            return super()._eval_loader(split)
        return bucketed_loader(dataset, dataset.assignment, self.batch_size, self.num_workers)

    def _opened(self, shards: Sequence[Mapping[str, Any]]) -> CachedLatents:
        if self.verify:
            rank_zero_info(f"Reading {len(shards):,} shards once to verify them; `verify: false` skips this.")
        bad = {shard["file"]: why for shard in shards if (why := self._fault(shard))}
        total, lost = (sum(s["items"] for s in shards if s["file"] in bad or every) for every in (True, False))
        if bad:
            reasons = some(f"{self.root / name} ({why})" for name, why in bad.items())
            if self.faults.on_error == "raise":
                raise ValueError(
                    f"{len(bad)} of {len(shards)} shards cannot be used: {reasons}. Delete them and call `lpl encode` "
                    "again, which makes what is missing, or set `on_error` to skip their images."
                )
            self._write_faults(bad)
            self.faults.check_share(lost, total, bad)
            rank_zero_warn(f"Left out {lost} of {total} images, in {len(bad)} shards that cannot be used: {reasons}.")
        kept = [shard for shard in shards if shard["file"] not in bad]
        # In the order in which they were encoded, so that batches are those of the images.
        sizes = list(dict.fromkeys(tuple(shard["size"]) for shard in kept if "size" in shard))
        assignment = None
        if len(sizes) > 1:
            of_shards = [sizes.index(tuple(shard["size"])) for shard in kept]
            assignment = Assignment(tuple(sizes), np.repeat(of_shards, [shard["items"] for shard in kept]))
        paths, counts = [self.root / shard["file"] for shard in kept], [shard["items"] for shard in kept]
        return CachedLatents(paths, counts, assignment)

    def _fault(self, shard: Mapping[str, Any]) -> str | None:
        path = self.root / shard["file"]
        if not path.is_file():
            return "it does not exist"
        if (size := path.stat().st_size) != shard["bytes"]:
            return f"it has {size} bytes, not {shard['bytes']}"
        if self.verify and shard_hash(path) != shard["hash"]:
            return "its content is not what was written"
        return None


_ENCODERS = ("autoencoder", "text")
