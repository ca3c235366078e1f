"""Images from tar shards in WebDataset's layout, streamed.

A shard is a tar archive, compressed or not, in which the files of one sample stand together and share a name, its key::

    photos-0000.tar: 000.jpg 000.txt 001.jpg 001.txt ...

``lanes.py`` says how shards are shared out among ranks and loader processes, and what is left out of an epoch: with the
number of images known, fewer than a batch of all ranks has. The batches depend on the seed, the epoch and the number of
loader processes and ranks, with which a run must go on in the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lpl_lightning.data.base import Split
from lpl_lightning.data.crops import Crop, Interpolation
from lpl_lightning.data.faults import OnError
from lpl_lightning.data.listing import EXTENSIONS, some
from lpl_lightning.data.samples import optional, read_classes
from lpl_lightning.data.shards import Contents, TarStream
from lpl_lightning.data.sources import SourceDataModule, held_out
from lpl_lightning.data.streams import StreamDataset
from lpl_lightning.data.tar_members import scheme_of

__all__ = ["WebDatasetDataModule", "find_shards"]

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def find_shards(urls: str | Sequence[str], argument: str, allow_remote: bool, allow_pipe: bool) -> list[str]:
    """Paths and URLs of shards, in order.

    Args:
        urls: A path, a URL, or either with braces (``{0000..0099}``, ``{a,b}``), several joined by ``::``; a folder,
            whose archives are taken; or a list of these.
        argument: The argument that named them, for errors.
        allow_remote: Whether URLs may be opened.
        allow_pipe: Whether programs may be run.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: There are none, one twice, or some that are not allowed.
    """
    expand = optional("webdataset.shardlists").expand_urls
    found: list[str] = []
    for url in [urls] if isinstance(urls, str) else urls:
        try:
            # A pipe's command is taken as it is.
            expanded = [url] if scheme_of(url) == "pipe" else expand(url)
        except AssertionError as error:
            raise ValueError(f"`{argument}`={url!r} names a variable that is not set ({error}).") from error
        for one in expanded:
            scheme = scheme_of(one)
            if scheme == "pipe" and not allow_pipe:
                raise ValueError(
                    f"`{argument}` has {one!r}, which runs a program. If you trust it, set `allow_pipe`: true."
                )
            if scheme and scheme != "pipe" and not allow_remote:
                raise ValueError(f"`{argument}` has the URL {one!r}. To read from there, set `allow_remote`: true.")
            path = Path(one).expanduser().absolute()
            if scheme:
                found.append(one)
            elif path.is_dir():
                found += sorted(str(file) for file in path.iterdir() if file.name.endswith(SUFFIXES))
            elif path.is_file():
                found.append(str(path))
            else:
                raise FileNotFoundError(
                    f"`{argument}` must name tar files or folders of them, but {path} is not there."
                )
    if not found:
        raise ValueError(f"`{argument}` must name tar files, but {urls!r} has none.")
    if twice := sorted({one for one in found if found.count(one) > 1}) if len(set(found)) < len(found) else []:
        raise ValueError(f"`{argument}` must name each shard once, but has {some(twice)} several times.")
    return found


class WebDatasetDataModule(SourceDataModule):
    """Images from tar shards; see the module's docstring for their layout.

    Args:
        urls: Shards of the training images: paths with braces such as ``photos-{0000..0099}.tar``, a folder, or a list.
        image_size: Side of the images, in pixels; the shorter side is resized to it, the rest cropped.
        val_urls: Shards of the validation images; None holds out whole shards of ``urls``.
        val_fraction: Share of the shards to hold out, in (0, 1), by their names; at least one is.
        test_urls: Shards of the test images; None tests on the validation images.
        image: Endings of images, such as ``jpg``; of several in a sample the first named here is taken. None knows
            those of image folders.
        label: Member with the class, an index or a name: ``cls``, or ``json:KEY`` for a value in a JSON object.
        caption: Member with the captions, one a line: ``txt``; or ``json:KEY``; or a list of such. Of several captions
            of a training image one is drawn anew each time; else its first is taken.
        classes: The classes of ``label``: how many, a list of their names, or a text file with a name a line.
        unique_keys: Whether a key that two shards have is a fault, of which the first sample counts; false where each
            shard counts its own.
        images_per_epoch: Images of an epoch, of all processes. None reads the headers of all shards beforehand, which
            finds what is cut off, lacking or doubled before the first step and shares images out exactly, but reads all
            of a compressed or remote shard; a number starts at once, and deals shards out whole.
        shuffle_buffer: Images that each loader process holds, as stored, to draw the next from.
        allow_remote: Read shards from URLs too, as webdataset does.
        allow_pipe: Run the programs of ``pipe:`` URLs.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 decodes in the training process.
        crop: Which square of a training image: the centre, or one drawn anew each time; else the centre.
        horizontal_flip: Mirror half of the training images, drawn anew each time.
        interpolation: How to resize; always anti-aliased.
        on_error: What becomes of samples that cannot be used: ``skip`` leaves out those found beforehand, with a
            warning, and puts the next in the place of one that is met later; ``raise`` ends the run with an error that
            names the first.
        max_bad_share: Share of them, in [0, 1], above which the run ends all the same.
        report: File that names them, a JSON object a line; by default ``bad_data.jsonl`` in the run's folder.
        num_generate: How many images ``lpl predict`` generates.
        generate_seed: Generated image ``i`` is drawn from seed ``generate_seed + i``.
        prompts: Text file of the captions that ``lpl predict`` goes round, one a line; None takes those of the
            validation images.
    """

    def __init__(
        self,
        urls: str | list[str],
        image_size: int,
        val_urls: str | list[str] | None = None,
        val_fraction: float = 0.05,
        test_urls: str | list[str] | None = None,
        image: list[str] | None = None,
        label: str | None = None,
        caption: str | list[str] | None = None,
        classes: int | list[str] | str | None = None,
        unique_keys: bool = True,
        images_per_epoch: int | None = None,
        shuffle_buffer: int = 1000,
        allow_remote: bool = False,
        allow_pipe: bool = False,
        batch_size: int = 32,
        num_workers: int = 2,
        crop: Crop = "center",
        horizontal_flip: bool = False,
        interpolation: Interpolation = "bicubic",
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
        if (label is None) != (classes is None):
            raise ValueError(
                f"`label` and `classes` go together, got {label!r} and {classes!r}: a stream does not say beforehand "
                "which classes there are."
            )
        self.urls, self.val_urls, self.test_urls = urls, val_urls, test_urls
        captions = [caption] if isinstance(caption, str) else caption or []
        endings = tuple(one.lstrip(".").lower() for one in image or EXTENSIONS)
        self.contents = Contents(endings, label, tuple(captions), read_classes(classes))
        self.unique_keys = unique_keys
        self.allow_remote, self.allow_pipe = allow_remote, allow_pipe
        self._datasets: dict[Split, StreamDataset] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of ``classes``."""
        return self.contents.class_names

    @property
    def has_captions(self) -> bool:
        """Whether ``caption`` is read."""
        return bool(self.contents.captions)

    def validation_captions(self) -> Iterator[str]:
        """The first caption of each validation image that has one, in order."""
        if self.has_captions:
            yield from self.dataset("val").captions()

    def setup(self, stage: str | None = None) -> None:
        """Find the shards that a stage needs and, for what is to be counted, read their headers.

        Raises:
            FileNotFoundError: A shard is not there.
            ValueError: Shards are not allowed, or too much of what they hold cannot be used.
        """
        self._write_faults_into_run()
        stages: dict[str | None, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in () if stage == "predict" else stages.get(stage, ("train", "val", "test")):
            self.dataset(split)

    def _source(self, split: Split) -> Split:
        return "val" if split == "test" and self.test_urls is None else split

    def dataset(self, split: Split) -> StreamDataset:
        """The images of one split, their shards read as by ``setup`` where they have not been yet."""
        split = self._source(split)
        if split not in self._datasets:
            self._datasets[split] = self._open(split, self._shards(split))
        return self._datasets[split]

    def _shards(self, split: Split) -> list[str]:
        own = {"train": None, "val": self.val_urls, "test": self.test_urls}[split]
        if own is not None:
            return find_shards(own, f"{split}_urls", self.allow_remote, self.allow_pipe)
        shards = find_shards(self.urls, "urls", self.allow_remote, self.allow_pipe)
        if self.val_urls is not None:
            return shards
        out = held_out(shards, self.val_fraction, "`val_urls`")
        return [shard for shard, held in zip(shards, out, strict=True) if held == (split == "val")]

    def _open(self, split: Split, shards: Iterable[str]) -> StreamDataset:
        stream = TarStream(list(shards), self.contents)
        every = range(len(stream.shards))
        if split == "train" and self.images_per_epoch is not None:
            return self._streamed(split, stream, every, None, self.images_per_epoch)
        rank_zero_info(
            f"Reading the headers of {len(every):,} {split} shards; `images_per_epoch` skips this in training."
        )
        scan = stream.scan(self.unique_keys)
        self._left_out(scan.faults, sum(scan.lengths) + len(scan.faults), "samples that cannot be used")
        stream = TarStream(stream.shards, self.contents, scan.skipped)
        return self._streamed(split, stream, every, scan.lengths, sum(scan.lengths))
