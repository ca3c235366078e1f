"""What measures keep of the real images, from one evaluation to the next.

A file holds the state of one measure of one set of images, and is found by both: by a key of the set
(``ImageFiles.quick_key``) and by the measure's provenance, which says all that the state depends on besides the images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import Tensor

from lpl_lightning.metrics.tensor_files import read_tensors, write_tensors

__all__ = ["Cached", "ReferenceCache", "default_folder"]

_FORMAT = "lpl_lightning reference cache 2"
"""Part of a file's name: states whose meaning has changed since are not found."""


def default_folder() -> Path:
    """Where states are kept unless one says where: ``lpl_lightning/references`` in the user's folder for caches."""
    # The XDG base directory specification: a relative path is to be ignored.
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (told if told.is_absolute() else Path.home() / ".cache") / "lpl_lightning" / "references"


@dataclass(frozen=True, eq=False)
class Cached:
    """What was stored.

    Attributes:
        tensors: The state of the measure, on the CPU.
        images: What was said of the images.
    """

    tensors: dict[str, Tensor]
    images: dict[str, Any]


class ReferenceCache:
    """States of measures in a folder, one safetensors file each. It may be deleted at any time.

    Several processes may use one folder: a file appears whole or not at all. What cannot be read or written is warned
    of, and costs the time to make it anew.

    Args:
        folder: The folder, made when it is needed; None keeps nothing. ``default_folder`` says where it usually is.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser().absolute()

    def find(self, images_key: str, provenance: Mapping[str, Any]) -> Cached | None:
        """Look a state up.

        Args:
            images_key: Key of the set of images.
            provenance: What the state depends on besides them, as JSON holds it.

        Returns:
            What was stored under both; None where nothing was, or where it was damaged since, which is warned of.
        """
        path = self.path(images_key, provenance)
        if path is None or not path.is_file():
            return None
        try:
            metadata, tensors = read_tensors(path)
            if metadata.get("format") != _FORMAT or metadata.get("of") != _said(images_key, provenance):
                raise ValueError("it is of other images or settings than its name says")
            if metadata["hash"] != _hash(tensors, metadata["images"]):
                raise ValueError("its values are not those that were stored")
            return Cached(tensors, json.loads(metadata["images"]))
        except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
            rank_zero_warn(f"{path} is damaged ({error}): what it held is computed anew.")
            return None

    def store(
        self,
        images_key: str,
        provenance: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        images: Mapping[str, Any],
    ) -> None:
        """Keep a state, in the place of an older one.

        Args:
            images_key: Key of the set of images.
            provenance: What the state depends on besides them, as JSON holds it.
            tensors: The state; any shapes and dtypes.
            images: What ``find`` shall say of the images, as JSON holds it, such as their number and hash.
        """
        path = self.path(images_key, provenance)
        if path is None:
            return
        about = json.dumps(dict(images), sort_keys=True)
        metadata = {
            "format": _FORMAT,
            "of": _said(images_key, provenance),
            "images": about,
            "hash": _hash(tensors, about),
        }
        try:
            write_tensors(path, tensors, metadata)
        except (SafetensorError, OSError) as error:
            rank_zero_warn(f"{path} cannot be written ({error}): the next evaluation computes its values anew.")

    def path(self, images_key: str, provenance: Mapping[str, Any]) -> Path | None:
        """Where a state is kept; None where nothing is."""
        if self.folder is None:
            return None
        name = blake2b(_said(images_key, provenance).encode(), digest_size=16).hexdigest()
        return self.folder / f"{name}.safetensors"


def _said(images_key: str, provenance: Mapping[str, Any]) -> str:
    return json.dumps({"format": _FORMAT, "images": images_key, "provenance": dict(provenance)}, sort_keys=True)


def _hash(tensors: Mapping[str, Tensor], about: str) -> str:
    """A blake2b hash of tensors, their names, dtypes and shapes, and of what is said of the images."""
    digest = blake2b(about.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
