"""The configs that come with the package, for who works elsewhere than in its repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from lightning.pytorch.utilities import rank_zero_info

__all__ = ["FOLDERS", "with_packaged_configs"]

PACKAGE = Path(__file__).parent
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Where they are: installed from a wheel, and in the repository."""


def with_packaged_configs(args: Sequence[str]) -> list[str]:
    """Arguments in which files ``configs/NAME.yaml`` that are not here are the package's of that name.

    Args:
        args: Of the command line, such as ``-c configs/quickstart.yaml`` or ``--suite=configs/metrics/paper.yaml``.

    Returns:
        As many. What neither a file here nor the package's names stays as it is.
    """
    return [_packaged(arg) for arg in args]


def _packaged(arg: str) -> str:
    option, given, value = arg.rpartition("=")
    parts = PurePosixPath(value).parts
    if parts[:1] != ("configs",) or ".." in parts or not value.endswith(".yaml") or Path(value).exists():
        return arg
    for folder in FOLDERS:
        if (path := folder.joinpath(*parts[1:])).is_file():
            rank_zero_info(f"{value} is the package's: {path}")
            return f"{option}{given}{path}"
    return arg
