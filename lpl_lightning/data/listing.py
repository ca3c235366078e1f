"""Which images a folder holds, in the same order on every machine.

Hidden files, files of other types and sub-folders without images are passed over. Links are followed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

__all__ = ["as_line", "images_below", "path_hash", "scan", "some"]

EXTENSIONS = (
    *(".apng", ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
SHOWN = 5  # names that a message spells out


def scan(root: Path, argument: str) -> dict[str | None, list[str]]:
    """List the images of a folder by class.

    Args:
        root: The folder.
        argument: The argument that named it, for the errors.

    Returns:
        Paths by class name, the names sorted; under the one key None where there are no classes.
    """
    _check_folder(root, argument)
    above = frozenset([os.path.realpath(root)])
    direct = [entry.path for entry in _visible(root) if _is_image(entry)]
    classes: dict[str | None, list[str]] = {
        entry.name: images for entry in _visible(root) if _is_folder(entry) and (images := _images(entry.path, above))
    }
    if direct and classes:
        raise ValueError(
            f"`{argument}` must hold images either directly or in one sub-folder per class, but {root} holds "
            f"both: {some(direct)} beside the sub-folders {some(classes)}. Move either elsewhere."
        )
    if not direct and not classes:
        raise _no_images(root, argument)
    return classes or {None: direct}


def images_below(root: Path, argument: str) -> list[str]:
    """List the images of a folder and of all folders in it as one set.

    Args:
        root: The folder.
        argument: The argument that named it, for the errors.

    Returns:
        Paths, folder by folder.
    """
    _check_folder(root, argument)
    images = _images(str(root), frozenset())
    if not images:
        raise _no_images(root, argument)
    return images


def _check_folder(root: Path, argument: str) -> None:
    if not root.exists():
        raise FileNotFoundError(f"`{argument}` must be a folder of images, but {root} does not exist.")
    if not root.is_dir():
        raise ValueError(f"`{argument}` must be a folder of images, but {root} is a file; give its folder.")


def _no_images(root: Path, argument: str) -> ValueError:
    return ValueError(
        f"`{argument}` must hold images, but no file in {root} or its sub-folders ends in one of "
        f"{' '.join(EXTENSIONS)}. Give another folder or convert the images."
    )


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except PermissionError as error:
        raise ValueError(
            f"The folder {folder} may not be read. Change its permissions, or move it elsewhere."
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to what may not be looked at
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(EXTENSIONS) and not _is_folder(entry)


def _images(folder: str, above: frozenset[str]) -> list[str]:
    """Images at any depth; links are followed, save those back to a folder in ``above``, which would loop."""
    real = os.path.realpath(folder)
    if real in above:
        return []
    images = []
    for entry in _visible(folder):
        if _is_folder(entry):
            images += _images(entry.path, above | {real})
        elif _is_image(entry):
            images.append(entry.path)
    return images


def some(names: Iterable[object]) -> str:
    """The first names, and how many more there are."""
    shown = [str(name) for name in names]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def path_hash(path: str, root: Path) -> float:
    """A number in [0, 1) that depends on the path relative to ``root`` alone."""
    relative = os.fsencode(PurePath(path).relative_to(root).as_posix())
    return int.from_bytes(hashlib.blake2b(relative, digest_size=6).digest(), "big") / 2**48


def as_line(row: Mapping[str, Any]) -> bytes:
    """JSON in one line, of UTF-8."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # the name of a file that is none in the file system's encoding
        return json.dumps(row).encode() + b"\n"
