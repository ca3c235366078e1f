"""Where weights come from (the package itself, a folder or file, the Hugging Face hub), and whether they fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["EMBEDDED", "check_fit", "locate", "read_state"]

EMBEDDED = "embedded:"
"""Prefix of the names of the weights that ship with the package, as in ``embedded:autoencoder_shapes``."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(source: str, argument: str) -> Path | str:
    """Find the weights that a config names.

    Args:
        source: ``embedded:NAME``, a path that exists, or the id of a repository on the Hugging Face hub.
        argument: Name of the argument it came by, for the error.

    Returns:
        The path of a file or folder, or the hub id as it came.

    Raises:
        FileNotFoundError: An unknown embedded name, or a path that does not exist.
    """
    if source.startswith(EMBEDDED):
        weights = Path(str(files("lpl_lightning"))) / "weights"
        for found in (
            weights / source.removeprefix(EMBEDDED),
            weights / f"{source.removeprefix(EMBEDDED)}.safetensors",
        ):
            if found.exists():
                return found
        names = sorted(EMBEDDED + path.stem for path in weights.iterdir() if not path.name.startswith((".", "_")))
        raise FileNotFoundError(f"`{argument}`={source!r} does not ship with lpl_lightning; these do: {names}.")
    path = Path(source).expanduser()
    if source and path.exists():
        return path
    looks_like_path = source.startswith((".", "/", "~")) or path.suffix in {
        ".safetensors",
        ".ckpt",
        ".pt",
        ".pth",
    }
    if looks_like_path or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"`{argument}`={source!r} does not exist. Give a folder or file, a Hugging Face hub id such as "
            f"'stabilityai/sdxl-vae', or one that ships with the package such as '{EMBEDDED}autoencoder_shapes'."
        )
    return source


def read_state(source: str) -> dict[str, Tensor]:
    """Read a state dict without running any code that the file may hold.

    Args:
        source: A Lightning checkpoint, a safetensors file, or ``embedded:NAME``.

    Raises:
        ValueError: The file is neither.
    """
    path = locate(source, "weights")
    if isinstance(path, str) or path.is_dir():
        raise ValueError(f"`weights`={source!r} must be a file: a Lightning checkpoint (.ckpt) or .safetensors.")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"`weights`={source!r} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"`weights`={source!r} is no Lightning checkpoint: it has no 'state_dict'.")
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return state


def check_fit(own: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state dict of another model.

    Args:
        own: The model's state dict.
        found: The one to load.
        source: Where it came from, for the error.

    Raises:
        ValueError: A name is missing or unknown, or a shape differs.
    """
    missing = sorted(set(own) - set(found))
    unknown = sorted(set(found) - set(own))
    shapes = [name for name in own if name in found and own[name].shape != found[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} weights are missing, such as {missing[0]!r}")
    if unknown:
        problems.append(f"{len(unknown)} are not of this model, such as {unknown[0]!r}")
    if shapes:
        first = shapes[0]
        problems.append(
            f"{len(shapes)} have another shape, such as {first!r}: expected {tuple(own[first].shape)}, "
            f"got {tuple(found[first].shape)}"
        )
    if problems:
        raise ValueError(
            f"The weights in {source} are of another model: {'; '.join(problems)}. "
            "Give the config of the model that they were trained with."
        )
