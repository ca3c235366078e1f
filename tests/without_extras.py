"""Runs ``lpl`` as if nothing but the package's own dependencies were installed: ``python without_extras.py ARGS``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def extras() -> set[str]:
    """Modules of what is installed for the extras alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {name_of(one) for one in project["dependencies"]}
    asked = {name_of(one) for found in project["optional-dependencies"].values() for one in found} - needed
    return {
        module
        for module, names in importlib.metadata.packages_distributions().items()
        if any(name.lower().replace("_", "-") in asked for name in names)
    }


class Hidden:
    """Finds none of them."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    hidden = extras()
    assert {"torch_fidelity", "transformers", "datasets", "matplotlib"} <= hidden
    find, version = importlib.util.find_spec, importlib.metadata.version

    def found(name: str, package: str | None = None) -> Any:
        return None if name.partition(".")[0] in hidden else find(name, package)

    def known(distribution_name: str) -> str:
        if distribution_name.replace("-", "_") in hidden:
            raise importlib.metadata.PackageNotFoundError(distribution_name)
        return version(distribution_name)

    # Libraries ask in each of these ways what there is.
    sys.meta_path.insert(0, Hidden(hidden))
    importlib.util.find_spec, importlib.metadata.version = found, known
    from lpl_lightning.cli import main

    main()
