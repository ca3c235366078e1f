from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_files import photo

from lpl_lightning.data import ImageNetDataModule

WNIDS = ("n01440764", "n02102040", "n03000684")
VAL = {f"ILSVRC2012_val_{number:08}": WNIDS[number % 3] for number in (7, 1, 5, 2, 3, 4)}
NUMBERS = {"n02102040": 1, "n03000684": 2, "n01440764": 3}
"""The development kit counts the classes in another order than that of their ids."""


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed).save(path, "JPEG")


def train(folder: Path) -> None:
    for wnid in reversed(WNIDS):
        for number in (3, 10):
            save(folder / "train" / wnid / f"{wnid}_{number}.JPEG", number)


def by_folder(root: Path) -> None:
    train(root)
    for name, wnid in VAL.items():
        save(root / "val" / wnid / f"{name}.JPEG", int(name[-2:]))


def flat(root: Path) -> None:
    train(root)
    for name in VAL:
        save(root / "val" / f"{name}.JPEG", int(name[-2:]))
    (root / "val/.thumbnails").mkdir()


def kaggle(root: Path) -> None:
    flat(root / "ILSVRC/Data/CLS-LOC")
    with (root / "LOC_val_solution.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        rows.writerows([name, f"{wnid} 1 2 30 40 {wnid} 5 6 7 8 "] for name, wnid in VAL.items())
    (root / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn02102040 English springer\nn03000684 chain saw, chainsaw\n"
    )


def kit(root: Path) -> None:
    scipy = pytest.importorskip("scipy.io")
    flat(root)
    data = root / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    numbers = [NUMBERS[VAL[name]] for name in sorted(VAL)]
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in numbers))
    kinds: Any = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    synsets = [(number, wnid, 0) for wnid, number in NUMBERS.items()] + [(4, "n00001740", 3)]
    scipy.savemat(data / "meta.mat", {"synsets": np.array(synsets, dtype=kinds)[:, None]})


@pytest.mark.parametrize("layout", [by_folder, kaggle, kit], ids=lambda layout: layout.__name__)
def test_every_layout_has_the_same_labels(tmp_path: Path, layout: Callable[[Path], None]) -> None:
    layout(tmp_path)
    data = ImageNetDataModule(tmp_path, 8, batch_size=4, num_workers=0)
    data.setup()
    assert data.class_names == WNIDS
    files = {Path(path).stem: label for path, label in data.dataset("val").files}
    assert files == {name: WNIDS.index(wnid) for name, wnid in VAL.items()}
    found = {Path(path).stem: label for path, label in data.dataset("train").files}
    assert found == {f"{wnid}_{number}": label for label, wnid in enumerate(WNIDS) for number in (3, 10)}
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["label"].dtype.is_signed
    assert data.descriptions == (
        ("tench, Tinca tinca", "English springer", "chain saw, chainsaw") if layout is kaggle else ()
    )


def test_a_flat_folder_needs_a_table(tmp_path: Path) -> None:
    flat(tmp_path)
    with pytest.raises(ValueError, match=r"it takes Kaggle's LOC_val_solution.csv, or .* neither is there\. Put them"):
        ImageNetDataModule(tmp_path, 8).setup()
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n" * 6)
    with pytest.raises(ValueError, match=r"its numbers mean nothing without meta.mat of the same kit"):
        ImageNetDataModule(tmp_path, 8).setup()


def test_a_table_must_have_all_images(tmp_path: Path) -> None:
    kaggle(tmp_path)
    save(tmp_path / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000009.JPEG", 9)
    with pytest.raises(ValueError, match=r"1 of 7 validation images are not in the table .*00000009"):
        ImageNetDataModule(tmp_path, 8).setup()
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,\n")
    with pytest.raises(ValueError, match=r"must have the columns ImageId and PredictionString, .* in each row"):
        ImageNetDataModule(tmp_path, 8).setup()


def test_a_kit_must_fit_the_images(tmp_path: Path) -> None:
    kit(tmp_path)
    truth = tmp_path / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    for text in ("1\n2\n", "4\n" * 6):
        truth.write_text(text)
        with pytest.raises(ValueError, match=r"must have a number of meta.mat for each of the 6 images"):
            ImageNetDataModule(tmp_path, 8).setup()


def test_what_is_not_imagenet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`root` must be a folder with train/ and val/.* has neither"):
        ImageNetDataModule(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match=r"does not exist"):
        ImageNetDataModule(tmp_path / "none", 8)
    train(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold validation images, but .*val does not exist"):
        ImageNetDataModule(tmp_path, 8)
    save(tmp_path / "val/n01440764/a.JPEG", 1)
    save(tmp_path / "train/cat/a.JPEG", 1)
    with pytest.raises(ValueError, match=r"a folder for each WordNet id, .* has cat\. .*ImageFolderDataModule"):
        ImageNetDataModule(tmp_path, 8).setup()


def test_validation_images_of_an_unknown_class_are_refused(tmp_path: Path) -> None:
    by_folder(tmp_path)
    save(tmp_path / "val/n09999999/a.JPEG", 1)
    with pytest.raises(ValueError, match=r"`val_root` must have only the classes n01440764.* has n09999999"):
        ImageNetDataModule(tmp_path, 8).setup()


def test_bad_images_follow_the_policy(tmp_path: Path) -> None:
    by_folder(tmp_path)
    (tmp_path / "val" / WNIDS[0] / "torn.JPEG").write_bytes(b"torn")
    data = ImageNetDataModule(tmp_path, 8, num_workers=0, report=tmp_path / "report.jsonl", max_bad_share=0.5)
    batch = next(iter(data.val_dataloader()))
    assert len(batch["image"]) == 7
    assert "torn.JPEG" in (tmp_path / "report.jsonl").read_text()
