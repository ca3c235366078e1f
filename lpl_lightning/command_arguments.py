"""Arguments of the ``lpl`` command that are looked at before the parser does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lpl_lightning.callbacks import EMA, LPLCallback

__all__ = ["check_one_each", "check_suites", "named"]

ONE_EACH = {
    LPLCallback: "the config turns LPL on by itself. Leave configs/lpl.yaml out.",
    EMA: "the config has one. Change that, such as by `stand_ins: {lpl_lightning.EMA: {decay: 0.9999}}`.",
}
"""Callbacks of which there may be one, and what to do about two."""

OF_A_FOLDER = {"evaluate": "one folder, that of the images", "caption": "one folder or, in quotes, pattern of shards"}
"""Those that take images without a name, and what is to be given."""


def named(command: str, args: Sequence[str]) -> list[str]:
    """Arguments of a command, with what no option takes by name: a folder to evaluate, runs to compare."""
    plain, options = [], []
    rest = iter(args)
    for arg in rest:
        if not arg.startswith("-"):
            plain.append(arg)
            continue
        options.append(arg)
        if "=" not in arg and arg not in ("-h", "--help") and not arg.startswith("--print_"):
            options += [value for value in [next(rest, None)] if value is not None]
    if command == "compare" and plain:
        return ["--runs", json.dumps(plain), *options]
    if command in OF_A_FOLDER and len(plain) == 1:
        return ["--images", *plain, *options]
    if plain:
        wanted = OF_A_FOLDER.get(command, "options alone")
        raise ValueError(f"`lpl {command}` takes {wanted}, got {' '.join(plain)}: give what else there is by --NAME.")
    return options


def check_suites(args: Sequence[str]) -> None:
    """Refuse files of suites that do not exist, which the parser would take for classes."""
    for arg, after in zip(args, [*args[1:], ""], strict=True):
        name, given, value = arg.partition("=")
        value = value if given else after
        is_suite = name.startswith("--") and name.split(".")[-1].removeprefix("--") == "suite"
        if is_suite and value.endswith((".yaml", ".yml", ".json")) and not Path(value).is_file():
            raise FileNotFoundError(f"`{name.removeprefix('--')}`: there is no file {value}.")


def check_one_each(callbacks: Sequence[object]) -> None:
    """Refuse two of a callback of which there may be one.

    Raises:
        ValueError: There are two.
    """
    for kind, remedy in ONE_EACH.items():
        if sum(isinstance(callback, kind) for callback in callbacks) > 1:
            raise ValueError(f"There are two {kind.__name__}s among `trainer.callbacks`: {remedy}")
