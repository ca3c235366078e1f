"""What the folder of a Hugging Face data set says of its files, in its card (``README.md``) or beside saved tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lpl_lightning.data.samples import optional
from lpl_lightning.file_names import inside

__all__ = ["check_file_names"]

_NAMING = ("data_files", "data_dir", "_data_files", "splits")
"""Keys whose values ``datasets`` takes for files and folders."""


def check_file_names(folder: Path) -> None:
    """Refuse a folder that has other files read than those in it.

    Args:
        folder: The folder; one that is not there says nothing.

    Raises:
        ValueError: It is such.
    """
    for name in ("README.md", ".huggingface.yaml", "dataset_dict.json"):
        _check(folder / name)
    for path in (folder / "state.json", *folder.glob("*/state.json")):
        _check(path)


def _check(path: Path) -> None:
    if not path.is_file():
        return
    try:
        for name in _names(_read(path)):
            if "://" in name:
                raise ValueError(f"it names {name!r}, which is a URL")
            inside(path.parent, name)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"`path`: {path} cannot be used: {error}.") from error


def _read(path: Path) -> Any:
    if path.suffix == ".md":
        return optional("huggingface_hub").DatasetCard.load(path).data.to_dict()
    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)


def _names(said: Any, named: bool = False) -> Iterator[str]:
    if isinstance(said, Mapping):
        for key, value in said.items():
            yield from _names(value, named or key in _NAMING)
    elif isinstance(said, list):
        for value in said:
            yield from _names(value, named)
    elif named and isinstance(said, str) and said:
        yield said
