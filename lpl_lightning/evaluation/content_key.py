"""A key of a set of files that changes with what is in them, at a cost that stays small for large sets.

Names, sizes and times alone do not tell files apart: uncompressed images of one size, copied or unpacked with fixed
times, have all three in common. What is promised, besides that another name, size, time or number of files gives
another key:

- Of sets up to ``WHOLE`` bytes every byte counts.
- Of larger sets every byte counts in some files, as many as make up ``WHOLE`` bytes, spaced evenly over the set, and in
  each of the others the first and last ``END`` bytes. The end of a PNG holds a checksum of all its pixels, and what
  changes in a compressed image usually moves its end; what is uncompressed may change in between unseen. Results are
  found out to be of other images where a measure has to read all of them (``Evaluator.take_real``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import chain

__all__ = ["content_key"]

WHOLE = 256 * 2**20
"""Bytes of a set that are looked at whole."""

END = 4096
"""Bytes at the head and at the tail of each other file."""

_CHUNK = 64  # files per task of a thread
_READ = 2**20  # bytes at once


def content_key(paths: Sequence[str], names: Sequence[str], about: str) -> str:
    """Hash files.

    Args:
        paths: The files.
        names: What each is called in the set.
        about: What else the key shall depend on.

    Returns:
        32 hexadecimal digits.
    """
    stats = [os.stat(path) for path in paths]
    # Every so many files one is taken whole; of a small set all are.
    step = max(1, -(-sum(found.st_size for found in stats) // WHOLE))

    def hashed(start: int) -> list[bytes]:
        places = range(start, min(start + _CHUNK, len(paths)))
        return [_hash(paths[i], stats[i].st_size, whole=i % step == 0) for i in places]

    with ThreadPoolExecutor() as pool:
        contents = chain.from_iterable(pool.map(hashed, range(0, len(paths), _CHUNK)))
        digest = blake2b(f"{about} {step}".encode(), digest_size=16)
        for name, found, content in zip(names, stats, contents, strict=True):
            digest.update(b"\0" + os.fsencode(name) + f"\0{found.st_size} {found.st_mtime_ns}\0".encode() + content)
    return digest.hexdigest()


def _hash(path: str, size: int, whole: bool) -> bytes:
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        if whole or size <= 2 * END:
            while part := file.read(_READ):
                digest.update(part)
        else:
            digest.update(file.read(END))
            file.seek(-END, os.SEEK_END)
            digest.update(file.read(END))
    return digest.digest()
