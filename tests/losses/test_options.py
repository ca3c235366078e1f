"""The table of options says what the presets hold, and names tests that exist."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, tiny_kl

from lpl_lightning import Autoencoder, LatentPerceptualLoss
from lpl_lightning.losses.gate import Threshold
from lpl_lightning.losses.options import PRESETS, LossOptions

TABLE = ROOT / "lpl_lightning" / "losses" / "README.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.read_text().partition("## ")[0].splitlines()
    if line.startswith("| `")
]


def test_every_option_is_in_the_table() -> None:
    assert [row[0].strip("`") for row in ROWS] == [field.name for field in fields(LossOptions)]


@pytest.mark.parametrize("column", [1, 2], ids=["paper", "diffusers"])
def test_the_table_has_the_presets_values(column: int) -> None:
    options = LossOptions.of(("paper", "diffusers")[column - 1])
    for row in ROWS:
        value = getattr(options, row[0].strip("`"))
        if isinstance(value, Threshold):
            ((unit, number),) = ((f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name))
            value = f"{unit} {number}"
        assert row[column] == str(list(value) if isinstance(value, tuple) else value), row[0]


def test_the_table_names_tests_that_exist() -> None:
    sources = "\n".join(path.read_text() for path in Path(ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"def (test_\w+)", sources))
    for row in ROWS:
        assert row[4].strip("`") in names, row[0]


@pytest.mark.parametrize("name", ["depth_weights", "dilation", "erosion"])
def test_entries_of_lists_are_those_of_the_stages_named_beside_them(name: str) -> None:
    """Or refused: stages are compared in the order they run, in which a list would be another stage's."""
    autoencoder, entries = Autoencoder(tiny_kl()), [1, 3]
    in_order = LatentPerceptualLoss(autoencoder, depth=["mid", "up_1"], **{name: entries})  # type: ignore[arg-type]
    assert in_order.compared == ("mid", "up_1")
    assert in_order.options.of_map(name, 1, 2) == 3
    with pytest.raises(ValueError, match=rf"in the order they run where `{name}` is a list.*'mid', 'up_1'"):
        LatentPerceptualLoss(autoencoder, depth=["up_1", "mid"], **{name: entries})  # type: ignore[arg-type]
    if name != "depth_weights":  # which nothing reads then
        LatentPerceptualLoss(autoencoder, depth=["up_1", "mid"], mask_outliers=False, **{name: entries})  # type: ignore[arg-type]
    assert LatentPerceptualLoss(autoencoder, depth=["up_1", "mid"]).compared == ("mid", "up_1")
    with pytest.raises(ValueError, match=rf"`{name}` as a list must have an entry for each"):
        LatentPerceptualLoss(autoencoder, depth=3, **{name: entries})  # type: ignore[arg-type]


def test_rgb_is_the_paper_with_four_options_changed() -> None:
    changed = {name for name, value in PRESETS["rgb"].items() if value != PRESETS["paper"][name]}
    assert changed == {"depth", "statistics", "depth_weights", "mask_outliers"}
