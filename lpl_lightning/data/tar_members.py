"""Members of tar archives, one after the other, as far as an archive can be read.

Nothing is written to disk: a member's name, whatever it is, names a sample and nothing else.
"""

from __future__ import annotations

import copy
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, TypeVar

from lpl_lightning.data.reading import reason
from lpl_lightning.data.samples import optional

__all__ = ["Member", "TarReader", "Whole", "scheme_of"]

Taken = TypeVar("Taken")

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
"""What gzip, bzip2 and xz files begin with."""

LARGEST = 2**28
"""Bytes of the largest member that is read: a header may claim any size."""


def scheme_of(url: str) -> str:
    """The scheme of a URL, such as ``https`` or ``pipe``; nothing of a path."""
    found = re.match("([A-Za-z][A-Za-z0-9+.-]*):", url)
    scheme = found[1].lower() if found else ""
    return scheme if scheme == "pipe" or "://" in url else ""


class _Header(tarfile.TarInfo):
    """A header that tells its archive what it met in its place."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        assert isinstance(tarfile_, _Archive)
        try:
            found = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tarfile_.marked = True
            raise
        except tarfile.InvalidHeaderError:  # type: ignore[attr-defined]
            tarfile_.damaged.append(tarfile_.offset)
            raise
        except tarfile.SubsequentHeaderError as error:  # type: ignore[attr-defined]
            # Of two headers of a member the second is damaged: reading goes on behind it as it does behind one.
            raise tarfile.InvalidHeaderError(str(error)) from error  # type: ignore[attr-defined]
        tarfile_.marked = False
        return found


class _Archive(tarfile.TarFile):
    tarinfo = _Header
    marked = False
    """Whether the mark of the end was the last thing read."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.damaged: list[int] = []
        super().__init__(*args, **options)


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        name: Its name.
        read: Gives what is in it, as long as the archive is open.
    """

    name: str
    read: Callable[[], bytes]


class Whole(NamedTuple):
    """A member of any kind, to be copied.

    Attributes:
        header: What ``tarfile.TarFile.addfile`` takes.
        content: What is in it; nothing of folders and links.
    """

    header: tarfile.TarInfo
    content: bytes


class TarReader:
    """Reads one archive: a file, or the URL of one. A context manager, which closes the file at its end.

    Attributes:
        faults: What was found wrong with the archive itself, once ``members`` or ``whole`` has ended.

    Args:
        url: Path, or URL, which webdataset opens.
        wanted: Whether a member's content is wanted, by its name.
    """

    def __init__(self, url: str, wanted: Callable[[str], bool]) -> None:
        self.url, self.wanted = url, wanted
        self.faults: list[str] = []
        self._files = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def _open(self) -> tuple[IO[bytes], bool]:
        """A file, and whether to read it as a stream."""
        if scheme_of(self.url):
            stream: IO[bytes] = optional("webdataset.gopen").gopen(self.url)
            return stream, True
        file = self._files.enter_context(Path(self.url).open("rb"))  # noqa: SIM115
        start = file.read(6)
        file.seek(0)
        return file, start.startswith(COMPRESSED)

    def members(self) -> Iterator[Member]:
        """Regular files in order; it ends where the archive does, or is cut off, or cannot be read."""

        def taken(archive: _Archive, header: tarfile.TarInfo, streamed: bool) -> Member | None:
            return Member(header.name, self._content(archive, header, streamed)) if header.isreg() else None

        return self._each(taken)

    def whole(self) -> Iterator[Whole]:
        """All members in order, with what is in them; those that ``members`` would not read are counted as faults."""

        def taken(archive: _Archive, header: tarfile.TarInfo, streamed: bool) -> Whole | None:
            if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
                return Whole(header, b"")
            if header.size > LARGEST:
                self.faults.append(
                    f"has {header.name} of {header.size:,} bytes, more than the {LARGEST:,} that are read"
                )
                return None
            content = self._content(archive, header, False)()
            if header.issparse():  # its holes are filled now
                header = copy.copy(header)
                header.type = tarfile.REGTYPE
                kept = {name: value for name, value in header.pax_headers.items() if not name.startswith("GNU.sparse")}
                header.pax_headers = kept
            return Whole(header, content)

        return self._each(taken)

    def _each(self, taken: Callable[[_Archive, tarfile.TarInfo, bool], Taken | None]) -> Iterator[Taken]:
        """What is made of each whole member, unless it is nothing."""
        try:
            file, streamed = self._open()
        except Exception as error:  # Nor do openers of URLs agree on a type.
            self.faults.append(f"cannot be opened ({reason(error)})")
            return
        archive = None
        try:
            # A stream is closed here, for it may only then say that it failed; of a file, members are read later too.
            with file if streamed else nullcontext():
                archive = _Archive.open(fileobj=file, mode="r|*" if streamed else "r:", ignore_zeros=True)
                size = None if streamed else Path(self.url).stat().st_size
                for header in self._headers(archive, size):
                    if (found := taken(archive, header, streamed)) is not None:
                        yield found
        except Exception as error:  # Decompressors, file systems and tarfile do not agree on a type.
            self.faults.append(f"is cut off or damaged ({reason(error)})")
        else:
            if not archive.marked:
                self.faults.append("is cut off: it has no mark of its end")
        if archive is not None and archive.damaged:
            places = archive.damaged
            self.faults.append(f"is damaged from byte {places[0]:,} on: {len(places)} blocks are no headers")

    def _headers(self, archive: _Archive, size: int | None) -> Iterator[tarfile.TarInfo]:
        last = -1
        while (header := archive.next()) is not None:
            vars(archive)["members"].clear()  # which would grow without end
            if header.size < 0 or archive.offset <= last:
                raise ValueError("a header has a negative size")
            last = archive.offset
            parts: Any = header.sparse  # those that are not holes, where it has some
            stored = sum(length for _, length in parts) if header.issparse() else header.size
            if size is not None and header.offset_data + stored > size:
                raise ValueError(f"{header.name} ends behind the end of the file")
            yield header

    def _content(self, archive: _Archive, header: tarfile.TarInfo, now: bool) -> Callable[[], bytes]:
        def read() -> bytes:
            if header.size > LARGEST:
                raise ValueError(f"it has {header.size:,} bytes, more than the {LARGEST:,} that are read")
            file = archive.extractfile(header)
            assert file is not None
            return file.read()

        if not now or header.size > LARGEST:
            return read
        # A stream passes once. All is read, so that what is cut off is missed here whether it is wanted or not.
        content = read()
        return (lambda: content) if self.wanted(header.name) else bytes
