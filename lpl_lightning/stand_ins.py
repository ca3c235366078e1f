"""What stands in for what in a config: local folders for hub ids, small models for large ones.

An overlay can then move any config to a cluster without network, or shrink it to what a laptop rehearses in seconds,
without naming the config's keys::

    stand_ins:
      stabilityai/sdxl-vae: /models/sdxl-vae
      diffusers.SD3Transformer2DModel: {num_layers: 2}
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any, cast

import yaml
from jsonargparse import Namespace

__all__ = ["StandIns", "merged", "put_all_stand_ins", "put_stand_ins"]

StandIns = dict[str, str | dict[str, Any] | None]
"""By hub id (or any other string of the config) what is written in its place; by class path the arguments that are laid
over those given."""


def merged(rules: Iterable[StandIns]) -> StandIns:
    """One set of rules, in which later ones are laid over those before: arguments of a class one by one."""
    found: StandIns = {}
    for more in rules:
        for name, value in more.items():
            known = found.get(name)
            found[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return found


def put_all_stand_ins(config: Namespace) -> list[str]:
    """Put the stand-ins of all files of a command's config in it, of which its parser keeps those of the last alone.

    Args:
        config: The parsed config, with its files as ``config``. Changed in place.

    Returns:
        What has been replaced, a line each.

    Raises:
        ValueError: Arguments are given for what is no class.
    """
    rules = merged([*(_rules(path) for path in config.get("config") or []), config.stand_ins])
    said = [
        said for part in vars(config).values() if isinstance(part, Namespace) for said in put_stand_ins(part, rules)
    ]
    config.stand_ins = rules
    return said


def _rules(path: Any) -> StandIns:
    rules: StandIns = (yaml.safe_load(path.get_content()) or {}).get("stand_ins") or {}
    return rules


def put_stand_ins(config: Namespace, stand_ins: StandIns) -> list[str]:
    """Put stand-ins in a config, wherever it names what they stand in for, whatever it says there.

    Args:
        config: A parsed config that nothing is built of yet. Changed in place.
        stand_ins: What to put; names that the config does not have are passed over.

    Returns:
        What has been replaced, a line each.

    Raises:
        ValueError: Arguments are given for what is no class.
    """
    strings = {name: value for name, value in stand_ins.items() if not isinstance(value, dict)}
    classes = {_class(name): value for name, value in stand_ins.items() if isinstance(value, dict)}
    if None in classes:
        (name, *_) = (name for name, value in stand_ins.items() if isinstance(value, dict) and _class(name) is None)
        raise ValueError(
            f"`stand_ins`: {name!r} has arguments, so it must be the path of a class, which it is not. Give a string "
            "to stand in for a string."
        )
    said: dict[str, None] = {}

    def put(value: Any) -> Any:
        if isinstance(value, str) and value in strings:
            said[f"{strings[value]} for {value}"] = None
            return strings[value]
        if isinstance(value, list):
            return [put(item) for item in value]
        if isinstance(value, dict):
            return {key: put(item) for key, item in value.items()}
        if isinstance(value, Namespace):
            for key, item in vars(value).items():
                setattr(value, key, put(item))
            if isinstance(path := vars(value).get("class_path"), str) and (given := classes.get(_class(path))):
                own = vars(value).setdefault("init_args", cast(Any, Namespace)())
                if changed := [f"{key} {item}" for key, item in given.items() if vars(own).get(key) != item]:
                    said[f"{path.rsplit('.', 1)[-1]} with {', '.join(changed)}"] = None
                for key, item in given.items():
                    setattr(own, key, item)
        return value

    put(config)
    return list(said)


def _class(path: str) -> Any:
    """What a class path names, so that a class is known under each of its paths; None if nothing."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
