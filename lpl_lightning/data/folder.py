"""Images from a folder, whose sub-folders are the classes.

Two layouts are read; hidden files, files of other types and sub-folders without images are passed over::

    root/cat/1.png            root/1.png
    root/dog/deeper/2.jpg     root/2.jpg
    two classes               no classes

Without a folder of their own, validation images are held out of ``root``: those for whose path below it
``path_hash`` is less than ``val_fraction``. So an image keeps its split when others come or go.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lpl_lightning.data.base import ImageDataModule, Split, to_unit_range
from lpl_lightning.data.reading import load_rgb, reason, unreadable

__all__ = ["ImageFolderDataModule", "ImageFolderDataset"]

Crop = Literal["center", "random"]
Interpolation = Literal["bilinear", "bicubic", "lanczos"]

EXTENSIONS = (
    *(".apng", ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
STAGE_SPLITS: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": (),
}
SHOWN = 5  # names that a message spells out


def scan(root: Path, argument: str) -> dict[str | None, list[str]]:
    """List the images of a folder by class, in the same order on every machine.

    Args:
        root: The folder.
        argument: The argument that named it, for the errors.

    Returns:
        Paths by class name, the names sorted; under the one key None where there are no classes.
    """
    if not root.exists():
        raise FileNotFoundError(f"`{argument}` must be a folder of images, but {root} does not exist.")
    if not root.is_dir():
        raise ValueError(f"`{argument}` must be a folder of images, but {root} is a file; give its folder.")
    above = frozenset([os.path.realpath(root)])
    direct = [entry.path for entry in _visible(root) if _is_image(entry)]
    classes: dict[str | None, list[str]] = {
        entry.name: images
        for entry in _visible(root)
        if entry.is_dir() and (images := _images_below(entry.path, above))
    }
    if direct and classes:
        raise ValueError(
            f"`{argument}` must hold images either directly or in one sub-folder per class, but {root} holds "
            f"both: {_some(direct)} beside the sub-folders {_some(classes)}. Move either elsewhere."
        )
    if not direct and not classes:
        raise ValueError(
            f"`{argument}` must hold images, but no file in {root} or its sub-folders ends in one of "
            f"{' '.join(EXTENSIONS)}. Give another folder or convert the images."
        )
    return classes or {None: direct}


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir()


def _images_below(folder: str, above: frozenset[str]) -> list[str]:
    """Images at any depth; links are followed, save those back to a folder in ``above``, which would loop."""
    real = os.path.realpath(folder)
    if real in above:
        return []
    images = []
    for entry in _visible(folder):
        if entry.is_dir():
            images += _images_below(entry.path, above | {real})
        elif _is_image(entry):
            images.append(entry.path)
    return images


def _some(names: Iterable[str | None]) -> str:
    shown = [str(name) for name in names]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def path_hash(path: str, root: Path) -> float:
    """A number in [0, 1) that depends on the path relative to ``root`` alone."""
    relative = os.fsencode(PurePath(path).relative_to(root).as_posix())
    return int.from_bytes(hashlib.blake2b(relative, digest_size=6).digest(), "big") / 2**48


class ImageFolderDataset(Dataset[dict[str, Any]]):
    """Image files as square images.

    The shorter side is resized to ``image_size``, anti-aliased, up or down; the rest is cropped.

    Args:
        files: Path and class index of each image; an index of None leaves out the item's ``label``.
        image_size: Side of the images, in pixels.
        crop: Which square of the resized image: the centre, or one drawn anew each time.
        horizontal_flip: Mirror half of the images, drawn anew each time.
        interpolation: How to resize.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int | None]],
        image_size: int,
        crop: Crop = "center",
        horizontal_flip: bool = False,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        for name, value, choices in (
            ("crop", crop, get_args(Crop)),
            ("interpolation", interpolation, get_args(Interpolation)),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        self.files = files
        self.transform = v2.Compose(
            [
                v2.Resize(image_size, interpolation=v2.InterpolationMode(interpolation), antialias=True),
                v2.RandomCrop(image_size) if crop == "random" else v2.CenterCrop(image_size),
                v2.RandomHorizontalFlip(0.5 if horizontal_flip else 0.0),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.files[index]
        try:
            try:
                image = load_rgb(path)
            except Warning:
                # Pillow's remark on an odd file, where warnings are errors: no reason to end a run. The
                # filters are left alone otherwise: a change to them makes Python repeat warnings once shown.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    image = load_rgb(path)
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read ({reason(error)}). Remove or mend it, or set `verify: true` on "
                f"ImageFolderDataModule to pass over unreadable files from the start."
            ) from error
        item = {"image": to_unit_range(self.transform(image))}
        return item if label is None else {**item, "label": label}


class ImageFolderDataModule(ImageDataModule):
    """Images from folders; see the module's docstring for their layout.

    Args:
        root: Folder of the training images.
        image_size: Side of the images, in pixels; the shorter side is resized to it, the rest cropped.
        val_root: Folder of the validation images, whose classes must be among those of ``root``; None holds
            out ``val_fraction`` of the images of ``root``.
        val_fraction: Share of the images to hold out, in (0, 1); at least one image is.
        test_root: Folder of the test images, as ``val_root``; None tests on the validation images.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 decodes in the training process.
        crop: Which square of a training image: the centre, or one drawn anew each time; else the centre.
        horizontal_flip: Mirror half of the training images, drawn anew each time.
        interpolation: How to resize; always anti-aliased.
        verify: Decode every image once before the first step and leave out, with a warning, those that cannot
            be; False saves that time, and an unreadable image ends the run when it is met.
        num_generate: How many images ``lpl predict`` generates.
        generate_seed: Generated image ``i`` is drawn from seed ``generate_seed + i``.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        val_root: str | Path | None = None,
        val_fraction: float = 0.05,
        test_root: str | Path | None = None,
        batch_size: int = 32,
        num_workers: int = 2,
        crop: Crop = "center",
        horizontal_flip: bool = False,
        interpolation: Interpolation = "bicubic",
        verify: bool = True,
        num_generate: int = 64,
        generate_seed: int = 0,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers, num_generate, generate_seed)
        if not 0 < val_fraction < 1:
            raise ValueError(
                f"`val_fraction` must be in (0, 1), got {val_fraction}; to hold out none, give `val_root`."
            )
        self.root = Path(root).expanduser().absolute()
        self.val_root = None if val_root is None else Path(val_root).expanduser().absolute()
        self.val_fraction = val_fraction
        self.test_root = None if test_root is None else Path(test_root).expanduser().absolute()
        self.crop: Crop = crop
        self.horizontal_flip = horizontal_flip
        self.interpolation: Interpolation = interpolation
        self.verify = verify
        self._datasets: dict[Split, ImageFolderDataset] = {}

    @cached_property
    def _classes(self) -> dict[str | None, list[str]]:
        return scan(self.root, "root")

    @cached_property
    def _held_out(self) -> frozenset[str]:
        hashes = {path: path_hash(path, self.root) for paths in self._classes.values() for path in paths}
        chosen = [path for path, value in hashes.items() if value < self.val_fraction]
        chosen = chosen or [min(hashes, key=hashes.__getitem__)]
        if len(chosen) == len(hashes):
            raise ValueError(
                f"`val_fraction` must leave images to train on, but {self.val_fraction} holds out all "
                f"{len(hashes)} of {self.root}. Lower it, add images, or give `val_root` (`root` will do)."
            )
        return frozenset(chosen)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the sub-folders with images, sorted; lists ``root`` where ``setup`` has not yet."""
        return tuple(name for name in self._classes if name is not None)

    def setup(self, stage: str | None = None) -> None:
        """List the images that a stage needs and, with ``verify``, leave out those that cannot be read.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None for all.

        Raises:
            FileNotFoundError: If a folder does not exist.
            ValueError: If a folder's layout is wrong, or it holds no image that can be read.
        """
        _ = self._classes  # Also "predict", which reads no image, asks for the labels that `root` defines.
        self._prepare(STAGE_SPLITS.get(stage, ("train", "val", "test")))

    def dataset(self, split: Split) -> ImageFolderDataset:
        """The images of one split, prepared as by ``setup`` where it has not yet."""
        self._prepare([split])
        return self._datasets[self._source(split)]

    def _source(self, split: Split) -> Split:
        return "val" if split == "test" and self.test_root is None else split

    def _files(self, split: Split) -> list[tuple[str, int | None]]:
        labels = {name: None if name is None else label for label, name in enumerate(self._classes)}
        own = {"train": None, "val": self.val_root, "test": self.test_root}[split]
        classes = self._classes if own is None else scan(own, f"{split}_root")
        if unknown := [name or "images outside any sub-folder" for name in classes if name not in labels]:
            expected = f"only the classes {_some(self.class_names)}" if self.class_names else "no classes"
            raise ValueError(
                f"`{split}_root` must have {expected}, as `root` has, but {own} has {_some(unknown)}. "
                f"Rename or remove what `root` lacks."
            )
        files = [(path, labels[name]) for name, paths in classes.items() for path in paths]
        if own is None and self.val_root is None:
            files = [(path, label) for path, label in files if (path in self._held_out) == (split == "val")]
        if split != "train":
            # Not class by class: a run that looks at the first batches only must see all classes.
            files.sort(key=lambda pair: path_hash(pair[0], own or self.root))
        return files

    def _prepare(self, splits: Iterable[Split]) -> None:
        missing = {self._source(split) for split in splits} - self._datasets.keys()
        files = {split: self._files(split) for split in sorted(missing)}
        paths = list({path: None for pairs in files.values() for path, _ in pairs})
        if self.verify and paths:
            rank_zero_info(f"Decoding {len(paths):,} images once to verify them; `verify: false` skips this.")
        bad = unreadable(paths) if self.verify else {}
        reasons = _some(f"{path} ({reason})" for path, reason in bad.items())
        kept = {split: [pair for pair in pairs if pair[0] not in bad] for split, pairs in files.items()}
        if empty := [split for split, pairs in kept.items() if not pairs]:
            raise ValueError(
                f"The {empty[0]} images must be such that Pillow can read them, but none of "
                f"{len(files[empty[0]])} is: {reasons}. Mend or replace them, or give another folder."
            )
        if bad:
            rank_zero_warn(
                f"Left out {len(bad)} of {len(paths)} images that cannot be read: {reasons}. "
                f"Mend or remove them to be rid of this warning."
            )
        for split, pairs in kept.items():
            crop, flip = (self.crop, self.horizontal_flip) if split == "train" else ("center", False)
            self._datasets[split] = ImageFolderDataset(pairs, self.image_size, crop, flip, self.interpolation)
