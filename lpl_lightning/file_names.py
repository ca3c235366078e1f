"""Names of files that stand in other files, such as in an index of shards: none of them leads out of its folder.

Links are followed: the Hugging Face hub's cache is made of them.
"""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath

__all__ = ["check_indices", "inside"]


def inside(folder: Path, name: object) -> Path:
    """Where a file or folder lies that another file names.

    Args:
        folder: What the name is relative to.
        name: The name.

    Raises:
        ValueError: It is no name, is absolute or goes through ``..``, by the rules of this system or of Windows.
    """
    if isinstance(name, str) and name:
        path = PureWindowsPath(name)  # which knows both kinds of slashes
        if not path.anchor and ".." not in path.parts and "\0" not in name:
            return folder / name
    raise ValueError(f"it names {name!r}, which does not lie in {folder}")


def check_indices(folder: Path) -> None:
    """Refuse the weights of a folder where an index says that they lie elsewhere, or that they are no safetensors.

    Args:
        folder: What ``save_pretrained`` wrote.

    Raises:
        ValueError: There is such an index, or one that is damaged.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            for name in sorted(names, key=str):
                if inside(folder, name).suffix != ".safetensors":
                    raise ValueError(f"it names {name!r}, which is no .safetensors file")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"The index of weights {index} cannot be used: {error}.") from error
