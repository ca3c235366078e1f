"""Tar shards in WebDataset's layout, whose captions go into new shards of the same names.

A new shard has all members of the old one as they were, and behind those of each sample that has a caption one more::

    000017.jpg  000017.txt  000017.json  000017.caption.txt  000018.jpg ...

Processes share out whole shards. Of each, ``captions-parts/NAME`` holds a journal, as of a folder, and a report; the
shard itself is written once all of its images were captioned, and is then not looked at again.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_warn

from lpl_lightning.captioning.batches import Share
from lpl_lightning.captioning.journal import PARTS, Journal
from lpl_lightning.captioning.loop import CaptionLoop
from lpl_lightning.captioning.record import appearing
from lpl_lightning.captioning.report import REPORT, Report, merged, report_of, say, write_report
from lpl_lightning.data.faults import Unreadable
from lpl_lightning.data.listing import EXTENSIONS, some
from lpl_lightning.data.samples import optional
from lpl_lightning.data.shards import META, Contents, Entry, TarStream
from lpl_lightning.data.tar_members import TarReader, scheme_of
from lpl_lightning.data.webdataset import SUFFIXES, find_shards

__all__ = ["MEMBER", "CaptionedShards", "ShardImages"]

MEMBER = "caption.txt"
"""What captions are named by default."""

_NAMES = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_IMAGES = tuple(ending.removeprefix(".") for ending in EXTENSIONS)
_WHOLE = Share()  # of the batches of a shard


class CaptionedShards:
    """Tar shards, and the new ones that their captions go into.

    Attributes:
        out: Folder of the new shards.
        binding: What must stay as it is for a run to go on.

    Args:
        images: The shards: a folder of them, or paths with braces as ``WebDatasetDataModule`` takes them.
        out: Folder of the new ones.
        member: What captions are named, behind the key and a dot.
        overwrite: Whether captions and shards from elsewhere may be replaced.
        share: Which shards are this process's.

    Raises:
        FileNotFoundError: A shard is not there.
        ValueError: A shard is remote, or has changed, an argument is wrong, or there are shards from elsewhere.
    """

    def __init__(self, images: str, out: str | None, member: str, overwrite: bool, share: Share) -> None:
        if not _NAMES.fullmatch(member) or member in _IMAGES:
            raise ValueError(
                f"`member` must be what follows a sample's key and a dot, in lower case and no ending of images, such "
                f"as {MEMBER}, got {member!r}."
            )
        found = find_shards(images, "images", True, True)
        if remote := [one for one in found if scheme_of(one)]:
            raise ValueError(f"`images` must be shards in files, got {some(remote)}. Download them first.")
        if out is None:
            raise ValueError("`out` must be a folder for the new shards: those of `images` are left as they are.")
        self.out, self.member, self.overwrite, self.share = Path(out).expanduser().absolute(), member, overwrite, share
        self.sources: dict[str, Path] = {}
        for path in map(Path, found):
            # New shards are not compressed: photos hardly get smaller, and a data module reads all of one to count it.
            suffix = max((one for one in SUFFIXES if path.name.endswith(one)), key=len, default="")
            name = path.name.removesuffix(suffix) + (".tar" if suffix else "")
            if name in self.sources:
                raise ValueError(f"`images`: {self.sources[name]} and {path} would both become {name}. Rename one.")
            if self.out.resolve() in (path.parent.resolve(), path.resolve().parent):
                raise ValueError(f"`out` must be another folder than that of the shards, but {path} is in it.")
            self.sources[name] = path
        self.binding: dict[str, dict[str, Any]] = {"shards": {"member": member}}
        for name, path in self.sources.items():
            known = self._known(name)
            if known and known["bytes"] != path.stat().st_size:
                raise ValueError(
                    f"`images`: {path} has {path.stat().st_size:,} bytes, and had {known['bytes']:,} when it was "
                    f"begun. To caption it anew, remove {self._parts(name)} and, where it is there, {self.out / name}."
                )
        self._check(self.sources)

    def caption(self, loop: CaptionLoop) -> None:
        """Caption the shards of this process that have not been written yet, one after the other.

        Raises:
            BlockingIOError: Another process has one of them.
            ValueError: There are captions from elsewhere, something cannot be captioned, or the disk is full.
        """
        own = list(self.sources)[self.share.index :: self.share.of]
        needed = sum(path.stat().st_size for name, path in self.sources.items() if not self._is_written(name))
        if needed > (free := shutil.disk_usage(self.out).free):
            rank_zero_warn(f"{self.out} has room for {free:,} bytes, but what is to be written takes over {needed:,}.")
        for number, name in enumerate(own, 1):
            if loop.batches_left == 0:
                break
            if not self._is_written(name):
                self._caption(name, loop, f"{name}, {number} of {len(own)}")
        known: Report | None = None
        # Processes that end at the same time may write in the place of one another: the last one must know all.
        while known != (report := self._report()):
            write_report(self.out / REPORT, report, self.share.name)
            known = report
        counts = report["counts"]
        where = f"{self.member} of {counts['shards_written']:,} of {counts['shards']:,} shards in {self.out}"
        say(counts, where, self.out / REPORT)
        if counts["faults"]:
            rank_zero_warn(
                f"{counts['faults']:,} samples or shards cannot be used as they are; {self.out / REPORT} names them."
            )

    def _caption(self, name: str, loop: CaptionLoop, title: str) -> None:
        self._check([name])
        path = self.sources[name]
        keys, faults = self._listed(path)
        for one, why in faults.items():
            loop.refuse(f"{path.parent}/{one}", why)
        images = ShardImages(path, keys.values())
        with Journal(self._parts(name), [f"{path.name}/{key}" for key in keys], _WHOLE) as journal:

            def noted(**more: int) -> None:
                report = report_of(journal) | {"faults": faults, "bytes": path.stat().st_size} | more
                report["counts"]["faults"] = len(faults)
                write_report(self._parts(name) / REPORT, report, journal.writer)

            noted()
            if loop.caption(loop.plan(journal, _WHOLE), images, journal, str(path.parent), title=title) and keys:
                with appearing(self.out / name, journal.writer) as file:
                    if wrong := self._copy(path, journal, file):
                        faults[path.name] = f"the shard {' and '.join(wrong)}"
                    noted(written=file.tell())
            else:
                noted()

    def _listed(self, path: Path) -> tuple[dict[str, int], dict[str, str]]:
        """Places of a shard's samples by their keys, and what is wrong with others.

        Raises:
            ValueError: There are samples that have a caption already.
        """
        keys: dict[str, int] = {}
        faults: dict[str, str] = {}
        having: list[str] = []
        for place, entry in enumerate(TarStream([str(path)], Contents(_IMAGES)).entries(0, images=False)):
            if isinstance(entry.key, Unreadable):
                faults[path.name + entry.key.name.removeprefix(str(path))] = entry.key.reason
                continue
            keys[entry.key] = place
            if self.member in entry.members:
                having.append(entry.key)
        if having and not self.overwrite:
            raise ValueError(
                f"`member`: {len(having)} samples of {path} have {self.member} already: {some(having)}. Give captions "
                "another `member`, or set `overwrite` to replace those."
            )
        if not keys:
            faults.setdefault(path.name, "the shard has no images")
        return keys, faults

    def _copy(self, path: Path, journal: Journal, file: IO[bytes]) -> list[str]:
        """Write a shard with its captions, and say what is wrong with the old one.

        Raises:
            ValueError: It is another one than was captioned.
        """
        split = optional("webdataset.tariterators").base_plus_ext
        captions = {row.name.partition("/")[2]: row.text for row in journal.rows() if row.text is not None}
        current, text = "", None
        with TarReader(str(path), lambda _: True) as reader, tarfile.open(fileobj=file, mode="w") as new:

            def add() -> None:
                if text:
                    header, content = tarfile.TarInfo(f"{current}.{self.member}"), text.encode()
                    header.size = len(content)
                    new.addfile(header, io.BytesIO(content))

            for header, content in reader.whole():
                is_member = header.isreg() and not META.match(header.name)
                key, ending = split(header.name) if is_member else (None, None)
                if key is not None and key != current:
                    add()
                    # Where a key comes twice, its first sample counts.
                    current, text = key, captions.pop(key, None)
                if text is None or ending is None or ending.lower() != self.member:
                    new.addfile(header, io.BytesIO(content))
                vars(new)["members"].clear()  # which would grow without end
            add()
        if captions:
            raise ValueError(f"`images`: {path} has changed since it was listed: {some(captions)} are gone.")
        return reader.faults

    def _report(self) -> Report:
        written = [name for name in self.sources if self._is_written(name)]
        report = merged(self._known(name) for name in self.sources)
        counts = {"shards": len(self.sources), "shards_written": len(written), "images": 0, "captioned": 0}
        counts |= {"not_captioned_yet": 0, "failed": 0, "empty": 0, "reached_max_new_tokens": 0, "faults": 0}
        return report | {"counts": counts | report["counts"]}

    def _parts(self, name: str) -> Path:
        return self.out / PARTS / name

    def _known(self, name: str) -> Report:
        """The report of one shard; nothing where it has none."""
        path = self._parts(name) / REPORT
        try:
            return dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"{path} is not as `lpl caption` wrote it ({error}). Remove it.") from error

    def _is_written(self, name: str) -> bool:
        new = self.out / name
        return new.exists() and self._known(name).get("written") == new.stat().st_size

    def _check(self, names: Iterable[str]) -> None:
        """Refuse shards that would be replaced."""
        foreign = [self.out / name for name in names if (self.out / name).exists() and not self._is_written(name)]
        if foreign and not self.overwrite:
            raise ValueError(
                f"`out`: {len(foreign)} shards are there that `lpl caption` did not write, or not so: {some(foreign)}. "
                "Move them, give another `out`, or set `overwrite` to replace them."
            )


class ShardImages:
    """What is in the images of a shard, by their numbers, read from its beginning on.

    Going back to an earlier one begins anew.

    Args:
        path: The shard.
        places: Places of samples in it, in order.
    """

    def __init__(self, path: Path, places: Iterable[int]) -> None:
        self.path, self.places = path, list(places)
        self._entries: Iterator[Entry] = iter(())
        self._next = sys.maxsize

    def __getitem__(self, number: int) -> bytes:
        place = self.places[number]
        if place < self._next:
            self._entries, self._next = TarStream([str(self.path)], Contents(_IMAGES)).entries(0, images=True), 0
        entry = next(islice(self._entries, place - self._next, None))
        self._next = place + 1
        if entry is None:
            raise ValueError("the shard holds less than when it was listed")
        image = entry.read().image
        assert isinstance(image, bytes)
        return image
