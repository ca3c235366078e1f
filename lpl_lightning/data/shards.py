"""Tar shards in WebDataset's layout: members of one sample have its key as name and stand together.

    000017.jpg  000017.txt  000017.json  000018.jpg  000018.txt ...

Whatever is wrong costs only itself: a shard that is cut off gives what comes before, a member that cannot be read its
sample, and of samples with one key the first counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lpl_lightning.data.faults import Unreadable
from lpl_lightning.data.reading import reason
from lpl_lightning.data.samples import Sample, captions_of, key_number, label_of, optional
from lpl_lightning.data.streams import Handle
from lpl_lightning.data.tar_members import Member, TarReader

__all__ = ["META", "Contents", "Entry", "Scan", "TarStream"]

META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset passes over too."""


class Contents(NamedTuple):
    """Which members of a sample hold what.

    A member is named by what follows the key and a dot, such as ``txt``; ``json:text`` is the value at ``text`` in the
    member ``json``.

    Attributes:
        image: Members that may be the image; of several the one that is named first.
        label: Class index or name; None without classes.
        captions: Captions: one a line, or in JSON a string or a list of strings; empty without captions.
        class_names: The classes.
    """

    image: tuple[str, ...]
    label: str | None = None
    captions: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    def members(self) -> frozenset[str]:
        """All members that may be read."""
        others = [name.split(":")[0] for name in (self.label, *self.captions) if name is not None]
        return frozenset([*self.image, *others])


class Entry(NamedTuple):
    """A sample of a shard, or what is wrong in its place.

    Attributes:
        key: Its key; or why it cannot be used.
        read: Reads it.
        members: What its members are named by; of what is wrong, nothing.
    """

    key: str | Unreadable
    read: Handle
    members: frozenset[str] = frozenset()


class Scan(NamedTuple):
    """What the headers of shards say.

    Attributes:
        lengths: How many samples each shard has that may be used.
        skipped: The places of others, by shard.
        faults: Why, by name.
    """

    lengths: list[int]
    skipped: dict[int, frozenset[int]]
    faults: dict[str, str]


class TarStream:
    """Samples of tar shards; the ``Stream`` of a ``StreamDataset``.

    Args:
        shards: Paths or URLs.
        contents: Which members hold what.
        skipped: Places of samples that are left out, by shard.
    """

    def __init__(
        self, shards: Sequence[str], contents: Contents, skipped: Mapping[int, frozenset[int]] | None = None
    ) -> None:
        self.shards, self.contents = tuple(shards), contents
        self.skipped = {} if skipped is None else skipped

    def read(self, shard: int, images: bool = True) -> Iterator[Handle]:
        """Handles of a shard's samples; those of what is wrong raise ``Unreadable`` in their place."""
        skipped = self.skipped.get(shard, frozenset())
        for place, entry in enumerate(self.entries(shard, images)):
            if place not in skipped:
                yield entry.read

    def scan(self, across: bool = True) -> Scan:
        """Read all headers, and see what samples lack.

        Args:
            across: Whether samples of one key in two shards are one too many.
        """
        lengths, faults, keys = [], {}, []
        skipped: dict[int, set[int]] = {}
        for shard in range(len(self.shards)):
            found: list[str] = []
            for place, (key, _, _) in enumerate(self.entries(shard, images=False)):
                if isinstance(key, Unreadable):
                    faults[key.name] = key.reason
                    skipped.setdefault(shard, set()).add(place)
                found.append("" if isinstance(key, Unreadable) else key)
            lengths.append(len(found))
            keys.append(found)
        if across:
            for shard, place, key, first in _doubled(keys):
                name = f"{self.shards[shard]}/{key}"
                faults[name] = f"its key is that of a sample of {self.shards[first]}; `unique_keys: false` allows that"
                skipped.setdefault(shard, set()).add(place)
        usable = [length - len(skipped.get(shard, ())) for shard, length in enumerate(lengths)]
        return Scan(usable, {shard: frozenset(places) for shard, places in skipped.items()}, faults)

    def entries(self, shard: int, images: bool) -> Iterator[Entry]:
        """All samples and faults of a shard, those of ``skipped`` too.

        Args:
            shard: Number of the shard.
            images: Whether the samples' images are wanted.
        """
        url = self.shards[shard]
        wanted = self.contents.members() if images else self.contents.members() - set(self.contents.image)
        with TarReader(url, lambda name: name.rpartition("/")[2].partition(".")[2].lower() in wanted) as reader:
            yield from self._grouped(url, reader, images)

    def _grouped(self, url: str, reader: TarReader, images: bool) -> Iterator[Entry]:
        doubled: list[str] = []

        def on_double(error: Exception) -> bool:
            doubled.append(str(error.args[0]).split(": duplicate")[0])
            return True

        files = (
            {"fname": one.name, "data": one, "__url__": url} for one in reader.members() if not META.match(one.name)
        )
        seen: set[int] = set()
        for group in optional("webdataset.tariterators").group_by_keys(files, handler=on_double):
            for name in doubled:
                yield _fault(f"{url}/{name}", "the shard has two members of this name; the first counts")
            doubled.clear()
            key = group["__key__"]
            name, number = f"{url}/{key}", key_number(key)
            lacking = self._lacking(group)
            if number in seen:
                yield _fault(name, "the shard has this key twice; the first counts")
            elif lacking:
                yield _fault(name, lacking)
            else:
                yield Entry(key, self._handle(name, group, images), frozenset(group))
            seen.add(number)
        for name in doubled:
            yield _fault(f"{url}/{name}", "the shard has two members of this name; the first counts")
        if reader.faults:
            yield _fault(url, f"the shard {' and '.join(reader.faults)}")

    def _lacking(self, group: Mapping[str, Any]) -> str | None:
        has = ", ".join(name for name in group if not name.startswith("__"))
        if not any(name in group for name in self.contents.image):
            return f"no image (it has {has})"
        for what, members in (("label", [self.contents.label]), ("caption", self.contents.captions)):
            names = [name.split(":")[0] for name in members if name is not None]
            if names and not any(name in group for name in names):
                return f"no {what} (it has {has})"
        return None

    def _handle(self, name: str, group: Mapping[str, Any], images: bool) -> Handle:
        def read() -> Sample:
            contents = self.contents
            label = captions = None
            if contents.label is not None:
                label = label_of(name, _value(name, group, contents.label), contents.class_names)
            if contents.captions:
                captions = captions_of(name, {column: _value(name, group, column) for column in contents.captions})
            member = next(member for member in contents.image if member in group)
            image = _content(name, group[member]) if images else b""
            return Sample(name, group["__key__"], image, label, captions)

        return read


def _fault(name: str, why: str) -> Entry:
    fault = Unreadable(name, why)

    def read() -> Sample:
        raise fault

    return Entry(fault, read)


def _content(name: str, member: Member) -> bytes:
    try:
        return member.read()
    except Exception as error:  # tarfile and decompressors do not agree on a type.
        raise Unreadable(name, reason(error)) from error


def _value(name: str, group: Mapping[str, Any], column: str) -> Any:
    """What a member says: text as lines, one of which is a string, or a value in JSON."""
    member, _, key = column.partition(":")
    if member not in group:
        return None
    try:
        text = _content(name, group[member]).decode("utf-8-sig")
        if key:
            return json.loads(text)[key]
    except UnicodeDecodeError as error:
        raise Unreadable(name, f"its {member} is not UTF-8") from error
    except KeyError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(name, f"its {member} is no JSON object ({error})") from error
    lines = [line.strip() for line in re.split("\r\n|\r|\n", text) if line.strip()]
    return lines[0] if len(lines) == 1 else lines


def _doubled(keys: Sequence[Sequence[str]]) -> Iterator[tuple[int, int, str, int]]:
    """Shard, place and key of samples whose key another shard has had before, and that shard."""
    numbers = np.array([key_number(key) if key else 0 for found in keys for key in found], np.uint64)
    values, firsts, which = np.unique(numbers, return_index=True, return_inverse=True)
    starts = np.cumsum([0, *map(len, keys)])
    for at in np.flatnonzero((firsts[which] != np.arange(len(numbers))) & (values[which] != 0)).tolist():
        shard, first = (int(np.searchsorted(starts, place, side="right")) - 1 for place in (at, int(firsts[which[at]])))
        yield shard, at - int(starts[shard]), keys[shard][at - int(starts[shard])], first
