"""Modules of a user's own that a config names: plain files in the working directory or beside the config.

Python looks for modules in the working directory when it runs a script or ``python -m``, and not for a command such as
``lpl``. A folder is added here only where the config or the command names a module that lies in it and that Python
finds nowhere else, and at the end: no file can take the place of a library, nor be imported where nobody named it.

Configs are what ``--config`` and ``--suite`` name, and YAML files that other options or configs name: JSON is also what
reports, records and tables of others are written in, whose words name nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

__all__ = ["find_own_modules", "other_module"]

_FILE = re.compile(r"[^\s'\"=,\[\]{}]+\.(?:yaml|yml)\b")
_ENDINGS = (".yaml", ".yml")
_CONFIG = re.compile(r"-c|--(?:.*\.)?(?:config|suite)")
_NAME = re.compile(r"(?<![\w./-])[A-Za-z_]\w*(?=\.[A-Za-z_])")


def find_own_modules(given: Sequence[str]) -> None:
    """Let Python find the modules of a user's own that a command names, by itself or in its configs.

    Args:
        given: The arguments of the command.
    """
    configs = _configs(given)
    texts, folders = [*given, *configs.values()], [Path.cwd(), *(path.parent.absolute() for path in configs)]
    for name in dict.fromkeys(name for text in texts for name in _NAME.findall(text)):
        if _origin(name) is None and (folder := next((at for at in folders if _holds(at, name)), None)) is not None:
            sys.path.append(str(folder))


def other_module(name: str) -> str | None:
    """Where Python finds a module in place of a file of that name in the working directory; None where it does not."""
    origin = _origin(name)
    return origin if origin is not None and _holds(Path.cwd(), name) and Path(origin).parent != Path.cwd() else None


def _configs(given: Iterable[str]) -> dict[Path, str]:
    """Files of configs that arguments name, and those that these name in turn, with what they say."""
    found: dict[Path, str] = {}
    arguments = list(given)
    values = [text.partition("=")[2] for text in arguments if _CONFIG.fullmatch(text.partition("=")[0])]
    values += [after for text, after in pairwise(arguments) if _CONFIG.fullmatch(text)]
    queue = [(Path(), [value, *_named(value)]) for value in values] + [(Path(), _named(text)) for text in arguments]
    while queue:
        folder, names = queue.pop(0)
        for path in (folder / Path(name).expanduser() for name in names):
            if path not in found and path.is_file():
                found[path] = path.read_text(encoding="utf-8", errors="replace")
                queue.append((path.parent, _named(found[path])))
    return found


def _named(text: str) -> list[str]:
    """Names of YAML files in a text, or the text as a name, which may hold blanks."""
    return [*([text] if text.endswith(_ENDINGS) and "\n" not in text else []), *_FILE.findall(text)]


def _holds(folder: Path, name: str) -> bool:
    """Whether a folder has a module of that name."""
    return (folder / f"{name}.py").is_file() or any((folder / name).glob("*.py"))


def _origin(name: str) -> str | None:
    """Where Python finds a module; None where it finds none."""
    try:
        spec = find_spec(name)
    except ValueError:  # one that is running, or was made by hand
        return "__main__"
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), name)
