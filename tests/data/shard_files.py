"""Images and tar shards that the tests of sources write."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["bare_tar", "photo", "png", "sample", "write_shards"]

File = tuple[str, bytes]


def photo(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """An image of random pixels, wider than high."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """What is in the file of an image."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def sample(number: int, classes: int = 3) -> list[File]:
    """The members of a sample: its image, class and caption."""
    key = f"{number:03}"
    return [
        (f"{key}.png", png(photo(number))),
        (f"{key}.cls", str(number % classes).encode()),
        (f"{key}.txt", f"photo {number}\n".encode()),
    ]


def bare_tar(files: Iterable[File], mode: str = "w", mtime: float = 0) -> bytes:
    """A tar archive without padding behind its mark of the end; a broken time takes two headers for each member."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(data), mtime
            archive.addfile(header, io.BytesIO(data))
        end = archive.offset
    return content.getvalue()[: end + 1024] if mode == "w" else content.getvalue()


def write_shards(folder: Path, lengths: Sequence[int], first: int = 0) -> list[str]:
    """Write shards of samples that are numbered through, and give their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, number = [], first
    for shard, length in enumerate(lengths):
        path = folder / f"s-{shard:02}.tar"
        path.write_bytes(bare_tar(file for at in range(number, number + length) for file in sample(at)))
        paths.append(str(path))
        number += length
    return paths
