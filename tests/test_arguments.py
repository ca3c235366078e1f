from __future__ import annotations

import pytest

from lpl_lightning.arguments import at_least


def test_the_first_that_is_too_small_is_named() -> None:
    at_least(0, a=0, b=2.5)
    with pytest.raises(ValueError, match="`b` must be 1 or more, got 0"):
        at_least(1, a=1, b=0, c=-3)
