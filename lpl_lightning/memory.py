"""Work on a batch that goes on, in smaller parts, where it does not fit in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

__all__ = ["Halving", "is_out_of_memory", "say_halved"]

Found = TypeVar("Found")

_log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says: PyTorch's on any device, cuDNN's, or that of the CPU's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)


def say_halved(what: str, size: int, now: int) -> None:
    """Log, in whichever process it was, that so many samples were too many."""
    _log.warning("%s: %d samples do not fit in memory at once; from now on %d.", what, size, now)


class Halving:
    """Runs a function of samples whole or, once that was too large for memory, in parts, and keeps to their size."""

    def __init__(self) -> None:
        self._most: dict[object, int] = {}

    def __call__(
        self, what: str, run: Callable[[Tensor], Found], batch: Tensor, join: Callable[[list[Found]], Found]
    ) -> Found:
        """Run.

        Args:
            what: What it is, in the log.
            run: The function, by which samples do not depend on each other.
            batch: Samples (B, ...). Where gradients flow to them they are run whole: parts would hold as much.
            join: Puts what was found of parts together.

        Raises:
            RuntimeError: A single sample does not fit in memory.
        """
        if torch.is_grad_enabled() and batch.requires_grad:
            return run(batch)
        key = (what, batch.shape[1:], batch.dtype, batch.device)
        found: list[Found] = []
        done = 0
        while done < len(batch) or not found:
            left = len(batch) - done
            most = self._most.get(key, max(1, left))
            # Parts of about one size, so that the last one is not much smaller than memory allows.
            count = math.ceil(left / math.ceil(left / most)) if left else 0
            try:
                found.append(run(batch if count == len(batch) else batch[done : done + count]))
            except RuntimeError as error:
                if not is_out_of_memory(error) or count < 2:
                    raise
                too_many = count
            else:
                done += count
                continue
            # Out here the error is gone, and with it what its frames held.
            self._most[key] = math.ceil(too_many / 2)
            say_halved(what, too_many, self._most[key])
        return found[0] if len(found) == 1 else join(found)
