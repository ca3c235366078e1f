"""Weights of feature networks, from files and from the folder into which torch downloads, read without running code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lpl_lightning.checkpoints import refusal_of
from lpl_lightning.pretrained import read_safetensors

__all__ = ["cached_at", "download_weights", "read_weights"]


def cached_at(url: str) -> Path:
    """Where torch keeps what it has downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def read_weights(source: str) -> Mapping[str, Tensor]:
    """Read a state dict.

    Args:
        source: Path of a .safetensors file, or of one that ``torch.save`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is something else.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`weights`={source!r} is neither a file nor the name of weights of this model.")
    if path.suffix == ".safetensors":
        return read_safetensors(path, "weights")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever an unpickler says to another file
        raise ValueError(f"`weights`={source!r} cannot be read as weights: {refusal_of(path, error)}.") from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"`weights`={source!r} must hold a state dict, tensors by name.")
    return state


def download_weights(url: str) -> Mapping[str, Tensor]:
    """Read a state dict from torch's folder, into which it is downloaded first, its hash checked.

    Of a file that is there already torch checks no hash: it may be from anywhere.

    Raises:
        OSError: It cannot be downloaded.
        ValueError: What is there is something else.
    """
    try:
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
    except OSError:  # URLError, and what sockets and disks raise
        raise
    except Exception as error:  # whatever an unpickler says to another file
        place = cached_at(url)
        raise ValueError(
            f"{place} cannot be read as weights: {refusal_of(place, error)}. Delete it, or put there what {url} gives."
        ) from error
    return cast(Mapping[str, Tensor], state)
