"""What stands for lists of texts: it holds the same."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from torch.utils.data import Dataset

from lpl_lightning.data.folder_dataset import ImageFolderDataset
from lpl_lightning.data.texts import LabeledFiles, TextLists, Texts

TEXTS = ["", "plain", "naïve \N{SNOWMAN}", os.fsdecode(b"\xff.png"), "\ud83d of JSON", ""]


@pytest.mark.parametrize(
    ("packed", "items"),
    [
        (Texts(TEXTS), TEXTS),
        (Texts([]), []),
        (TextLists([TEXTS, [], ["one"]]), [tuple(TEXTS), (), ("one",)]),
        (LabeledFiles([*zip(TEXTS, range(6), strict=True)]), [*zip(TEXTS, range(6), strict=True)]),
        (LabeledFiles([("a", None), ("b", 2**40)]), [("a", None), ("b", 2**40)]),
    ],
)
def test_it_is_the_list(packed: Sequence[Any], items: list[Any]) -> None:
    assert len(packed) == len(items)
    assert list(packed) == items
    assert [packed[i] for i in range(-len(items), len(items))] == items * 2
    assert packed[1:-1] == items[1:-1]
    assert packed[::-2] == items[::-2]
    assert packed == items
    assert packed == pickle.loads(pickle.dumps(packed))
    assert packed != [*items, "more"]
    for index in (len(items), -len(items) - 1):
        with pytest.raises(IndexError):
            _ = packed[index]


def test_an_image_folder_has_a_few_objects_however_many_images() -> None:
    """What a loader process looks at is copied to it: a list would be, text by text."""

    def objects(count: int) -> int:
        files = [(f"{number}.png", number % 7) for number in range(count)]
        dataset = ImageFolderDataset(files, 8, captions=[[f"photo {number}", "photo"] for number in range(count)])
        seen: set[int] = set()

        def walk(found: object) -> None:
            if id(found) not in seen:
                seen.add(id(found))
                if isinstance(found, dict | list | tuple):
                    for part in found.values() if isinstance(found, dict) else found:
                        walk(part)
                elif isinstance(found, Dataset | Texts | TextLists | LabeledFiles):
                    walk(vars(found))

        walk(dataset)
        return len(seen)

    assert objects(1000) <= objects(10)
