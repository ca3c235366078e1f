"""What stands in for what in a config: local folders for hub ids, small models for large ones.

An overlay can then move any config to a cluster without network, or shrink it to what a laptop rehearses in seconds,
without naming the config's keys::

    stand_ins:
      stabilityai/sdxl-vae: /models/sdxl-vae
      diffusers.SD3Transformer2DModel: {num_layers: 2}
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from jsonargparse import Namespace

__all__ = ["StandIns", "put_stand_ins"]

StandIns = dict[str, str | dict[str, Any] | None]
"""By hub id (or any other string of the config) what is written in its place; by class path the arguments that are laid
over those given."""


def put_stand_ins(config: Namespace, stand_ins: Mapping[str, str | dict[str, Any] | None]) -> None:
    """Put stand-ins in a config, wherever it names what they stand in for.

    Args:
        config: A parsed config that nothing is built of yet. Changed in place.
        stand_ins: What to put; names that the config does not have are passed over.

    Raises:
        ValueError: Arguments are given for what is no class.
    """
    strings = {name: value for name, value in stand_ins.items() if not isinstance(value, dict)}
    classes = {_class(name): value for name, value in stand_ins.items() if isinstance(value, dict)}

    def put(value: Any) -> Any:
        if isinstance(value, str):
            return strings.get(value, value)
        if isinstance(value, list):
            return [put(item) for item in value]
        if isinstance(value, Namespace):
            for key, item in vars(value).items():
                setattr(value, key, put(item))
            if isinstance(path := vars(value).get("class_path"), str):
                for key, item in classes.get(_class(path), {}).items():
                    setattr(value.init_args, key, item)
        return value

    put(config)


def _class(path: str) -> Any:
    """What a class path names, so that a class is known under each of its paths."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`stand_ins`: {path!r} has arguments, so it must be the path of a class, which it is not ({error}). Give "
            "a string to stand in for a string."
        ) from error
