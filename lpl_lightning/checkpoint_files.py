"""Checkpoints as files and folders: how they come to their places whole, and what is wrong with one.

``torch.save`` writes a zip archive, which holds a checksum (CRC-32) of each of its members. So that a checkpoint was
cut off or changed on the disk is found by reading it once, and nothing needs to stand beside it. A distributed
checkpoint is a folder of shards with an index, ``.metadata``, which comes last and is a pickle: it is looked through
beforehand for anything but what torch writes there, and its shards for whether they are as long as it says.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

__all__ = ["META", "clear_drafts", "draft_of", "fault_of", "has_optimizer", "put_file", "put_folder", "sync"]

UNFINISHED = ".unfinished"
"""End of the name of a file or folder that is being written."""

INDEX = ".metadata"
"""Of a folder of shards, as torch calls it."""

META = "meta.pt"
"""What a folder of shards holds beside them, as Lightning calls it."""


def draft_of(place: Path) -> Path:
    """Where a checkpoint is written before it is moved to its place."""
    return place.with_name(f"{place.name}.{uuid4().hex}{UNFINISHED}")


def clear_drafts(place: Path) -> None:
    """Remove those of a place that processes left which were killed."""
    for left in place.parent.glob(f"{_literal(place.name)}.*{UNFINISHED}"):
        _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_folder(part: Path, place: Path) -> None:
    """Move a whole folder of shards to its place, for what is there, which stays until then.

    What is there is a checkpoint for ``--ckpt_path last`` under another name for the moment in between.
    """
    for path in part.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync(part)
    _put(part, place, aside=place.exists())
    clear_drafts(place)


def put_file(part: Path, place: Path) -> None:
    """Move a whole file to its place, for what is there: a file, or a folder of shards as ``put_folder`` has it.

    Raises:
        OSError: Another folder is there.
    """
    _put(part, place, aside=any((place / name).is_file() for name in (INDEX, META)))


def _put(part: Path, place: Path, aside: bool) -> None:
    """Move something to its place, and before that aside what is there, where the one cannot just replace the other."""
    former = place.with_name(f"{place.stem}.replaced{place.suffix}")
    if aside:
        _remove(former)
        os.replace(place, former)
    os.replace(part, place)
    sync(place.parent)
    _remove(former)


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint; None where all of it is as it was written.

    Args:
        path: A file, which is read once, or the folder of a distributed checkpoint.
    """
    if path.is_dir():
        return _fault_of_folder(path)
    if not path.stat().st_size:
        return "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return f"it is cut off, or no checkpoint ({error})"
    return None if damaged is None else f"{damaged} in it is not what was written"


class _Index(pickle.Unpickler):
    """Reads the index of a distributed checkpoint, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """What torch writes there; else it ends."""
        paths = [f"{place}.{kind}Path" for place in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")]
        others = (*paths, "torch.Size", "collections.OrderedDict")
        written = (*others, "torch.serialization._get_layout", "torch.distributed.checkpoint.filesystem._StorageInfo")
        found: Any = None
        if module == "torch.distributed.checkpoint.metadata":
            found = super().find_class(module, name)
            is_known = isinstance(found, type) and found.__module__ == module
        elif f"{module}.{name}" in written:
            found, is_known = super().find_class(module, name), True
        else:
            found = getattr(torch, name, None) if module == "torch" else None
            is_known = isinstance(found, torch.dtype)
        if not is_known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found


def has_optimizer(path: Path) -> bool:
    """Whether a folder that is whole holds the state of an optimizer, of which its index then tells.

    Args:
        path: The folder of a distributed checkpoint.
    """
    return any(str(name).startswith("optimizer_") for name in _index_of(path).state_dict_metadata)


def _index_of(path: Path) -> Any:
    with (path / INDEX).open("rb") as file:
        return _Index(file).load()


def _fault_of_folder(path: Path) -> str | None:
    index = path / INDEX
    if not index.is_file():
        return "it is cut off, or no checkpoint: it has no .metadata"
    try:
        stored = _index_of(path).storage_data.values()
        needed: dict[str, int] = {}
        for one in stored:
            needed[one.relative_path] = max(needed.get(one.relative_path, 0), one.offset + one.length)
    except pickle.UnpicklingError as error:
        return f"its .metadata names {error}, which could run code, or is damaged"
    except Exception as error:  # Damaged pickles do not agree on a type.
        return f"its .metadata is damaged ({type(error).__name__})"
    for name, size in needed.items():
        if Path(name).name != name:
            return f"its .metadata names the file {name} outside of it"
        if not (path / name).is_file() or (path / name).stat().st_size < size:
            return f"it is cut off: {name} is missing or short"
    notes = path / META
    if not notes.is_file():
        return f"it is cut off: {META} is missing"
    with notes.open("rb") as file:
        is_archive = file.read(2) in (b"PK", b"")
    # Of anything else its reader says what it is.
    return f"{META}: {why}" if is_archive and (why := fault_of(notes)) else None


def _literal(name: str) -> str:
    """A name as a pattern of ``glob`` that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def sync(folder: Path) -> None:
    """Bring a folder's list of files to the disk, where the system can do that."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
