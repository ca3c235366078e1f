"""Checks of arguments that many parts share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral
from pathlib import PurePath
from types import FrameType
from typing import Any, TypeVar

__all__ = [
    "NotFiniteError",
    "above",
    "at_least",
    "check_divides",
    "check_sizes",
    "raised_in",
    "read_settings",
    "refusal",
    "refused_by_loader",
    "whole_at_least",
]

Settings = TypeVar("Settings")


class NotFiniteError(FloatingPointError):
    """What ends a run whose loss or gradient is not finite, where it is asked to end then."""


def above(bound: float, **values: float) -> None:
    """Refuse numbers that are not above a bound.

    Args:
        bound: The largest that is not allowed.
        values: Arguments by name.

    Raises:
        ValueError: One is not above it.
    """
    for name, value in values.items():
        if not value > bound:
            raise ValueError(f"`{name}` must be above {bound}, got {value}.")


def at_least(least: float, **values: float) -> None:
    """Refuse numbers that are too small, and what is no number.

    Args:
        least: The smallest that is allowed.
        values: Arguments by name.

    Raises:
        ValueError: One is smaller, or NaN.
    """
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"`{name}` must be {least} or more, got {value}.")


def whole_at_least(least: int, **values: float) -> None:
    """Refuse numbers that are not whole, and those that are too small.

    Args:
        least: The smallest that is allowed.
        values: Arguments by name.

    Raises:
        ValueError: One is smaller, or not whole.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
    at_least(least, **values)


def read_settings(cls: type[Settings], argument: str, value: object) -> Settings:
    """Read settings that may be given by name.

    Args:
        cls: A dataclass with a default for each of them.
        argument: What the argument is called.
        value: The settings as they are, by name, or None for the defaults.

    Raises:
        ValueError: It is something else, or has an unknown name.
    """
    known: Any = cls
    names = [field.name for field in fields(known)]
    given = {} if value is None else value
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"`{argument}` must have settings among {', '.join(names)}, got {unknown}.")
        return cls(**given)
    if not isinstance(given, cls):
        kind = f"{'an' if cls.__name__[0] in 'AEIOU' else 'a'} {cls.__name__}"
        raise ValueError(f"`{argument}` must be {kind} or settings by name ({', '.join(names)}), got {given!r}.")
    return given


def refusal(error: BaseException) -> BaseException:
    """What a part said when a parser built it, under the errors that the parser made of that.

    Args:
        error: What came out of the parser.

    Returns:
        The first of its causes that was not raised by the parser itself, or the last where all were.
    """
    if not _is_of_parser(error):
        return error
    said = [refusal(cause) for cause in _causes(error)]
    return next((one for one in said if not _is_of_parser(one)), said[0] if said else error)


def _is_of_parser(error: BaseException) -> bool:
    return raised_in(error).startswith("jsonargparse")


def _causes(error: BaseException) -> list[BaseException]:
    """What made a parser raise an error: of a union, all its members' errors, of which it chains the first alone."""
    place = _place(error)
    tried = place.f_locals.get("exceptions") if place is not None else None
    if isinstance(tried, list) and error.__cause__ is not None and error.__cause__ in tried:
        return tried
    return [] if error.__cause__ is None else [error.__cause__]


def raised_in(error: BaseException) -> str:
    """Name of the module that raised it."""
    place = _place(error)
    return "" if place is None else str(place.f_globals.get("__name__", ""))


def _place(error: BaseException) -> FrameType | None:
    """Where it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else trace.tb_frame


def refused_by_loader(error: BaseException) -> str:
    """What the package refused in a loader process, whose errors torch hands on as the text of a traceback.

    Args:
        error: What torch made of it.

    Returns:
        The message; nothing where the error is another.
    """
    text = str(error)
    if not re.match(r"Caught (Unreadable|\w*(Value|NotFound)Error) in DataLoader worker process", text):
        return ""
    *_, (place, rest) = [("", ""), *re.findall(r'^  File "(.+)", line .*\n((?:(?!  File ).*\n?)*)', text, re.MULTILINE)]
    said = re.sub(r"\A(?: .*\n)*", "", rest)  # the lines of code
    is_own = "lpl_lightning" in PurePath(place).parts
    return said.partition(": ")[2].strip() if is_own else ""


def check_divides(image_size: int, downscale: int) -> None:
    """Refuse images that an autoencoder cannot take.

    Args:
        image_size: Side of the data's images, in pixels.
        downscale: Side of an image over the side of its latent.

    Raises:
        ValueError: The one does not divide the other.
    """
    if image_size % downscale:
        below = max(downscale, image_size // downscale * downscale)
        raise ValueError(
            f"`image_size`={image_size} of the data must be divisible by {downscale}, the autoencoder's "
            f"downscaling; the nearest are {(below, below + downscale)}."
        )


def check_sizes(sizes: Iterable[tuple[int, int]], divisor: int, why: str) -> None:
    """Refuse images of many sizes where a model cannot take one of them.

    Args:
        sizes: Height and width of the data's images, in pixels.
        divisor: What both must be multiples of.
        why: The reason.

    Raises:
        ValueError: One is not.
    """
    for height, width in sizes:
        if height % divisor or width % divisor:
            raise ValueError(
                f"The data's `buckets` make images of {height} x {width}, but both sides must be multiples of "
                f"{divisor}: {why}. Set `divisor` of `buckets` to {divisor}, or to a multiple of it."
            )
