"""Safetensors files that several processes may write and read at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from safetensors.torch import load, save_file
from torch import Tensor

__all__ = ["add_metadata", "open_to_others", "read_tensors", "write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, which appears whole or not at all, in a folder that is made if need be.

    Raises:
        OSError: It cannot be written.
        SafetensorError: The same, found by the library.
    """
    # Copies, since safetensors refuses tensors that share memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(copies, unfinished, metadata=None if metadata is None else dict(metadata))
        open_to_others(unfinished)
        unfinished.replace(path)
    finally:
        with suppress(OSError):  # it is there only where something failed
            unfinished.unlink()


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a file's metadata and tensors, by opening it once.

    ``safe_open`` opens it for the tensors again, which may then be those of a file that has just taken its place.

    Raises:
        OSError: It cannot be read.
        SafetensorError: It is something else, or damaged.
        ValueError: The same.
    """
    content = path.read_bytes()
    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__", {}), tensors


def open_to_others(place: Path) -> None:
    """Give files that a library has written by safetensors, which leaves them to their owner alone, the usual mode.

    Args:
        place: A file, or a folder of which all safetensors files are meant.
    """
    for file in [place] if place.is_file() else place.rglob("*.safetensors"):
        usual = file.with_name(f"{file.name}.{uuid4().hex}.unfinished")
        usual.touch()
        with suppress(PermissionError):  # of a file system that knows no modes
            file.chmod(usual.stat().st_mode)
        usual.unlink()


def add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Say more in a file that a library has written without it; its tensors, however large, are copied as they are.

    Raises:
        OSError: It cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}.unfinished")
    try:
        with path.open("rb") as old, unfinished.open("wb") as new:
            header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
            header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
            content = json.dumps(header, separators=(",", ":")).encode()
            content += b" " * (-len(content) % 8)  # tensors begin at multiples of eight bytes
            new.write(len(content).to_bytes(8, "little") + content)
            shutil.copyfileobj(old, new, 2**22)
        shutil.copymode(path, unfinished)
        unfinished.replace(path)
    finally:
        with suppress(OSError):  # it is there only where something failed
            unfinished.unlink()
