"""The overlays of ``configs/data``: the same recipe trains from another source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from shard_files import photo, write_shards
from test_imagenet import by_folder

from lpl_lightning.cli import main

FOLDER = ROOT / "configs" / "data"


def shards(root: Path) -> list[str]:
    write_shards(root, [4, 4, 4])
    return [f"--data.urls={root}", "--data.val_fraction=0.3"]


def table(root: Path) -> list[str]:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [photo(number) for number in range(12)], "label": [number % 3 for number in range(12)]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=3))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(root)
    return [f"--data.path={root}", "--data.val_fraction=0.3", "--model.conditioner.num_classes=3"]


def imagenet(root: Path) -> list[str]:
    by_folder(root)
    return [f"--data.root={root}", "--model.conditioner.num_classes=3"]


CASES = {"webdataset": shards, "huggingface": table, "imagenet": imagenet}


def test_no_config_is_forgotten() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*CASES, "buckets"}  # tests/test_recipes.py has the latter


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_trains_from_another_source(tmp_path: Path, name: str) -> None:
    """Two steps of the folder's recipe, and what of its ``data`` the overlay does not set stays."""
    options = CASES[name](tmp_path / "data")
    rules: Any = {"stand_ins": {"lpl_lightning.ClassTokens": {"num_classes": 3 if name != "webdataset" else 0}}}
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(rules))
    configs = [
        ROOT / "configs/folder.yaml",
        ROOT / "configs/tiny.yaml",
        FOLDER / f"{name}.yaml",
        tmp_path / "classes.yaml",
    ]
    given = [word for config in configs for word in ("-c", str(config))]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.logger.init_args.save_dir={tmp_path / 'runs'}"]
    main(["fit", *given, *options, *quiet])
    (run,) = (tmp_path / "runs").glob("*/version_0")
    assert list(run.glob("samples/step-00000002.png"))
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert data["class_path"] == yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["data"]["class_path"]
    assert data["init_args"]["image_size"] == 64
    assert data["init_args"]["batch_size"] == 4
