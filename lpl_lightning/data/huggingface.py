"""Images from Hugging Face data sets, as tables or as streams.

A data set is a folder that ``save_to_disk`` wrote, a loader with its files (``imagefolder``, ``parquet``, ``arrow``,
``json``, ...), or a folder or a repository of the hub that ``datasets.load_dataset`` reads. Images are decoded here,
not by ``datasets``, and code that comes with a data set is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lpl_lightning.data.base import Split
from lpl_lightning.data.cards import check_file_names
from lpl_lightning.data.crops import Crop, Interpolation
from lpl_lightning.data.faults import OnError
from lpl_lightning.data.listing import some
from lpl_lightning.data.rows import Columns, RowsDataset, RowStream, doubled_rows, row_hashes, spread_order
from lpl_lightning.data.samples import optional, read_classes
from lpl_lightning.data.sources import SourceDataModule, held_out
from lpl_lightning.data.streams import StreamDataset

__all__ = ["HuggingFaceDataModule"]

LOADERS = ("arrow", "csv", "imagefolder", "json", "parquet", "webdataset")
"""Loaders, which without files of their own would read what lies in the working folder."""


class HuggingFaceDataModule(SourceDataModule):
    """Images from a Hugging Face data set; see the module's docstring.

    Tables are read by row, and training goes on exactly after a stop. Streams are shuffled as tar shards are, their
    files being the shards (``lanes.py``).

    Args:
        path: A folder of ``save_to_disk``; or what ``datasets.load_dataset`` takes: a loader's name, a folder, a hub
            id.
        image_size: Side of the images, in pixels; the shorter side is resized to it, the rest cropped.
        name: Which configuration of the data set.
        split: Split of the training images.
        val_split: Split of the validation images; None holds out a part of ``split``.
        val_fraction: Share to hold out, in (0, 1), at least one image; of a stream, whole files.
        test_split: Split of the test images; None tests on the validation images.
        data_files: Files for the loader: a path or pattern, a list, or either by split.
        data_dir: Folder for the loader.
        revision: Branch, tag or commit of a hub repository.
        streaming: Read the files one after the other during training instead of preparing a table beforehand.
        image: Column of the images, or of their paths or URLs.
        image_folder: Folder that relative paths of images count from; None takes the one in which the run is started.
        label: Column of the class: an index or a name. None has no classes.
        caption: Column of captions, strings or lists of strings, or several columns. Of several captions of a training
            image one is drawn anew each time; else its first is taken. None has no captions.
        classes: The classes where the column does not say them: how many, a list of their names, or a text file with a
            name a line; names that the column says must be these. Of a table of names None takes those that there are,
            sorted.
        images_per_epoch: Images of an epoch of a stream, of all processes. None takes what the data set says, or reads
            the stream once to count them, which shares images out exactly.
        shuffle_buffer: Images that each loader process of a stream holds, as stored, to draw the next from.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 decodes in the training process.
        crop: Which square of a training image: the centre, or one drawn anew each time; else the centre.
        horizontal_flip: Mirror half of the training images, drawn anew each time.
        interpolation: How to resize; always anti-aliased.
        verify: Decode every image of a table once before the first step; False saves that time, and rows that cannot
            be used are found when they are met, as those of a stream are.
        on_error: What becomes of those: ``skip`` leaves them out, with a warning, or puts the next row in the place of
            one that is met; ``raise`` ends the run with an error that names the first.
        max_bad_share: Share of them, in [0, 1], above which the run ends all the same.
        report: File that names them, a JSON object a line; by default ``bad_data.jsonl`` in the run's folder.
        num_generate: How many images ``lpl predict`` generates.
        generate_seed: Generated image ``i`` is drawn from seed ``generate_seed + i``.
        prompts: Text file of the captions that ``lpl predict`` goes round, one a line; None takes those of the
            validation images.
    """

    def __init__(
        self,
        path: str,
        image_size: int,
        name: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.05,
        test_split: str | None = None,
        data_files: str | list[str] | dict[str, str | list[str]] | None = None,
        data_dir: str | None = None,
        revision: str | None = None,
        streaming: bool = False,
        image: str = "image",
        image_folder: str | Path | None = None,
        label: str | None = None,
        caption: str | list[str] | None = None,
        classes: int | list[str] | str | None = None,
        images_per_epoch: int | None = None,
        shuffle_buffer: int = 1000,
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
        super().__init__(
            image_size,
            val_fraction,
            images_per_epoch,
            shuffle_buffer,
            batch_size,
            num_workers,
            crop,
            horizontal_flip,
            interpolation,
            on_error,
            max_bad_share,
            report,
            num_generate,
            generate_seed,
            prompts,
        )
        if verify and streaming:
            raise ValueError("`verify` decodes images beforehand, and `streaming` does not: leave either out.")
        if images_per_epoch is not None and not streaming:
            raise ValueError(
                "`images_per_epoch` is for `streaming`: an epoch of a table is all of its rows. Leave it out."
            )
        if path == "pandas":
            raise ValueError("`path`: pandas reads pickles, which may run code. Give the data as Parquet.")
        self.path, self.name, self.revision, self.verify = path, name, revision, verify
        self.splits: dict[Split, str | None] = {"train": split, "val": val_split, "test": test_split}
        self.data_files, self.data_dir, self.streaming = data_files, data_dir, streaming
        captions = [caption] if isinstance(caption, str) else caption or []
        place = "" if image_folder is None else str(Path(image_folder).expanduser().absolute())
        self.columns = Columns(image, label, tuple(captions), folder=place)
        self.classes = read_classes(classes)
        self._loaded: dict[str, Any] = {}
        self._class_names: tuple[str, ...] | None = None
        self._datasets: dict[Split, RowsDataset | StreamDataset] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes: ``classes``, or those of the training data, which are loaded for it."""
        if self._class_names is None:
            self._class_names = self._classes() if self.columns.label is not None else ()
        return self._class_names

    def _classes(self) -> tuple[str, ...]:
        label, data = str(self.columns.label), self._data(str(self.splits["train"]))
        feature, found = (data.features or {}).get(label), self._named(data)
        if self.classes:
            if found and len(found) != len(self.classes):
                raise ValueError(f"`classes` must be the {len(found)} of the column {label}, got {len(self.classes)}.")
            # Numbers name nothing: a column without names has them too.
            if found and tuple(map(str, range(len(found)))) not in (found, self.classes) and found != self.classes:
                raise ValueError(
                    f"`classes` must be those of the column {label} in their order, {some(found)}, got "
                    f"{some(self.classes)}: its labels are numbers of these. Leave `classes` out."
                )
            return self.classes
        if found:
            return found
        if "string" in str(getattr(feature, "dtype", "")) and not self.streaming:
            if names := sorted({value.strip() for value in data.unique(label) if value is not None}):
                return tuple(names)
            raise ValueError(f"`label` must be a column of classes, but {label} holds none in {len(data)} rows.")
        raise ValueError(
            f"`classes` must be given, how many or their names, for the column {label} ({feature}) does not say which "
            "there are."
        )

    def _named(self, data: Any) -> tuple[str, ...]:
        """Names that the column of classes has for its numbers, if any."""
        return tuple(getattr((data.features or {}).get(self.columns.label), "names", None) or ())

    @property
    def has_captions(self) -> bool:
        """Whether ``caption`` is read."""
        return bool(self.columns.captions)

    def validation_captions(self) -> Iterator[str]:
        """The first caption of each validation image that has one, in order."""
        if self.has_captions:
            yield from self.dataset("val").captions()

    def prepare_data(self) -> None:
        """Download and prepare tables, in one process before the others."""
        if not self.streaming:
            for split in dict.fromkeys(name for name in self.splits.values() if name is not None):
                self._data(split)

    def setup(self, stage: str | None = None) -> None:
        """Load what a stage needs.

        Raises:
            FileNotFoundError: The data set is not there.
            ValueError: It lacks a split or a column, or does not say its classes.
        """
        self._write_faults_into_run()
        _ = self.class_names
        stages: dict[str | None, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in () if stage == "predict" else stages.get(stage, ("train", "val", "test")):
            self.dataset(split)

    def _data(self, split: str) -> Any:
        """A split, its images undecoded."""
        if split not in self._loaded:
            data = self._load(split)
            features = data.features or {}
            if features:
                self.columns.check(features)
            library = optional("datasets")
            if isinstance(features.get(self.columns.image), library.Image):
                data = data.cast_column(self.columns.image, library.Image(decode=False))
            self._loaded[split] = data
        return self._loaded[split]

    def _load(self, split: str) -> Any:
        library, folder = optional("datasets"), Path(self.path).expanduser()
        if self.path in LOADERS and not folder.exists() and self.data_files is None and self.data_dir is None:
            raise ValueError(f"`path`: {self.path} needs files that it is to read: give `data_files` or `data_dir`.")
        check_file_names(folder)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            options = {"name": self.name, "data_files": self.data_files, "data_dir": self.data_dir}
            if unused := [key for key, value in {**options, "revision": self.revision}.items() if value is not None]:
                raise ValueError(f"{folder} is what `save_to_disk` wrote, which {some(unused)} cannot choose from.")
            saved = self._by(library.load_from_disk, str(folder))
            if isinstance(saved, Mapping):
                if split not in saved:
                    raise ValueError(f"There is no split {split!r} in {folder}, which has {some(saved)}.")
                saved = saved[split]
            elif split != self.splits["train"]:
                raise ValueError(
                    f"{folder} holds one split, but {split!r} is asked for too. Save a `DatasetDict` of both, or leave "
                    "`val_split` and `test_split` out."
                )
            # A format is stored with the data: values would come as its tensors, or of its columns alone.
            saved = saved.with_format(None)
            return saved.to_iterable_dataset(num_shards=min(64, max(1, len(saved)))) if self.streaming else saved
        options = {"name": self.name, "data_files": self.data_files, "data_dir": self.data_dir, "split": split}
        path = str(folder) if folder.exists() else self.path
        return self._by(library.load_dataset, path, revision=self.revision, streaming=self.streaming, **options)

    def _by(self, load: Callable[..., Any], *given: Any, **options: Any) -> Any:
        try:
            return load(*given, **options)
        except ImportError:
            raise
        except Exception as error:  # What reads files, or fetches them, does not agree on a type.
            said = str(error).partition("\n")[0]
            raise ValueError(
                f"`path`={self.path!r} cannot be loaded as a data set ({type(error).__name__}: {said}). Give a folder "
                "of `save_to_disk`, a folder of files, a loader with `data_files` or a hub id, and a split that it has."
            ) from error

    def _source(self, split: Split) -> Split:
        return "val" if split == "test" and self.splits["test"] is None else split

    def dataset(self, split: Split) -> RowsDataset | StreamDataset:
        """The images of one split, loaded as by ``setup`` where they have not been yet."""
        split = self._source(split)
        if split not in self._datasets:
            own = self.splits[split]
            data = self._data(str(own or self.splits["train"]))
            if self.columns.label is not None:
                names, known = self._named(data), self._named(self._data(str(self.splits["train"]))) or self.class_names
                if names and names != known:
                    raise ValueError(f"The split {own} must have the classes {some(known)}, not {some(names)}.")
            columns = self.columns._replace(class_names=self.class_names)
            given = [self.path, self.name, self.data_dir, self.data_files, own or self.splits["train"]]
            name = ", ".join(str(part) for part in given if part is not None)
            make = self._stream if self.streaming else self._table
            self._datasets[split] = make(split, data, columns, name)
        return self._datasets[split]

    def _table(self, split: Split, data: Any, columns: Columns, name: str) -> RowsDataset:
        rows = np.arange(len(data))
        if twice := doubled_rows(data, columns):
            said = {f"{name}, row {row}": f"it says what row {first} does" for row, first in twice.items()}
            self._left_out(said, len(rows), "rows that say what another does", is_harmless=True)
            rows = np.delete(rows, list(twice))
        whole = self.splits["val"] is not None or split == "test"
        if split != "train" or not whole:
            hashes, paths = row_hashes(data, columns)
            if not whole:
                out = hashes < self.val_fraction
                if len(rows) and not out[rows].any():
                    out[rows[np.argmin(hashes[rows])]] = True
                rows = rows[out[rows] == (split == "val")]
            if split != "train":
                rows = spread_order(data, columns.label, rows, hashes, paths)
        if not len(rows):
            raise ValueError(
                f"There must be {split} images, but of the {len(data)} rows of {name} none is left for them. Give "
                "more, another `val_fraction`, or `val_split`."
            )
        found = RowsDataset(data, rows, columns, name, self._preparation(split), self.faults)
        if self.verify:
            rank_zero_info(f"Decoding {len(rows):,} images of {name} once to verify them; `verify: false` skips this.")
            bad = found.unusable()
            if len(bad) == len(rows) and self.faults.on_error == "skip":
                raise ValueError(f"None of the {len(rows)} {split} rows of {name} can be used: {some(bad.values())}")
            self._left_out({one.name: one.reason for one in bad.values()}, len(rows), "rows that cannot be used")
            found.rows = np.delete(rows, list(bad))
        return found

    def _stream(self, split: Split, data: Any, columns: Columns, name: str) -> StreamDataset:
        stream = RowStream(data, columns, name)
        shards = list(range(len(stream.shards)))
        whole = self.splits["val"] is not None or split == "test"
        if not whole:
            out = held_out([f"part {part}" for part in shards], self.val_fraction, "`val_split`")
            shards = [shard for shard in shards if out[shard] == (split == "val")]
        if split == "train" and self.images_per_epoch is not None:
            return self._streamed(split, stream, shards, None, self.images_per_epoch)
        said = (data.info.splits or {}).get(str(data.split)) if data.info is not None else None
        # It may be wrong: of training images it says how long an epoch is, others are read once each.
        if split == "train" and whole and self._believes_counts and said is not None and said.num_examples:
            return self._streamed(split, stream, shards, None, said.num_examples)
        rank_zero_info(f"Reading {name} once to count its images; `images_per_epoch` skips this in training.")
        lengths = [stream.count(shard) for shard in shards]
        return self._streamed(split, stream, shards, lengths, sum(lengths))
