"""Where weights come from (the package itself, a folder or file, the Hugging Face hub), and whether they fit."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lpl_lightning.checkpoint_files import META, fault_of
from lpl_lightning.checkpoints import refusal_of

__all__ = [
    "AVERAGES",
    "EMBEDDED",
    "RANDOM",
    "averaged_by",
    "averages_of",
    "check_fit",
    "chosen_state",
    "is_untrained",
    "locate",
    "plain_values_alone",
    "read_checkpoint",
    "read_notes",
    "read_safetensors",
    "read_state",
    "resize_positions",
]

EMBEDDED = "embedded:"
"""Prefix of the names of the weights that ship with the package, as in ``embedded:autoencoder_shapes``."""

RANDOM = "random:"
"""Prefix of a folder or hub id whose configs are taken and whose weights are not: they are drawn at random."""

AVERAGES = "lpl_lightning_averages"
"""Where a checkpoint holds averages of the trained weights, by decay."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_untrained(source: str) -> tuple[bool, str]:
    """Whether a source asks for random weights (``random:SOURCE``), and the source without that prefix."""
    return source.startswith(RANDOM), source.removeprefix(RANDOM)


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
        whole = (
            path for path in weights.iterdir() if path.suffix == ".safetensors" or (path / "config.json").is_file()
        )
        names = sorted(EMBEDDED + path.stem for path in whole)
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


def read_state(source: str, ema: float | None = None) -> dict[str, Tensor]:
    """Read a state dict without running any code that the file may hold.

    Args:
        source: A Lightning checkpoint, a file or a folder of shards, a safetensors file, or ``embedded:NAME``.
        ema: Decay of the moving average to take; None takes the weights as they were trained.

    Raises:
        ValueError: The file is neither, or holds no such average.
    """
    path = locate(source, "weights")
    if isinstance(path, str) or (path.is_dir() and not (path / META).is_file()):
        raise ValueError(f"`weights`={source!r} must be a Lightning checkpoint (.ckpt) or a .safetensors file.")
    if path.suffix == ".safetensors":
        if ema is not None:
            raise ValueError(
                f"`ema`={ema}: {source} is a .safetensors file, which holds one set of weights: leave it out."
            )
        return read_safetensors(path, "weights")
    return chosen_state(read_checkpoint(source), source, ema)


def read_notes(source: str) -> dict[str, Any]:
    """What a checkpoint says beside its weights; nothing where a .safetensors file is given.

    Args:
        source: As for ``read_state``.

    Raises:
        ValueError: The file is neither.
    """
    path = locate(source, "weights")
    is_bare = isinstance(path, Path) and path.suffix == ".safetensors"
    return {} if is_bare else read_checkpoint(source, weights=False)


def read_safetensors(path: Path, argument: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, which cannot hold code.

    Args:
        path: The file.
        argument: Name of the argument it came by, for the error.

    Raises:
        ValueError: It is something else under that name, or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`{argument}`={str(path)!r} cannot be read as safetensors: {error}.") from error


def read_checkpoint(source: str, argument: str = "weights", weights: bool = True) -> dict[str, Any]:
    """Read a Lightning checkpoint without running any code that it may hold.

    Args:
        source: Its path: a file, or a folder of shards (``save_distributed_checkpoint``), of whose optimizer's state
            nothing is read. Before PyTorch 2.8, where processes talk to each other, all must read such weights.
        argument: Name of the argument it came by, for the error.
        weights: Whether ``state_dict`` of a folder is read; without it, it is empty.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It cannot be read, or is something else.
    """
    path = locate(source, argument)
    shards = path if isinstance(path, Path) and path.is_dir() else None
    if shards is not None and (why := fault_of(shards)):
        raise ValueError(f"`{argument}`={source!r} cannot be read as a checkpoint: {why}.")
    found = path if shards is None else shards / META
    try:
        checkpoint: Any = torch.load(found, map_location="cpu", weights_only=True, mmap=True)
        if shards is not None:
            checkpoint["state_dict"] = _gathered(shards) if weights else {}
    except Exception as error:
        raise ValueError(
            f"`{argument}`={source!r} cannot be read as a checkpoint: {refusal_of(Path(found), error)}."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"`{argument}`={source!r} is no Lightning checkpoint: it has no 'state_dict'.")
    return checkpoint


def _gathered(shards: Path) -> dict[str, Tensor]:
    """Whole weights of a folder of shards, whose index has been looked through."""
    reader, prefix = FileSystemReader(shards), "state_dict."
    held = {
        name.removeprefix(prefix): torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }
    alone: dict[str, Any] = {"no_dist": True} if "no_dist" in signature(load).parameters else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        load({"state_dict": held}, storage_reader=reader, **alone)
    return held


def chosen_state(checkpoint: Mapping[str, Any], source: str, ema: float | None) -> dict[str, Tensor]:
    """The weights of a checkpoint as they were trained, or their moving average.

    Args:
        checkpoint: A Lightning checkpoint.
        source: Where it is from, for the error.
        ema: Decay of the average; None takes the weights as they were trained.

    Raises:
        ValueError: It holds no average, or one of another decay.
    """
    trained: dict[str, Tensor] = checkpoint.get("current_model_state", checkpoint["state_dict"])
    if ema is None:
        return trained
    found = averages_of(checkpoint, unnamed=ema)
    if ema not in found:
        there = f"has those of decay {sorted(found)}" if found else "has none"
        raise ValueError(f"`ema`={ema}: {source} {there}. Leave it out to have the weights as they were trained.")
    return trained | found[ema]


def averages_of(checkpoint: Mapping[str, Any], unnamed: float) -> dict[float, dict[str, Tensor]]:
    """All averages that a checkpoint holds, by decay: of what was trained, or of all weights.

    Args:
        checkpoint: A Lightning checkpoint. Lightning's own callback, and ``EMA`` of earlier versions, put the average
            in ``state_dict`` and the weights as they were trained elsewhere.
        unnamed: What to take for the decay of an average whose checkpoint does not say it.
    """
    found: dict[float, dict[str, Tensor]] = {
        float(decay): averages for decay, averages in checkpoint.get(AVERAGES, {}).items()
    }
    if "current_model_state" in checkpoint:
        decay = averaged_by(checkpoint)
        found[unnamed if decay is None else decay] = checkpoint["state_dict"]
    return found


def averaged_by(checkpoint: Mapping[str, Any]) -> float | None:
    """Decay of the moving average that a checkpoint's ``state_dict`` is; None where it is none, or does not say."""
    decays = [state["decay"] for state in checkpoint.get("callbacks", {}).values() if "decay" in state]
    return decays[0] if decays and "current_model_state" in checkpoint else None


@contextmanager
def plain_values_alone() -> Iterator[None]:
    """Have torch unpickle nothing else, also where a library asks it to, or an index says that it is no tensor."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


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


def resize_positions(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Resize grids of position embeddings to those of a model for another resolution.

    Positions keep their place in the image: the grid (1, n * n, D) of the one model is resampled to the (1, m * m, D)
    of the other, as vision transformers are fine-tuned at another resolution (Dosovitskiy et al., 2021).

    Args:
        own: State dict of the model that the weights are for.
        found: The weights. Not changed.

    Returns:
        The weights, with what is called ``pos_embed`` in the model's shape.
    """
    fitted = dict(found)
    for name, tensor in found.items():
        wanted = own[name].shape if name in own else tensor.shape
        if "pos_embed" not in name or tensor.shape == wanted or tensor.ndim != 3 or wanted[2:] != tensor.shape[2:]:
            continue
        old, new = math.isqrt(tensor.shape[1]), math.isqrt(wanted[1])
        if old * old != tensor.shape[1] or new * new != wanted[1]:
            continue
        grid = tensor.float().unflatten(1, (old, old)).movedim(3, 1)
        grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True)
        fitted[name] = grid.movedim(1, 3).flatten(1, 2).to(tensor.dtype)
    return fitted
