"""Images from a folder, whose sub-folders are the classes, or whose images have captions.

Two layouts are read; hidden files, files of other types and sub-folders without images are passed over::

    root/cat/1.png            root/1.png
    root/dog/deeper/2.jpg     root/2.jpg
    two classes               no classes

With captions (``captions.py`` says where they are written) the sub-folders say nothing: all images in ``root``, at
any depth, are one set without classes.

Without a folder of their own, validation images are held out of ``root``: those for whose path below it
``path_hash`` is less than ``val_fraction``. So an image keeps its split when others come or go.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from lpl_lightning.data.base import ImageDataModule, Split
from lpl_lightning.data.captions import CaptionSource, MissingCaptions, read_metadata, read_sidecars
from lpl_lightning.data.crops import Crop, Interpolation, SquareCrop
from lpl_lightning.data.listing import images_below, path_hash, scan, some
from lpl_lightning.data.reading import load_rgb, reason, unreadable

__all__ = ["ImageFolderDataModule", "ImageFolderDataset"]

STAGE_SPLITS: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": (),
}


class ImageFolderDataset(Dataset[dict[str, Any]]):
    """Image files as square images.

    The shorter side is resized to ``image_size``, anti-aliased, up or down; the rest is cropped. Items also hold the
    ``original_size`` and ``crop_top_left`` of ``SquareCrop``.

    Args:
        files: Path and class index of each image; an index of None leaves out the item's ``label``.
        image_size: Side of the images, in pixels.
        crop: Which square of the resized image: the centre, or one drawn anew each time.
        horizontal_flip: Mirror half of the images, drawn anew each time.
        interpolation: How to resize.
        captions: Captions of each image, at least one; None leaves out the items' ``caption``.
        draw_caption: Give one of an image's captions, drawn anew each time; otherwise its first.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int | None]],
        image_size: int,
        crop: Crop = "center",
        horizontal_flip: bool = False,
        interpolation: Interpolation = "bicubic",
        captions: Sequence[Sequence[str]] | None = None,
        draw_caption: bool = False,
    ) -> None:
        if captions is not None and len(captions) != len(files):
            raise ValueError(f"`captions` must be those of {len(files)} files, got {len(captions)}.")
        self.files = files
        self.transform = SquareCrop(image_size, crop, horizontal_flip, interpolation)
        self.captions = captions
        self.draw_caption = draw_caption

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
        item: dict[str, Any] = {**self.transform(image)}
        if label is not None:
            item["label"] = label
        if self.captions is not None:
            captions = self.captions[index]
            item["caption"] = captions[int(torch.randint(len(captions), ())) if self.draw_caption else 0]
        return item


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
        captions: Where the captions are: ``sidecar``, in text files beside the images, or ``metadata``, in
            ``metadata.jsonl`` or ``metadata.csv``. All are held in memory from the first step on. Of several
            captions of a training image one is drawn anew each time; else its first is taken. None reads no
            captions: then sub-folders are classes.
        caption_column: Column of the captions in ``metadata``, or a list of such columns.
        missing_captions: What becomes of images without a caption: ``raise`` an error before the first step, ``skip``
            them, or take them with an ``empty`` caption.
        num_generate: How many images ``lpl predict`` generates.
        generate_seed: Generated image ``i`` is drawn from seed ``generate_seed + i``.
        prompts: Text file of the captions that ``lpl predict`` goes round, one a line; None takes those of the
            validation images.
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
        captions: CaptionSource | None = None,
        caption_column: str | list[str] = "text",
        missing_captions: MissingCaptions = "raise",
        num_generate: int = 64,
        generate_seed: int = 0,
        prompts: str | Path | None = None,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers, num_generate, generate_seed, prompts)
        if not 0 < val_fraction < 1:
            raise ValueError(
                f"`val_fraction` must be in (0, 1), got {val_fraction}; to hold out none, give `val_root`."
            )
        for name, value, choices in (
            ("captions", captions, (None, *get_args(CaptionSource))),
            ("missing_captions", missing_captions, get_args(MissingCaptions)),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, choices))}, got {value!r}.")
        self.root = Path(root).expanduser().absolute()
        self.val_root = None if val_root is None else Path(val_root).expanduser().absolute()
        self.val_fraction = val_fraction
        self.test_root = None if test_root is None else Path(test_root).expanduser().absolute()
        self.crop: Crop = crop
        self.horizontal_flip = horizontal_flip
        self.interpolation: Interpolation = interpolation
        self.verify = verify
        self.captions = captions
        self.caption_columns = [caption_column] if isinstance(caption_column, str) else list(caption_column)
        self.missing_captions = missing_captions
        self._listings: dict[Path, dict[str | None, list[str]]] = {}
        self._captions: dict[str, tuple[str, ...]] = {}
        self._datasets: dict[Split, ImageFolderDataset] = {}

    def _listing(self, folder: Path, argument: str) -> dict[str | None, list[str]]:
        """Images of a folder by class, listed once; with captions, of no class, and their captions are read."""
        if folder not in self._listings:
            self._listings[folder] = (
                {None: self._captioned(folder, argument)} if self.has_captions else scan(folder, argument)
            )
        return self._listings[folder]

    def _captioned(self, folder: Path, argument: str) -> list[str]:
        paths = images_below(folder, argument)
        if self.captions == "sidecar":
            captions = read_sidecars(paths)
        else:
            captions = read_metadata(folder, paths, self.caption_columns)
        bare = [path for path in paths if path not in captions]
        if bare and self.missing_captions == "skip":
            paths = [path for path in paths if path in captions]
            if not paths:
                raise ValueError(
                    f"`{argument}` must hold images with captions, but none of the {len(bare)} in {folder} has one. "
                    f"Write some, or give another folder."
                )
            rank_zero_info(f"Left out {len(bare)} images of {folder} that have no caption: {some(bare)}.")
        if bare and self.missing_captions == "empty":
            captions |= dict.fromkeys(bare, ("",))
            rank_zero_info(f"{len(bare)} images of {folder} have no caption; theirs is empty: {some(bare)}.")
        self._captions |= captions
        return paths

    @property
    def _classes(self) -> dict[str | None, list[str]]:
        return self._listing(self.root, "root")

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
        return () if self.has_captions else tuple(name for name in self._classes if name is not None)

    @property
    def has_captions(self) -> bool:
        """Whether ``captions`` are read."""
        return self.captions is not None

    def validation_captions(self) -> Iterator[str]:
        """The first caption of each validation image, in order, of those that cannot be decoded too."""
        if self.has_captions:
            files = self._files("val")
            self._check_captions([path for path, _ in files])
            yield from (self._captions[path][0] for path, _ in files)

    def setup(self, stage: str | None = None) -> None:
        """List the images that a stage needs and, with ``verify``, leave out those that cannot be read.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None for all.

        Raises:
            FileNotFoundError: If a folder, or the table of its captions, does not exist.
            ValueError: If a folder's layout is wrong, it holds no image that can be read, or captions are wrong or
                missing.
        """
        _ = self.class_names  # Also "predict", which reads no image, asks for the labels that `root` defines.
        self._prepare(STAGE_SPLITS.get(stage, ("train", "val", "test")))

    def dataset(self, split: Split) -> ImageFolderDataset:
        """The images of one split, prepared as by ``setup`` where it has not yet."""
        self._prepare([split])
        return self._datasets[self._source(split)]

    def describe(self, split: Split) -> dict[str, Any]:
        """Where the images of a split really are, and what is done to them."""
        split = self._source(split)
        own = {"train": None, "val": self.val_root, "test": self.test_root}[split]
        crop = self.crop if split == "train" else "center"
        return {
            **super().describe(split),
            "folder": str(own or self.root),
            **({"held_out": self.val_fraction} if own is None and self.val_root is None and split == "val" else {}),
            "resize": f"{self.interpolation}, antialiased",
            "crop": "middle square" if crop == "center" else f"{crop} square",
        }

    def _source(self, split: Split) -> Split:
        return "val" if split == "test" and self.test_root is None else split

    def _files(self, split: Split) -> list[tuple[str, int | None]]:
        own = {"train": None, "val": self.val_root, "test": self.test_root}[split]
        if self.has_captions and own is not None and self.root in own.parents:
            raise ValueError(
                f"`{split}_root` must not lie in `root`, all of whose images are for training, but {own} is in "
                f"{self.root}. Give another `root`, such as the folder beside it."
            )
        classes = self._classes if own is None else self._listing(own, f"{split}_root")
        names = [None] if self.has_captions else list(self._classes)
        labels = {name: None if name is None else label for label, name in enumerate(names)}
        if unknown := [name or "images outside any sub-folder" for name in classes if name not in labels]:
            expected = f"only the classes {some(self.class_names)}" if self.class_names else "no classes"
            raise ValueError(
                f"`{split}_root` must have {expected}, as `root` has, but {own} has {some(unknown)}. "
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
        self._check_captions(paths)
        if self.verify and paths:
            rank_zero_info(f"Decoding {len(paths):,} images once to verify them; `verify: false` skips this.")
        bad = unreadable(paths) if self.verify else {}
        reasons = some(f"{path} ({reason})" for path, reason in bad.items())
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
            train = split == "train"
            crop, flip = (self.crop, self.horizontal_flip) if train else ("center", False)
            captions = [self._captions[path] for path, _ in pairs] if self.has_captions else None
            self._datasets[split] = ImageFolderDataset(
                pairs, self.image_size, crop, flip, self.interpolation, captions, draw_caption=train
            )

    def _check_captions(self, paths: Sequence[str]) -> None:
        if self.has_captions and (bare := [path for path in paths if path not in self._captions]):
            where = "a text file of its name beside each" if self.captions == "sidecar" else "a row for each"
            raise ValueError(
                f"{len(bare)} of {len(paths)} images have no caption: {some(bare)}. Write {where}, or set "
                f"`missing_captions` to skip (leave them out) or to empty (take them with an empty caption)."
            )
