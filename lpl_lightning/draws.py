"""Random numbers of training and validation: each sample's come from a seed and its number in the run alone.

Sample n takes two blocks of the counter-based generator Philox (Salmon et al., 2011) with the run's seed as its key. So
neither the number of processes that share out a batch, nor of the parts that it is accumulated in, nor where a run was
stopped, changes what a sample draws. Where batches differ in size, each takes as many numbers as the largest so far.
Noise is drawn on the device of its latents, by a generator for each sample whose seed is one of these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Draws", "Generators", "mixed", "normal"]

Generators = torch.Generator | Sequence[torch.Generator]
"""One for a batch, or one for each of its samples."""

_WORDS = 8
"""64-bit numbers of a sample."""
_SHARED = 2**192
"""Where the blocks of batches begin, beyond those of samples."""


@dataclass(frozen=True)
class Draws:
    """What is drawn for the B samples of a batch; numbers are (B,) float64, uniform in (0, 1), on the CPU.

    Attributes:
        time: For the time, by ``NoiseProcess.times``.
        drop: For whether a sample loses its condition.
        caption: For the choice of one of several captions.
        subset: For how many feature maps a random subset of LPL compares.
        generators: One for each sample, of its noise.
        shared: For what is drawn once for a batch of all processes together, a seed.
    """

    time: Tensor
    drop: Tensor
    caption: Tensor
    subset: Tensor
    generators: list[torch.Generator]
    shared: int

    @classmethod
    def of(
        cls, seed: int, first: int, count: int, step: int = 1, device: torch.device | str = "cpu", batch: int = 0
    ) -> Draws:
        """Draw for the samples ``first``, ``first + step``, ...

        Args:
            seed: The run's, 0 or more.
            first: Number of the first sample, from 0.
            count: Number of samples B.
            step: What samples' numbers rise by.
            device: Where noise is drawn.
            batch: Number of the batch.
        """
        source = np.random.Philox(key=seed, counter=first * _WORDS // 4)
        words = source.random_raw(max(0, (count - 1) * step + 1) * _WORDS).reshape(-1, _WORDS)[::step][:count]
        uniform = torch.from_numpy((words[:, :4] >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54)
        # Of seeds on the CPU PyTorch takes 32 bits.
        generators = [torch.Generator(device).manual_seed(int(word) >> 1) for word in words[:, 4]]
        time, drop, caption, subset = uniform.unbind(dim=1)
        shared = int(np.random.Philox(key=seed, counter=_SHARED + batch).random_raw()) >> 1
        return cls(time, drop, caption, subset, generators, shared)

    def of_first(self, count: int) -> Draws:
        """Those of the first ``count`` samples alone."""
        numbers = {name: getattr(self, name)[:count] for name in ("time", "drop", "caption", "subset", "generators")}
        return replace(self, **numbers)

    def shared_generator(self) -> torch.Generator:
        """A generator on the CPU for what is drawn once for the batch."""
        return torch.Generator().manual_seed(self.shared)

    @classmethod
    def fresh(cls, count: int, device: torch.device | str = "cpu") -> Draws:
        """Draw from PyTorch's own generator, where there is no run."""
        return cls.of(int(torch.randint(2**62, ())), 0, count, device=device)


def normal(
    shape: Sequence[int], generator: Generators | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise.

    Args:
        shape: (B, ...).
        generator: Where it is drawn from, and on whose device; with one for each sample, a sample's noise is the same
            in any batch. None draws from PyTorch's own.
        device: Where it is put.
        dtype: Its type.
    """
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=where, dtype=dtype).to(device)
    own = tuple(shape[1:])
    each = [torch.randn(own, generator=one, device=one.device, dtype=dtype) for one in generator]
    return torch.stack(each).to(device) if each else torch.empty(tuple(shape), device=device, dtype=dtype)


def mixed(seed: int, epoch: int, indices: npt.NDArray[np.int64], stream: int) -> npt.NDArray[np.uint64]:
    """Numbers of items, by seed, epoch and index alone: the finalizer of SplitMix64 (Steele et al., 2014), in a chain.

    Args:
        seed: The run's.
        epoch: Number of the epoch, from 0.
        indices: (N,) positions of the items, from 0.
        stream: Which of several numbers of an item, from 0.

    Returns:
        (N,) uniform 64-bit numbers.
    """
    found = np.zeros(len(indices), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number in (np.uint64(seed % 2**64), np.uint64(epoch), np.uint64(stream), indices.astype(np.uint64)):
            found = (found ^ number) + np.uint64(0x9E3779B97F4A7C15)
            found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            found ^= found >> np.uint64(31)
    return found
