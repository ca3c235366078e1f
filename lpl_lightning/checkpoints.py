"""Checkpoints that appear whole or not at all, run no code when they are read, and are looked at beforehand."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lpl_lightning.checkpoint_files import META, clear_drafts, draft_of, fault_of, has_optimizer, put_file

__all__ = [
    "WEIGHTS_ALONE",
    "SafeCheckpointIO",
    "check_checkpoint",
    "check_settings",
    "checkpoint_folders",
    "is_plain",
    "newest_checkpoint",
    "notes_of",
    "refusal_of",
    "with_plain_settings",
]


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk that is full, or a share of one."""

WEIGHTS_ALONE = (
    "The checkpoint holds weights alone (`save_weights_only`), from which training cannot go on. To begin anew from "
    "them, give it as `model.weights`, and no `ckpt_path`."
)
"""What is said of such a file or folder."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that a kill or a full disk never leaves half of one, and reads only plain values.

    A plugin for Lightning's ``Trainer(plugins=...)``; the ``lpl`` command has it by default. A file is written beside
    its place, brought to the disk, and then moved there. Files elsewhere (``s3://`` and so on) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; of paths and members of enumerations among hyperparameters, their text or value.

        Raises:
            OSError: It cannot be written, as where the disk is full. What was there stays.
            ValueError: It holds what could not be read again without running code.
        """
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = _path(path)
        part = draft_of(place)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            clear_drafts(place)
            try:
                with part.open("wb") as file:
                    torch.save(with_plain_settings(checkpoint), file)
                    file.flush()
                    os.fsync(file.fileno())
                _check_plain(part)
                put_file(part, place)
            finally:
                with suppress(OSError):  # it is there only where something failed
                    part.unlink()
        except (OSError, RuntimeError) as error:  # torch says the latter where its writer could not write
            if isinstance(error, RuntimeError) and not isinstance(_cause(error), OSError):
                raise
            cause = _cause(error)
            remedy = "make room" if getattr(cause, "errno", None) in FULL else "mend that"
            raise OSError(
                f"The checkpoint {place} cannot be written ({cause}). Those before it stay: {remedy}, and go on by "
                "`--ckpt_path last`."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint without running any code that the file may hold.

        Args:
            path: The file.
            map_location: Where its tensors are put.
            weights_only: Lightning's; False is refused.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is cut off, changed, something else, or holds more than tensors and plain values.
        """
        if weights_only is False:
            raise ValueError(f"`weights_only`=False would run what {path} says: leave it out.")
        if _is_local(path):
            check_checkpoint(_path(path))
            if _path(path).is_dir():
                raise ValueError(
                    f"`ckpt_path`: {path} is a folder of shards, which `lpl_lightning.FSDP2Strategy` alone "
                    "goes on with. Its weights are read as `--model.weights` and by `lpl export` too."
                )
        try:
            found: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        except Exception as error:  # whatever an unpickler says to another file
            raise ValueError(
                f"`ckpt_path`: {path} cannot be read as a checkpoint: {refusal_of(path, error)}."
            ) from error
        return found


def check_settings(part: Any, argument: str) -> None:
    """Refuse a module or data module whose hyperparameters no checkpoint could hold, before it is trained.

    Args:
        part: The module.
        argument: What to call it in the error.

    Raises:
        ValueError: It is such.
    """
    for name, value in dict(getattr(part, "hparams", {})).items():
        held = io.BytesIO()
        try:
            torch.save(_plain(value), held)
            held.seek(0)
            torch.load(held, map_location="cpu", weights_only=True)
        except Exception as error:  # Picklers and unpicklers do not agree on a type.
            raise ValueError(
                f"`{argument}`: the hyperparameter {name!r} is a {type(value).__name__}, which could not be read again "
                f"from a checkpoint without running code. Leave it out: `save_hyperparameters(ignore=[{name!r}])`."
            ) from error


def with_plain_settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint whose hyperparameters can be read again without running code."""
    keys = (pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)
    return {**checkpoint, **{key: _plain(checkpoint[key]) for key in keys if key in checkpoint}}


def is_plain(value: Any) -> bool:
    """Whether a hyperparameter can be read again from a checkpoint without running code."""
    value = _plain(value)
    if isinstance(value, Mapping):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes | torch.Tensor | torch.dtype)


def _plain(value: Any) -> Any:
    """Settings with a plain value in the place of paths, members of enumerations, and numbers and arrays of NumPy."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(part) for part in value)
    return value


def _check_plain(path: Path) -> None:
    """Refuse to leave a checkpoint that nothing could be continued from; its tensors are not read for that."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            "The checkpoint holds more than tensors and plain values, and nothing could go on from it: "
            f"{refusal_of(path, error)}. Keep such objects out of it: `save_hyperparameters(ignore=[...])` in the "
            "module, plain values in `state_dict` of callbacks."
        ) from error


def check_checkpoint(path: Path) -> None:
    """Refuse a checkpoint that is not whole, or whose index could run code.

    Args:
        path: Its file or folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is such.
    """
    if not path.exists():
        raise FileNotFoundError(f"`ckpt_path`: there is no checkpoint {path}.")
    if why := fault_of(path):
        raise ValueError(f"`ckpt_path`: {path} cannot be used: {why}. `--ckpt_path last` takes the newest that can.")


def refusal_of(path: Any, error: Exception) -> str:
    """Why torch does not read a file, without its advice to run what is in it.

    Args:
        path: The file.
        error: What torch said.
    """
    with suppress(Exception):
        if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            return f"it holds {', '.join(sorted(names))}, which could run code"
    said = str(error).strip().splitlines() or [type(error).__name__]
    is_other = "Weights only" in said[0] or said[0].startswith("mmap can only")
    return "it is no zip archive of torch.save's, or could run code" if is_other else said[0].rstrip(".")


def checkpoint_folders(trainer: pl.Trainer) -> list[Path]:
    """Folders that runs of a trainer's configuration keep checkpoints in, those of earlier runs too.

    They are each ``ModelCheckpoint``'s ``dirpath``; without one ``checkpoints`` of all versions of the first logger, or
    without a logger of ``default_root_dir``.
    """
    found: list[Path] = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            found += [_path(callback.dirpath)] if _is_local(callback.dirpath) else []
        elif trainer.loggers:
            logger = trainer.loggers[0]
            root = _path(logger.save_dir or trainer.default_root_dir) / str(logger.name or "")
            found += sorted(root.glob("*/checkpoints"))
        else:
            found.append(_path(trainer.default_root_dir) / "checkpoints")
    return list(dict.fromkeys(found))


def newest_checkpoint(
    trainer: pl.Trainer, to_train: bool = False, is_other: Callable[[Path], bool] | None = None
) -> Path | None:
    """The checkpoint written last, of all runs of a trainer's configuration, that is whole; None where there is none.

    Those that are not are named in a warning.

    Args:
        trainer: The trainer.
        to_train: Whether training is to go on from it, which it cannot from weights alone.
        is_other: Says of a checkpoint whether it is to be passed over as another run's, before it is read as a whole.
    """
    for path in sorted(_files(checkpoint_folders(trainer)), key=_written, reverse=True):
        if is_other is not None and is_other(path):
            continue
        why = fault_of(path) or ("it holds weights alone" if to_train and _is_weights_alone(path) else None)
        if why is None:
            return path
        rank_zero_warn(f"{path} is passed over for an older checkpoint: {why}.")
    return None


def notes_of(path: Path) -> dict[str, Any] | None:
    """What a checkpoint holds, of a folder of shards what lies beside them; None where it cannot be read."""
    place = path / META if path.is_dir() else path
    try:
        found: dict[str, Any] = torch.load(place, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # Whoever loads it says what is wrong.
        return None
    return found


def _files(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        # A link, as `save_last: link` makes, is the file that it leads to.
        yield from {path.resolve() for path in folder.glob("*.ckpt") if path.exists()}


def _is_weights_alone(path: Path) -> bool:
    """Whether a checkpoint that is whole lacks what training goes on with."""
    try:
        if path.is_dir():
            return not has_optimizer(path)
        return "optimizer_states" not in torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # Whoever loads it says what is wrong.
        return False


def _written(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name


def _is_local(path: Any) -> bool:
    return "file" in str(get_filesystem(path).protocol)


def _path(path: Any) -> Path:
    return Path(str(path).removeprefix("file://")).expanduser().absolute()


def _cause(error: BaseException) -> BaseException:
    """The system's own error behind torch's."""
    while not isinstance(error, OSError) and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error
