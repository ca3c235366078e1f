"""Shards of latents: what the autoencoder, and text encoders, made of images, read without being unpacked.

A shard is a tar file of two members, which is never compressed, so that what lies in it can be mapped into memory:

``tensors.safetensors`` of N items, each in V variants (crops, mirrored or not)

- ``latent`` (N, V, C, h, w), the mean of the autoencoder's latents, scaled as ``Autoencoder.encode`` gives them, in
  float16, bfloat16 or float32; ``latent_std`` of the same shape, the standard deviation, where the posterior has one;
- ``label`` (N,) int64, where there are classes;
- ``original_size``, ``crop_top_left`` (N, V, 2) and ``target_size`` (N, 2) int64, height or top first, where known;
- ``text_tokens`` (M, L, D), ``text_mask`` (M, L), ``text_pooled`` (M, P) of all captions of all items, where they were
  encoded too; ``caption_start`` (N + 1,), those of item i being ``caption_start[i]`` to ``caption_start[i + 1]``;
- ``line_start`` (N + 1,), where each item's line in the other member begins, in bytes.

``items.jsonl`` has one line an item: ``{"key": "cat/1.jpg", "captions": ["a cat"]}``.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save
from torch import Tensor

from lpl_lightning.data.listing import as_line

__all__ = ["MOST_BYTES", "UNFINISHED", "LatentShard", "ShardItem", "shard_hash", "write_shard"]

TENSORS, ITEMS = "tensors.safetensors", "items.jsonl"
MOST_BYTES = 2**33 - 1
"""Of a member whose size a plain tar header holds, in eleven octal digits."""
UNFINISHED = ".unfinished"
"""End of the name of a file that is being written."""

ShardItem = dict[str, Any]
"""``key`` and ``captions`` of an item."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def write_shard(path: Path, tensors: Mapping[str, Tensor], items: Sequence[ShardItem]) -> None:
    """Write a shard, which appears whole or not at all, with the same bytes whenever it is written.

    Args:
        path: Where to; its folder is made if need be.
        tensors: As the module says, but for ``line_start``, which is added.
        items: Of each item.

    Raises:
        OSError: It cannot be written.
    """
    lines = [as_line(item) for item in items]
    starts = torch.tensor([0, *map(len, lines)]).cumsum(0)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid4().hex}{UNFINISHED}")
    try:
        members = {TENSORS: save({**kept, "line_start": starts}), ITEMS: b"".join(lines)}
        # GNU's headers hold any size, and are read by the same programs.
        is_plain = max(map(len, members.values())) <= MOST_BYTES
        layout = tarfile.USTAR_FORMAT if is_plain else tarfile.GNU_FORMAT
        with part.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=layout) as tar:
                for name, content in members.items():
                    member = tarfile.TarInfo(name)  # without times or owners: the same bytes each time
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with suppress(OSError):  # it is there only where something failed
            part.unlink()


def shard_hash(path: Path) -> str:
    """A blake2b hash of a file."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


class LatentShard:
    """A shard, mapped into memory: what is looked at is read from the file, and no file stays open.

    Args:
        path: The file.

    Attributes:
        tensors: As the module says.

    Raises:
        ValueError: It is no shard, is cut off, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            with tarfile.open(path, "r:") as tar:
                places = {member.name: (member.offset_data, member.size) for member in tar}
            if max(map(sum, places.values()), default=size + 1) > size:
                raise ValueError("it is cut off")
            # Private: what is written to a tensor does not reach the file.
            storage: Any = torch.UntypedStorage.from_file(str(path), False, size)
            self._bytes = torch.empty(0, dtype=torch.uint8).set_(storage)
            start, self._lines_at = places[TENSORS][0], places[ITEMS][0]
            data = start + 8 + int.from_bytes(self._read(start, start + 8), "little")
            header: dict[str, Any] = json.loads(self._read(start + 8, data))
            self.tensors = {name: self._tensor(data, about) for name, about in header.items()}
            self._line_start = self.tensors["line_start"]
        except (OSError, tarfile.TarError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is no shard of latents, or is damaged: {error}.") from error

    def _read(self, first: int, last: int) -> bytes:
        return bytes(self._bytes[first:last].numpy())

    def _tensor(self, data: int, about: Mapping[str, Any]) -> Tensor:
        dtype = _DTYPES[about["dtype"]]
        first, last = (data + offset for offset in about["data_offsets"])
        return self._bytes[first:last].view(dtype).view(tuple(about["shape"]))

    def __len__(self) -> int:
        return len(self._line_start) - 1

    def item(self, index: int) -> ShardItem:
        """``key`` and ``captions`` of an item."""
        first, last = (self._lines_at + int(self._line_start[at]) for at in (index, index + 1))
        found: ShardItem = json.loads(self._read(first, last))
        return found
