"""Captions of the images of a folder, and prompts.

Two layouts are read; all text is UTF-8.

- ``sidecar``: ``cat/1.jpg`` has ``cat/1.txt`` beside it, one caption a line.
- ``metadata``: ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``, as in Hugging Face's image folders, has a
  row for each image: its path, relative to the file's folder, in the column ``file_name``, and captions in other
  columns. Several rows of one image, several columns, and in jsonl and Parquet a list of strings, are several captions.
  The file lies in the folder of the images; or in the one above it, so that it can serve ``train/`` and ``val/`` alike;
  or, where that is said, anywhere, with paths relative to either of these folders.

Captions lose white space at both ends; one of which nothing is left is none.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lpl_lightning.data.listing import some

__all__ = [
    "CaptionSource",
    "Captioned",
    "MissingCaptions",
    "read_metadata",
    "read_prompts",
    "read_sidecars",
    "texts_of",
]

CaptionSource = Literal["sidecar", "metadata"]
MissingCaptions = Literal["raise", "skip", "empty"]
FILE_NAME = "file_name"
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class Captioned(NamedTuple):
    """Captions that were found.

    Attributes:
        texts: Those of each image that has any.
        doubled: What comes a second time and does not count, images or rows by name: the reasons.
        total: How many images or rows those are among.
        what: What is left out with them, for a message.
    """

    texts: dict[str, tuple[str, ...]]
    doubled: dict[str, str]
    total: int
    what: str


def read_sidecars(paths: Sequence[str]) -> Captioned:
    """Read the text files beside images.

    Args:
        paths: Images. Of several beside one text file, as ``1.jpg`` and ``1.png`` are, it is the first's.

    Raises:
        ValueError: A file is not UTF-8, or not a file that can be read.
    """
    captions: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    doubled = {}
    for path in paths:
        place = os.path.splitext(path)[0]
        if (first := owner.get(place)) is not None:
            doubled[path] = f"its text file is that of {first} too"
            continue
        try:
            found = _lines(Path(path).with_suffix(".txt"))
        except FileNotFoundError:
            continue
        owner[place] = path
        if found:
            captions[path] = found
    return Captioned(captions, doubled, len(paths), "images whose text file is another's too")


def read_metadata(
    folder: Path, paths: Iterable[str], columns: Sequence[str], place: Path | None = None, is_shared: bool = False
) -> Captioned:
    """Read the table of a folder's images.

    Args:
        folder: The folder; the table is in it, or in the one above where it has none itself.
        paths: Images in the folder, at any depth; rows of other files are passed over.
        columns: Names of the columns that hold captions.
        place: Another folder that the table is in. Its paths are then relative to ``folder``; or to the one above it,
            if that is where the first that leads to a file does so.
        is_shared: Take the table in ``place`` in the latter case alone, otherwise the folder's own.

    Returns:
        Captions row by row, in the order of the columns. A row that says of its image what others have said is doubled.

    Raises:
        FileNotFoundError: There is no table.
        ModuleNotFoundError: It is a Parquet file, and pyarrow is not installed.
        ValueError: There are two, or one that is not UTF-8, cannot be parsed, lacks a column, or names files in the
            folder that are not there.
    """
    elsewhere = None if place is None else _table_in(place, folder, columns)
    if elsewhere is not None and is_shared and not elsewhere[1]:
        elsewhere = None  # its paths are of another folder alone
    table, prefix = elsewhere or _find_table(folder)
    captions: dict[str, list[str]] = {path: [] for path in paths}
    known: dict[str, None] = {}
    absent: dict[str, None] = {}
    doubled, total = {}, 0
    own = Path(os.path.abspath(folder))
    base = own.parent if prefix else own
    for line, row in _rows(table, columns):
        known |= dict.fromkeys(row)
        if FILE_NAME not in row:
            raise ValueError(
                f"{line} must name its image in the column `{FILE_NAME}`, but the columns are {some(row)}. "
                f"Rename the column that holds the path relative to {base}."
            )
        name = row[FILE_NAME]
        if not isinstance(name, str) or not name:
            raise ValueError(f"{line} must name its image in the column `{FILE_NAME}`, got {name!r}.")
        name = os.path.normpath(name)
        if not name.startswith(prefix):
            continue
        path = os.path.join(folder, name.removeprefix(prefix))
        if path in captions:
            texts = [text for column in columns for text in texts_of(row.get(column), line, column)]
            total += 1
            if texts and all(text in captions[path] for text in texts):
                doubled[line.rstrip(",")] = f"another row has said the same of {name}"
            else:
                captions[path] += texts
        elif not os.path.exists(path):
            absent[name] = None
    if lacking := [column for column in columns if column not in known]:
        raise ValueError(
            f"{table} must have the columns of `caption_column`, but {some(lacking)} is not among "
            f"{some(known) or 'its columns, for it has no rows'}. Set `caption_column` to the one with the captions, "
            f"or to a list of those."
        )
    if absent:
        raise ValueError(
            f"{table} must name files that are there, but {len(absent)} in its column `{FILE_NAME}` are not: "
            f"{some(absent)}. Paths are relative to {base}; mend them, or remove these rows."
        )
    found = {path: tuple(texts) for path, texts in captions.items() if texts}
    return Captioned(found, doubled, total, "rows that say of an image what another has said")


def read_prompts(path: Path, argument: str = "prompts", what: str = "prompt") -> tuple[str, ...]:
    """Read a text file of one prompt, or another thing, a line; empty lines are passed over.

    Args:
        path: The file.
        argument: The argument that named it, for the errors.
        what: What its lines are.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none, holds no prompt, or is not UTF-8.
    """
    wanted = f"`{argument}` must be a text file with one {what} a line, but"
    if not path.exists():
        raise FileNotFoundError(f"{wanted} {path} does not exist.")
    if not path.is_file():
        raise ValueError(f"{wanted} {path} is a folder.")
    prompts = _lines(path)
    if not prompts:
        raise ValueError(f"{wanted} {path} is empty.")
    return prompts


def _text(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} must be a text file, but is none. Move it elsewhere.")
        return path.read_bytes().decode("utf-8-sig")
    except PermissionError as error:
        raise ValueError(f"{path} may not be read. Change its permissions.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8 text, but its byte {error.start} is not. Save it as UTF-8: in an editor, or with "
            f"`iconv -f ENCODING -t UTF-8`, where ENCODING is what it has now, such as LATIN1 or UTF-16."
        ) from error


def _lines(path: Path) -> tuple[str, ...]:
    # str.splitlines would also break at characters that stand within a line, such as U+2028.
    return tuple(text for line in io.StringIO(_text(path), newline=None) if (text := line.strip()))


def _find_table(folder: Path) -> tuple[Path, str]:
    """The table of a folder, and what the names of the folder's images begin with in it."""
    own = Path(os.path.abspath(folder))
    for place, prefix in ((own, ""), (own.parent, own.name + os.sep)):
        if (table := _only_table(place)) is not None:
            return table, prefix
    raise FileNotFoundError(
        f"`captions`: metadata needs metadata.jsonl, metadata.csv or metadata.parquet in {own}, or in the folder above "
        f"it, but there is none. Write one with the columns `{FILE_NAME}` and `caption_column`, set `caption_folder` "
        "to where one is, or set `captions`: sidecar."
    )


def _table_in(place: Path, folder: Path, columns: Sequence[str]) -> tuple[Path, str]:
    """The table in a place, and what the names of a folder's images begin with in it."""
    table = _only_table(place)
    if table is None:
        raise FileNotFoundError(
            f"`caption_folder` must hold a table of captions, but none of {some(TABLES)} is in {place}."
        )
    own = Path(os.path.abspath(folder))
    for _, row in _rows(table, columns):
        name = row.get(FILE_NAME)
        if isinstance(name, str) and name:
            if os.path.exists(own / name):
                break
            if os.path.exists(own.parent / name):
                return table, own.name + os.sep
    return table, ""


def _only_table(place: Path) -> Path | None:
    tables = [path for name in TABLES if (path := place / name).exists()]
    if len(tables) > 1:
        raise ValueError(f"{place} must hold one table of captions, but holds {some(tables)}. Remove all but one.")
    return tables[0] if tables else None


def _rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows by column, and where each is, for errors."""
    if table.suffix == ".parquet":
        yield from _parquet_rows(table, columns)
        return
    text = io.StringIO(_text(table), newline="")
    if table.suffix == ".jsonl":
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            place = f"{table}, line {number},"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place} must be JSON, but is not: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f'{place} must be a JSON object such as {{"{FILE_NAME}": "1.jpg", "text": "a cat"}}.')
            yield place, row
        return
    # Strict: otherwise a quotation mark that is not closed would swallow the rows after it.
    reader = csv.DictReader(text, strict=True)
    try:
        names = reader.fieldnames or ()
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{table} must name each column once, but has {some(twice)} several times.")
        for row in reader:
            place = f"{table}, line {reader.line_num},"
            if None in row:
                raise ValueError(
                    f"{place} has more fields than there are columns ({some(reader.fieldnames or ())}). "
                    f'Quote captions that hold commas: "a cat, asleep".'
                )
            yield place, row
    except csv.Error as error:
        begin = reader.line_num + 1
        raise ValueError(f"{table} must be CSV, but the row that begins in line {begin} is not: {error}.") from error


def _parquet_rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a Parquet file, by all of its columns; values are read of those alone that are needed."""
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise ModuleNotFoundError(
            f'{table} needs pyarrow: run pip install "lpl-lightning[data]" ({error}).', name="pyarrow"
        ) from error
    try:
        with parquet.ParquetFile(table) as file:
            names: list[str] = file.schema_arrow.names
            wanted, number = [name for name in dict.fromkeys([FILE_NAME, *columns]) if name in names], 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{table}, row {number},", {**dict.fromkeys(names), **row}
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise ValueError(f"{table} must be a Parquet file, but cannot be read as one: {error}") from error


def texts_of(cell: object, place: str, column: str) -> list[str]:
    """The captions in one cell: a string, a list of strings or nothing.

    Raises:
        ValueError: It is something else, or holds half a character.
    """
    texts = []
    for text in cell if isinstance(cell, list) else [cell]:
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(
                f"{place} must have a string, a list of strings or nothing in the column `{column}`, got {text!r}."
            )
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"{place} has half a character in the column `{column}`: {text!r}. Text that was cut short after it "
                f"was escaped may end so; remove the half."
            )
        texts.append(text.strip())
    return [text for text in texts if text]
