"""Arguments of the ``lpl`` command that are looked at before the parser does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lpl_lightning.callbacks import EMA, LPLCallback

__all__ = ["check_files", "check_one_each", "named"]

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


def check_files(args: Sequence[str]) -> None:
    """Refuse files of configs and of suites that no parser could read, by what is wrong in which line.

    Raises:
        FileNotFoundError: A file of a suite does not exist, which the parser would take for a class.
        ValueError: A file is no YAML, or no mapping.
    """
    for arg, after in pairwise([*args, ""]):
        name, given, value = arg.partition("=")
        path = Path(value if given else after)
        option = "config" if name == "-c" else name.split(".")[-1].removeprefix("--") if name.startswith("--") else ""
        if option not in ("config", "suite") or path.suffix not in (".yaml", ".yml", ".json"):
            continue
        if path.is_file():
            _check_yaml(path)
        elif option == "suite":
            raise FileNotFoundError(f"`{name.removeprefix('--')}`: there is no file {path}.")


def _check_yaml(path: Path) -> None:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {', '.join(filter(None, (error.problem, error.context)))}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{path} must hold keys and their values, such as `trainer: {{max_steps: 100}}`.")


def check_one_each(callbacks: Sequence[object]) -> None:
    """Refuse two of a callback of which there may be one.

    Raises:
        ValueError: There are two.
    """
    for kind, remedy in ONE_EACH.items():
        if sum(isinstance(callback, kind) for callback in callbacks) > 1:
            raise ValueError(f"There are two {kind.__name__}s among `trainer.callbacks`: {remedy}")
