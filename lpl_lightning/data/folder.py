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

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from lpl_lightning.arguments import read_settings
from lpl_lightning.data.base import STAGE_SPLITS, ImageDataModule, Split
from lpl_lightning.data.batches import EpochPlan
from lpl_lightning.data.bucketed import BucketedDataset, BucketedPlan, bucketed_loader, described
from lpl_lightning.data.buckets import AspectBuckets, Assignment, Size
from lpl_lightning.data.captions import CaptionSource, MissingCaptions, read_metadata, read_sidecars
from lpl_lightning.data.crops import Crop, Interpolation, check_covering
from lpl_lightning.data.faults import Faults, OnError
from lpl_lightning.data.folder_dataset import ImageFolderDataset
from lpl_lightning.data.listing import images_below, path_hash, scan, some
from lpl_lightning.data.reading import in_threads, load_rgb, upright_sizes

__all__ = ["ImageFolderDataModule", "ImageFolderDataset"]


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
        buckets: Train and validate on images of many shapes and one area, ``image_size`` squared: each batch of one
            size, near the shape of its images. See ``AspectBuckets``; {} takes its defaults. None: squares alone. Also
            with buckets, ``dataset`` gives squares, which generated images are and are measured against.
        verify: Decode every image once before the first step; False saves that time, and images that cannot be read
            are found when they are met.
        on_error: What becomes of those: ``skip`` leaves them out, with a warning, or puts the next image in the place
            of one that is met in training; ``raise`` ends the run with an error that names the first.
        max_bad_share: Share of images that cannot be read, in [0, 1], above which the run ends all the same.
        report: File that names the images left out, a JSON object a line; by default ``bad_data.jsonl`` in the run's
            folder.
        captions: Where the captions are: ``sidecar``, in text files beside the images, or ``metadata``, in
            ``metadata.jsonl``, ``.csv`` or ``.parquet``. All are held in memory from the first step on. Of several
            captions of a training image one is drawn anew each time; else its first is taken. None reads no
            captions: then sub-folders are classes.
        caption_column: Column of the captions in ``metadata``, or a list of such columns.
        caption_folder: Folder of the ``metadata`` of ``root`` where it is elsewhere, as ``lpl caption --out`` writes
            it; its paths are then relative to ``root``, or to the folder above, and then a ``val_root`` and a
            ``test_root`` beside ``root`` have theirs from it too.
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
        buckets: AspectBuckets | None = None,
        verify: bool = True,
        on_error: OnError = "skip",
        max_bad_share: float = 0.1,
        report: str | Path | None = None,
        captions: CaptionSource | None = None,
        caption_column: str | list[str] = "text",
        caption_folder: str | Path | None = None,
        missing_captions: MissingCaptions = "raise",
        num_generate: int = 64,
        generate_seed: int = 0,
        prompts: str | Path | None = None,
    ) -> None:
        faults = Faults(on_error, max_bad_share, None if report is None else Path(report).expanduser().absolute())
        super().__init__(image_size, batch_size, num_workers, num_generate, generate_seed, prompts, faults)
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
        if caption_folder is not None and captions != "metadata":
            raise ValueError(f"`caption_folder`={str(caption_folder)!r} needs `captions`: metadata, got {captions!r}.")
        self.root = Path(root).expanduser().absolute()
        self.val_root = None if val_root is None else Path(val_root).expanduser().absolute()
        self.val_fraction = val_fraction
        self.test_root = None if test_root is None else Path(test_root).expanduser().absolute()
        self.crop: Crop = crop
        self.horizontal_flip = horizontal_flip
        self.interpolation: Interpolation = interpolation
        self.buckets = None if buckets is None else read_settings(AspectBuckets, "buckets", buckets)
        if self.buckets is not None:
            self.buckets.check(image_size)
        self.verify = verify
        self.captions = captions
        self.caption_columns = [caption_column] if isinstance(caption_column, str) else list(caption_column)
        self.caption_folder = None if caption_folder is None else Path(caption_folder).expanduser().absolute()
        self.missing_captions = missing_captions
        self._listings: dict[Path, dict[str | None, list[str]]] = {}
        self._captions: dict[str, tuple[str, ...]] = {}
        self._datasets: dict[Split, ImageFolderDataset] = {}
        self._sizes: dict[str, Size] = {}
        self._described = ""

    def _listing(self, folder: Path, argument: str) -> dict[str | None, list[str]]:
        """Images of a folder by class, listed once; with captions, of no class, and their captions are read."""
        if folder not in self._listings:
            self._listings[folder] = (
                {None: self._captioned(folder, argument)} if self.has_captions else self._scan(folder, argument)
            )
        return self._listings[folder]

    def _scan(self, folder: Path, argument: str) -> dict[str | None, list[str]]:
        """Images of a folder by class."""
        return scan(folder, argument)

    def _captioned(self, folder: Path, argument: str) -> list[str]:
        paths = images_below(folder, argument)
        is_beside = folder != self.root and folder.parent == self.root.parent
        place = self.caption_folder if is_beside or folder == self.root else None
        if self.captions == "sidecar":
            found = read_sidecars(paths)
        else:
            found = read_metadata(folder, paths, self.caption_columns, place, is_beside)
        captions = found.texts
        # Doubled rows cost nothing; an image whose text file is another's is lost.
        self._left_out(found.doubled, found.total, found.what, is_harmless=self.captions == "metadata")
        paths = [path for path in paths if path not in found.doubled]
        bare = [path for path in paths if path not in captions]
        if bare and self.missing_captions == "skip":
            paths = [path for path in paths if path in captions]
            if not paths:
                raise ValueError(
                    f"`{argument}` must hold images with captions, but none of the {len(bare)} in {folder} has one. "
                    f"Write some, or give another folder."
                )
            self._write_faults(dict.fromkeys(bare, "no caption"))
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
            ValueError: If a folder's layout is wrong, it holds no image that can be read or too many that cannot, or
                captions are wrong or missing.
        """
        self._write_faults_into_run()
        _ = self.class_names  # Also "predict", which reads no image, asks for the labels that `root` defines.
        self._prepare(STAGE_SPLITS.get(stage, ("train", "val", "test")))

    def dataset(self, split: Split) -> ImageFolderDataset:
        """The images of one split, prepared as by ``setup`` where it has not yet."""
        self._prepare([split])
        return self._datasets[self._source(split)]

    def _root(self, split: Split) -> Path:
        return {"train": None, "val": self.val_root, "test": self.test_root}[split] or self.root

    @property
    def image_sizes(self) -> tuple[Size, ...]:
        """Height and width of all that images may be brought to, known before any is looked at."""
        return super().image_sizes if self.buckets is None else self.buckets.sizes(self.image_size)

    def training_batches(self, batch_size: int) -> tuple[Dataset[dict[str, Any]], EpochPlan]:
        """The training images, and which make the batches of an epoch; see the base class."""
        if self.buckets is None:
            return super().training_batches(batch_size)
        bucketed = self._bucketed("train", self.buckets, least=batch_size)
        plan = BucketedPlan(bucketed.assignment, batch_size)
        if (said := described(plan)) != self._described:
            rank_zero_info(said)
            self._described = said
        return bucketed, plan

    def _eval_loader(self, split: Split) -> DataLoader[dict[str, Any]]:
        if self.buckets is None:
            return super()._eval_loader(split)
        bucketed = self._bucketed(split, self.buckets)
        return bucketed_loader(bucketed, bucketed.assignment, self.batch_size, self.num_workers)

    def assignment(self, split: Split) -> Assignment | None:
        """Which size each image is brought to; see the base class."""
        if self.buckets is None:
            return None
        return self._bucketed(split, self.buckets, self.batch_size if split == "train" else 1).assignment

    def _bucketed(self, split: Split, buckets: AspectBuckets, least: int = 1) -> BucketedDataset:
        images = self.dataset(split)
        sizes = [self._sizes[path] for path, _ in images.files]
        return BucketedDataset(images, buckets.assign(sizes, self.image_size, least))

    def describe(self, split: Split) -> dict[str, Any]:
        """Where the images of a split really are, and what is done to them."""
        split = self._source(split)
        is_held_out = split == "val" and self.val_root is None
        crop = self.crop if split == "train" else "center"
        return {
            **super().describe(split),
            "folder": str(self._root(split)),
            **({"held_out": self.val_fraction} if is_held_out else {}),
            "resize": f"{self.interpolation}, antialiased",
            "crop": "middle square" if crop == "center" else f"{crop} square",
        }

    def _source(self, split: Split) -> Split:
        return "val" if split == "test" and self.test_root is None else split

    def _files(self, split: Split) -> list[tuple[str, int | None]]:
        own = None if self._root(split) == self.root else self._root(split)
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
        if own is None and self.val_root is None and split != "test":  # which only a `test_root` of its own asks for
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
        bad = in_threads(self._look, paths)[1] if self.verify else {}
        if self.buckets is not None:
            sizes, unsized = upright_sizes([path for path in paths if path not in bad])
            self._sizes, bad = self._sizes | sizes, bad | unsized
        kept = {split: [pair for pair in pairs if pair[0] not in bad] for split, pairs in files.items()}
        empty = [split for split, pairs in kept.items() if not pairs]
        if empty and self.faults.on_error == "skip":
            reasons = some(f"{path} ({reason})" for path, reason in bad.items())
            raise ValueError(
                f"The {empty[0]} images must be such that Pillow can read them, but none of "
                f"{len(files[empty[0]])} is: {reasons}. Mend or replace them, or give another folder."
            )
        self._left_out(bad, len(paths), "images that cannot be read")
        for split, pairs in kept.items():
            train = split == "train"
            crop, flip = (self.crop, self.horizontal_flip) if train else ("center", False)
            captions = [self._captions[path] for path, _ in pairs] if self.has_captions else None
            self._datasets[split] = ImageFolderDataset(
                pairs, self.image_size, crop, flip, self.interpolation, captions, train, self.faults, self._root(split)
            )

    def _look(self, path: str) -> tuple[int, int]:
        """Decode an image, and see whether it can be made a square."""
        return check_covering(load_rgb(path), (self.image_size, self.image_size), path)

    def _check_captions(self, paths: Sequence[str]) -> None:
        if self.has_captions and (bare := [path for path in paths if path not in self._captions]):
            where = "a text file of its name beside each" if self.captions == "sidecar" else "a row for each"
            raise ValueError(
                f"{len(bare)} of {len(paths)} images have no caption: {some(bare)}. Write {where}, or set "
                f"`missing_captions` to skip (leave them out) or to empty (take them with an empty caption)."
            )
