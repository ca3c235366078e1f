from __future__ import annotations

import math

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from lpl_lightning.arguments import at_least, refused_by_loader, whole_at_least
from lpl_lightning.data.reading import read_rgb


def test_the_first_that_is_too_small_is_named() -> None:
    at_least(0, a=0, b=2.5)
    with pytest.raises(ValueError, match="`b` must be 1 or more, got 0"):
        at_least(1, a=1, b=0, c=-3)
    with pytest.raises(ValueError, match="`a` must be 0 or more, got nan"):
        at_least(0, a=math.nan)


def test_what_is_not_whole_is_named() -> None:
    whole_at_least(0, a=0, b=np.int64(3))  # type: ignore[arg-type]
    for value in (0.5, 2.0, math.nan, True, "3"):
        with pytest.raises(ValueError, match=f"`b` must be a whole number, got {value!r}"):
            whole_at_least(0, a=1, b=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`a` must be 1 or more, got 0"):
        whole_at_least(1, a=0)


class Failing(Dataset[int]):
    """Fails at an image that is not there, or else in another library."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getitem__(self, index: int) -> int:
        return read_rgb(self.path).width if self.path else int("x")


@pytest.mark.parametrize("path", ["cat\n1: .jpg", ""])
def test_what_a_loader_process_refused_is_said_without_its_traceback(path: str) -> None:
    with pytest.raises(ValueError, match="Original Traceback") as caught:
        list(DataLoader(Failing(path), sampler=[0], num_workers=1))
    said = refused_by_loader(caught.value)
    if path:
        assert said.startswith("cat\n1: .jpg cannot be read (FileNotFoundError: ")
        assert said.endswith("Mend or remove it, or set `on_error` to skip it.")
    else:
        assert said == ""
    assert refused_by_loader(ValueError("`a` must be 1")) == ""
