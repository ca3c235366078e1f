"""The notebooks are as they are stored, teach what runs, and give what they show."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason='notebooks need nbformat: pip install -e ".[dev]"')

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAME = ("results", "what_lpl_sees", "your_own_loop")
"""Notebooks whose printed output does not depend on a clock or on long training."""
MOST_BYTES = 300_000
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|\bnan\b")
NAMES = [path.stem for path in NOTEBOOKS]


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any, stream: str = "stdout") -> str:
    outputs = cell.outputs
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == stream)


def compare(stored: str, found: str, where: str) -> None:
    """Words must be the same, numbers nearly: other processors and versions round otherwise."""
    assert NUMBER.sub("0", stored).split() == NUMBER.sub("0", found).split(), where
    for old, new in zip(NUMBER.findall(stored), NUMBER.findall(found), strict=True):
        step = 10.0 ** -len(old.partition(".")[2])  # of its last digit
        assert float(new) == pytest.approx(float(old), rel=0.05, abs=2 * step, nan_ok=True), f"{where}: {old}, {new}"


def test_there_are_five_and_readme_links_them() -> None:
    readme = (ROOT / "README.md").read_text()
    assert NAMES == ["results", "threshold_weight_budget", "train_and_compare", "what_lpl_sees", "your_own_loop"]
    assert all(f"](notebooks/{name}.ipynb)" in readme for name in NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_is_stored_whole_and_small(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    remedy = "execute and store it with the command that CONTRIBUTING.md has"
    assert path.stat().st_size < MOST_BYTES
    assert list(notebook.metadata) == ["kernelspec"], remedy
    assert notebook.metadata.kernelspec.name == "python3", remedy
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), remedy
    assert all(not cell.metadata for cell in notebook.cells), remedy
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs, remedy
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}, "no errors"
    assert not any(printed(cell, "stderr") for cell in cells), "no warnings, logs or progress bars"
    assert not any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outputs), "no widgets"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_names_nothing_of_the_machine_it_was_stored_on(path: Path) -> None:
    for cell in read(path).cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts.append(output.get("text", ""))
            texts += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
        for text in texts:
            assert not re.search(r"(?<![\w.:/])/(?:[a-z]\w*/)+|[A-Z]:\\|0x[0-9a-fA-F]{8}", text), text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebooks_links_exist(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        if target.startswith("http"):
            continue
        file = path.parent / target
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{target}#{anchor}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebooks_code_parses_and_uses_public_names(path: Path) -> None:
    for cell in code_cells(read(path)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Attribute):
                assert not re.match(r"_[a-z]", node.attr), node.attr
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lpl_lightning":
                module = __import__(node.module or "", fromlist=["__all__"])
                missing = [alias.name for alias in node.names if alias.name not in module.__all__]
                assert not missing, f"{node.module} does not say {missing} in __all__"


def test_ruff_finds_nothing() -> None:
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *map(str, NOTEBOOKS)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_printed_is_compared_by_words_and_numbers() -> None:
    compare("loss 0.120 of 8", "loss  0.121 of 8", "here")
    for other in ("loss 0.14 of 8", "gain 0.120 of 8", "loss 0.120 of 8 9", "loss nan of 8"):
        with pytest.raises(AssertionError):
            compare("loss 0.120 of 8", other, "here")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_runs_anywhere(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder without anything of the repository; where nothing depends on a clock, printing what it has stored.

    Results are read from the tables beside their notebook, which go along.
    """
    tables = [*(ROOT / "notebooks").glob("*.csv")] if path.stem == "results" else []
    for table in tables:
        shutil.copy(table, tmp_path)
    nbclient = pytest.importorskip("nbclient", reason='notebooks need nbclient: pip install -e ".[dev]"')
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stored, executed = read(path), read(path)
    client = nbclient.NotebookClient(
        executed, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    start = time.perf_counter()
    client.execute()
    print(f"{path.stem}: {time.perf_counter() - start:.0f} s")
    written = {found.name for found in tmp_path.iterdir()} - {"ipython", *(table.name for table in tables)}
    assert not written, "notebooks leave nothing behind"
    if path.stem in SAME:
        for old, new in zip(code_cells(stored), code_cells(executed), strict=True):
            compare(printed(old), printed(new), f"{path.stem}, cell {old.execution_count}")
