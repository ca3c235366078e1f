"""What captions were made by: the record beside them, which a run that goes on must agree with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["RECORD", "appearing", "check_record", "hashes", "versions", "write_whole", "writing"]

RECORD = "captions-record.json"
_FORMAT = "lpl_lightning captions 1"
_LIBRARIES = ("lpl-lightning", "transformers", "tokenizers", "torch", "torchvision", "pillow")
_CHUNK = 1 << 20  # bytes
_WEIGHTS, _OTHERS = (".safetensors",), (".json", ".txt", ".model", ".jinja")


def hashes(folder: Path) -> dict[str, str]:
    """Hashes (blake2b) of a model's files: of its weights, and of its config, its processor and its tokenizer."""

    def of(*suffixes: str) -> str:
        digest = blake2b(digest_size=16)
        for path in sorted(folder.iterdir()):
            if path.suffix in suffixes and path.is_file():
                digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
                with path.open("rb") as file:
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
        return digest.hexdigest()

    return {"weights_blake2b": of(*_WEIGHTS), "settings_blake2b": of(*_OTHERS)}


def versions() -> dict[str, str]:
    """Versions of what captions depend on."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # run from a checkout
            continue
    return found


def check_record(folder: Path, binding: Mapping[str, Any], noted: Mapping[str, Any], writer: str) -> None:
    """Write the record of a folder of captions or, where it has one, refuse to go on as anything else.

    Args:
        folder: The folder.
        binding: What must stay as it is, as JSON holds it: groups of settings by name.
        noted: What is good to know. Versions that differ are warned of.
        writer: Name of this process's share.

    Raises:
        ValueError: The record is of another model, other settings or other images, or is none.
    """
    path = folder / RECORD
    if not path.exists():
        content = {"format": _FORMAT, **binding, **noted}
        write_whole(path, [json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"], writer)
    try:
        # Also where it has just been written: another process may have written one of its own at the same moment.
        known = json.loads(path.read_bytes())
        if not isinstance(known, dict) or known.get("format") != _FORMAT:
            raise ValueError("it is of another format")
    except ValueError as error:
        raise ValueError(f"{path} must be the record that `lpl caption` wrote, but cannot be read: {error}.") from error
    differing = [
        f"{name} was {was!r} and is {now!r}"
        for group, settings in binding.items()
        for name, now in settings.items()
        if (was := known.get(group, {}).get(name)) != now
    ]
    if differing:
        raise ValueError(
            f"`out`: {folder} holds captions of another model, other settings or other images: {'; '.join(differing)}. "
            "Go on with what they were made by, or give another `out`."
        )
    if (was := known.get("versions")) != noted.get("versions"):
        rank_zero_warn(
            f"{path}: captions were begun with other versions, {was}; those made from now on may differ from what they "
            "would have been."
        )


def write_whole(path: Path, content: Iterable[bytes], writer: str) -> None:
    """Write a file as ``appearing`` does.

    Args:
        path: The file.
        content: What it holds.
        writer: Name of this process's share.
    """
    with appearing(path, writer) as file:
        file.writelines(content)


@contextmanager
def appearing(path: Path, writer: str) -> Iterator[IO[bytes]]:
    """A file to write, which appears whole or not at all, in the place of an older one.

    Args:
        path: The file.
        writer: Name of this process's share. Unfinished files are named by it, so that processes have one each, and the
            one that goes on after a kill finds that of the one that was killed.

    Raises:
        ValueError: It cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{writer}.unfinished")
    try:
        with writing(path):
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk says, such as that it is full, is an error that names a file and what to do.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error}). Make room or mend what is wrong, and call the same command again: it "
            "goes on with what is finished."
        ) from error
