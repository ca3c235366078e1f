"""A file imports only from those above it: data flows one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import lpl_lightning

PACKAGE = ROOT / "lpl_lightning"
LAYOUT = [line.split("|")[1] for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| `")]
ORDER = [*re.findall(r"`(\w+)(?:\.py|/)`", " ".join(LAYOUT)), "__main__"]
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def unit(name: str) -> str:
    return name.split(".")[1]


def test_the_layout_has_each_file_once() -> None:
    """That of CONTRIBUTING.md, whose order is the one that imports follow."""
    units = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert sorted(ORDER) == sorted(units)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text())
    names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    names += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    for name in names:
        if name.startswith("lpl_lightning."):
            assert ORDER.index(unit(name)) <= ORDER.index(own), f"{own} imports {name}"
        assert name != "lpl_lightning", "import from the file, not from the package that imports it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_names_are_listed_and_files_are_short(path: Path) -> None:
    source = path.read_text()
    assert path.name == "__main__.py" or "__all__" in source
    assert len(source.splitlines()) <= 350


def test_every_public_name_is_there() -> None:
    for name in lpl_lightning.__all__:
        assert getattr(lpl_lightning, name).__doc__


def test_the_package_imports_nothing_large_before_it_is_asked_for() -> None:
    code = "import sys, lpl_lightning; lpl_lightning.__version__; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    large = {"torch", "lightning", "diffusers", "transformers", "open_clip", "matplotlib", "torchvision"}
    assert large.isdisjoint(found.stdout.split())
    assert "lpl_lightning" in found.stdout.split()
