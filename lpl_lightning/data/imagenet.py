"""ImageNet (ILSVRC 2012) in the layouts that people have.

Classes are the WordNet ids, sorted. Training images lie in a folder for each; validation images likewise, or in one
folder, and then it takes a table to know their classes::

    root/train/n01440764/n01440764_10026.JPEG     root/ILSVRC/Data/CLS-LOC/train/n01440764/...  (Kaggle)
    root/val/n01440764/ILSVRC2012_val_00000293.JPEG    root/ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG
                                                       root/LOC_val_solution.csv

Without Kaggle's ``LOC_val_solution.csv`` the table is ``ILSVRC2012_validation_ground_truth.txt`` of the development
kit, whose numbers mean the classes that its ``meta.mat`` lists, in another order than that of their ids.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from lpl_lightning.data.crops import Crop, Interpolation
from lpl_lightning.data.faults import OnError
from lpl_lightning.data.folder import ImageFolderDataModule
from lpl_lightning.data.listing import images_below, scan, some
from lpl_lightning.data.samples import optional

__all__ = ["ImageNetDataModule"]

ROOTS = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
"""Where ``train`` and ``val`` may lie below the root."""

KITS = ("", "ILSVRC2012_devkit_t12/data", "devkit/data", "data", "ILSVRC2012_devkit_t12")
"""Where the files of the development kit may lie."""

SOLUTION, WORDS = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet; see the module's docstring for its layouts.

    Args:
        root: Folder of ImageNet as it was unpacked, by hand or from Kaggle.
        image_size: Side of the images, in pixels; the shorter side is resized to it, the rest cropped.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 decodes in the training process.
        crop: Which square of a training image: the centre, or one drawn anew each time; else the centre.
        horizontal_flip: Mirror half of the training images, drawn anew each time.
        interpolation: How to resize; always anti-aliased.
        verify: Decode every image once before the first step.
        on_error: What becomes of images that cannot be read: ``skip`` or ``raise``, as in ``ImageFolderDataModule``.
        max_bad_share: Share of them, in [0, 1], above which the run ends all the same.
        report: File that names them; by default ``bad_data.jsonl`` in the run's folder.
        num_generate: How many images ``lpl predict`` generates.
        generate_seed: Generated image ``i`` is drawn from seed ``generate_seed + i``.
        prompts: Text file of captions for ``lpl predict``, one a line.

    Raises:
        FileNotFoundError: ``root``, or ``train`` or ``val`` in it, is not there.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        batch_size: int = 32,
        num_workers: int = 2,
        crop: Crop = "center",
        horizontal_flip: bool = False,
        interpolation: Interpolation = "bicubic",
        verify: bool = False,
        on_error: OnError = "skip",
        max_bad_share: float = 0.1,
        report: str | Path | None = None,
        num_generate: int = 64,
        generate_seed: int = 0,
        prompts: str | Path | None = None,
    ) -> None:
        self.top = Path(root).expanduser().absolute()
        images = _images(self.top)
        super().__init__(
            images / "train",
            image_size,
            images / "val",
            batch_size=batch_size,
            num_workers=num_workers,
            crop=crop,
            horizontal_flip=horizontal_flip,
            interpolation=interpolation,
            verify=verify,
            on_error=on_error,
            max_bad_share=max_bad_share,
            report=report,
            num_generate=num_generate,
            generate_seed=generate_seed,
            prompts=prompts,
        )

    @property
    def descriptions(self) -> tuple[str, ...]:
        """Words for each class, of Kaggle's ``LOC_synset_mapping.txt``; empty where that is absent."""
        path = _find(self.top, WORDS)
        if path is None:
            return ()
        words = dict(line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines() if " " in line)
        return tuple(words.get(name, name) for name in self.class_names)

    def _scan(self, folder: Path, argument: str) -> dict[str | None, list[str]]:
        if argument == "val_root" and not any(entry.is_dir() and entry.name[0] != "." for entry in folder.iterdir()):
            paths = images_below(folder, "root")
            return _by_class(paths, _classes_of(self.top, folder, paths))
        classes = scan(folder, "root")
        if other := [name for name in classes if name is None or not re.fullmatch(r"n\d{8}", name)]:
            found = "images outside any folder" if other == [None] else some(other)
            raise ValueError(
                f"`root` must have a folder for each WordNet id, such as n01440764, in {folder}, but that has {found}. "
                "For images of other classes take ImageFolderDataModule."
            )
        return classes


def _images(top: Path) -> Path:
    """The folder with ``train`` and ``val``."""
    for place in ROOTS:
        if (top / place / "train").is_dir():
            if not (top / place / "val").is_dir():
                raise FileNotFoundError(
                    f"`root` must hold validation images, but {top / place / 'val'} does not exist."
                )
            return top / place
    raise FileNotFoundError(
        f"`root` must be a folder with train/ and val/, or Kaggle's with ILSVRC/Data/CLS-LOC/train/, but {top} "
        f"{'has neither' if top.is_dir() else 'does not exist'}."
    )


def _find(top: Path, name: str) -> Path | None:
    places = [top / place / name for place in (*ROOTS, *KITS)]
    return next((path for path in places if path.is_file()), None)


def _by_class(paths: list[str], wnids: dict[str, str]) -> dict[str | None, list[str]]:
    if lacking := [path for path in paths if Path(path).stem not in wnids]:
        raise ValueError(
            f"{len(lacking)} of {len(paths)} validation images are not in the table of their classes: {some(lacking)}. "
            "Remove them, or complete it."
        )
    classes: dict[str | None, list[str]] = {}
    for wnid, path in sorted((wnids[Path(path).stem], path) for path in paths):
        classes.setdefault(wnid, []).append(path)
    return classes


def _classes_of(top: Path, folder: Path, paths: list[str]) -> dict[str, str]:
    """WordNet ids of validation images that lie in one folder, by the images' names without ending."""
    solution, truth, meta = (_find(top, name) for name in (SOLUTION, TRUTH, META))
    if solution is not None:
        with solution.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        try:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        except (KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{solution} must have the columns ImageId and PredictionString, as Kaggle's has, in each row."
            ) from error
    if truth is not None and meta is not None:
        numbers = truth.read_text(encoding="ascii").split()
        ids = _synsets(meta)
        found = sorted(Path(path).stem for path in paths)
        if len(numbers) != len(found) or not all(number in ids for number in numbers):
            raise ValueError(
                f"{truth} must have a number of {META} for each of the {len(found)} images of {folder}, in the order "
                f"of their names, but has {len(numbers)}, or others."
            )
        return {name: ids[number] for name, number in zip(found, numbers, strict=True)}
    has = (
        f"{truth} is there, but its numbers mean nothing without {META} of the same kit"
        if truth
        else "neither is there"
    )
    raise ValueError(
        f"The validation images in {folder} are not in folders of their classes, so that it takes Kaggle's {SOLUTION}, "
        f"or {TRUTH} and {META} of ILSVRC2012_devkit_t12.tar.gz, in {top}: {has}. Put them there, or move the images "
        "into a folder for each WordNet id."
    )


def _synsets(meta: Path) -> dict[str, str]:
    """WordNet ids by number, of the classes that have no others below them."""
    try:
        scipy: Any = optional("scipy.io")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"Reading {meta} needs scipy: pip install scipy.", name="scipy") from error
    synsets = scipy.loadmat(str(meta), squeeze_me=True)["synsets"]
    return {str(int(one["ILSVRC2012_ID"])): str(one["WNID"]) for one in synsets if int(one["num_children"]) == 0}
