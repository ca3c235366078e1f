"""What a parser of configs refuses, in one line: the key, and what is wrong with it."""

from __future__ import annotations

import inspect
import os
import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pkgutil import resolve_name
from typing import NoReturn

from jsonargparse import ArgumentParser

from lpl_lightning.arguments import NotFiniteError, refusal
from lpl_lightning.own_files import other_module

__all__ = ["REFUSALS", "TRACEBACK", "plain_error", "plain_refusals", "refuse_arguments", "shows_tracebacks"]

REFUSALS = (ValueError, OSError, ModuleNotFoundError, NotFiniteError)
"""What the package raises where it is a user's to mend, such as a full disk."""

TRACEBACK = "LPL_TRACEBACK"
"""Variable of the environment that, set to anything but 0, lets tracebacks be shown."""

_KEY = re.compile(r'(?:^|.* )Parser key "([^"]+)":')
_GIVEN = re.compile(r"Given value: (.*?)(?:\. Got value: .*)?$")
_WANTED = re.compile(r"Expected an? <class '(?:\w+\.)*(\w+)'>(?:\. Got value: (.*))?$")
_WORDS = re.compile(r"Expected a typing\.Literal\[(.*)\](?:\. Got value: (.*))?$")
_PATH = re.compile(r"(?:given class_path|but|Import path) '?([A-Za-z_]\w*(?:\.\w+)+)'?")
_OPTION = re.compile(r"(?:Type .* expects a function or a callable class: )?(Option '([^']+)' is not accepted)")
_CLASS = re.compile(r"class_path='([^']+)'")
_UNKNOWN = re.compile(r"unrecognized arguments: (--[^ =]+)")
_COMMAND = re.compile(r"argument subcommand: invalid choice: '([^']*)'")
_MISSING = re.compile(r"the following arguments are required: (.*)$")
_TRIED = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value type",
    "Expected a path but",
    "Problem with given",
    "Not a valid subclass",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
    "Expected a <class 'NoneType'>",
)
"""How lines begin that say what was tried, and not what was wrong."""


def plain_error(message: str, options: Iterable[str] = ()) -> str:
    """The part of a parser's message that says what was wrong.

    A parser of types says all that it tried, one nested in the other; what it came to where it went deepest is what a
    user can mend.

    Args:
        message: As jsonargparse makes it.
        options: What the command line takes, such as ``--trainer.max_steps``, to name what was meant; commands too,
            where it takes any.

    Returns:
        One line, or the message as it is where nothing is found in it.
    """
    where: list[tuple[int, str]] = []
    found: list[tuple[int, str, str]] = []
    path, given = "", ""
    for line in message.splitlines():
        indent, text = len(line) - len(line.lstrip(" -")), line.strip(" -")
        if key := _KEY.match(text):
            where = [(depth, name) for depth, name in where if depth < indent] + [(indent, key[1])]
            text = text[key.end() :].strip()
        if named := _PATH.search(text):
            path = named[1]
        if value := _GIVEN.match(text):
            given = given or value[1]  # the first comes after what was tried where it went deepest
        elif text and not text.startswith(_TRIED):
            if refused := _OPTION.match(text):
                of = _CLASS.search(text)  # of a class that makes something later, the message itself says which
                path = of[1] if of else path
                text = f"{path}: {refused[1]}" if path else refused[1]
            found.append((indent, ".".join(name for _, name in where), text))
    if not found or not where:
        return _of_command_line(message, [*options])
    depth, key_path, text = max(found, key=lambda item: item[0])
    words = next((of for *at, said in found if at == [depth, key_path] and (of := _WORDS.match(said))), None)
    if wanted := _WANTED.match(text) or words:
        given = wanted[2] or given
        alone = wanted is words
        text = f"expected {'one of' if alone else 'a value of type'} {wanted[1]}"
        text += f" or {words[1]}" if words and not alone else ""
        text += f", got {given}"
        text += f"; in YAML it is written .{given}" if given in ("inf", "nan") and wanted[1] == "float" else ""
    said = f"`{key_path}`: {text.rstrip('.')}{_more(path, text)}"
    return said if said.endswith("?") else f"{said}."


def _of_command_line(message: str, options: list[str]) -> str:
    """What is wrong with the words of a command line, not with a value."""
    if missing := _MISSING.search(message):
        return "missing: " + ", ".join(f"--{name}" for name in missing[1].split(", "))
    commands = [name for name in options if not name.startswith("-")]
    if message.startswith('expected "subcommand"'):
        return f"name a command: {', '.join(commands)}"
    if unknown := _COMMAND.match(message):
        if unknown[1] in commands:
            return f"`lpl {unknown[1]}` takes its options after its name"
        meant = _nearest(unknown[1], commands) or f"; there are {', '.join(commands)}"
        return f"there is no command {unknown[1]}{meant}"
    unknown = _UNKNOWN.search(message)
    return message + (_nearest(unknown[1], options) if unknown else "")


def _more(path: str, text: str) -> str:
    """What the parser knows, or could know, of a class and does not say."""
    module, _, name = path.rpartition(".")
    if (refused := _OPTION.search(text)) and module:
        taken = _options(path)
        return _nearest(refused[2], taken) or (f". It takes {', '.join(taken)}" if taken else "")
    if text.startswith("No module named"):
        return f". `{path}` is to lie in {module.replace('.', '/')}.py, in the working directory or beside a config"
    if "has no attribute" in text and (origin := other_module(module.split(".")[0])) is not None:
        return f". Python finds {origin} under that name: call your own file something else"
    if "is abstract" in text and module:
        missing = sorted(getattr(getattr(import_module(module), name, None), "__abstractmethods__", ()))
        return f": it lacks {', '.join(missing)}" if missing else ""
    if "does not correspond to a subclass" in text and not inspect.isclass(getattr(import_module(module), name, None)):
        return ": it is no class"
    return ""


def _options(path: str) -> list[str]:
    """Names of what a class is built with, those that it hands on to its bases by ``**kwargs`` too."""
    try:
        found: list[str] = ArgumentParser().add_class_arguments(resolve_name(path), fail_untyped=False)
        return found
    except (ValueError, ImportError, AttributeError):  # such as of a function that makes a part
        return []


def _nearest(name: str, known: Iterable[str]) -> str:
    """The question whether another name was meant, where one is near."""
    near = get_close_matches(name, [*known], n=1, cutoff=0.75)
    return f". Did you mean {near[0]}?" if near else ""


def shows_tracebacks() -> bool:
    """Whether the environment asks for Python's tracebacks in the place of one line."""
    return os.environ.get(TRACEBACK, "0") != "0"


@contextmanager
def plain_refusals() -> Iterator[None]:
    """What a part refuses is the error; the parser's list of all that it tried is its cause."""
    try:
        yield
    except ValueError as error:
        said = refusal(error)
        if said is error:
            raise
        if not isinstance(said, REFUSALS):  # a mistake in a part: its text alone says too little
            raise ValueError(f"{_said_of_mistake(said)} {TRACEBACK}=1 shows how it came to that.") from error
        kind = type(said) if type(said) in (FileNotFoundError, ModuleNotFoundError) else ValueError
        raise kind(str(said)) from error


def refuse_arguments(error: ArgumentError, known: Sequence[str]) -> NoReturn:
    """End with one line on what the command line does not take, given what it does."""
    if shows_tracebacks():
        raise error
    print(f"lpl: error: {plain_error(str(error), known)}", file=sys.stderr)
    raise SystemExit(2) from None


def _said_of_mistake(error: BaseException) -> str:
    """What went wrong in a part's own code, such as a ``KeyError``, and where, in one sentence."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} in {last.filename}, line {last.lineno}: {error}."
