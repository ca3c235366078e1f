r"""Where the Latent Perceptual Loss spends its time: the decoder's stages, the comparison, and the floor.

The floor of a loss over a frozen decoder's features is what no way of computing it can do without: the features of
:math:`z_0`, those of :math:`\hat z_0`, and one gradient of its input, of the decoder as it is. The loss adds masks and
distances to that, and saves where it runs the decoder cheaper (``Execution.fold_upsampling``, ``compile``) or looks at
a part only (``Subset``), so that its time over the floor's can be below 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lpl_lightning.execution import Execution, StageRunner
from lpl_lightning.losses import LatentPerceptualLoss
from lpl_lightning.losses.comparison import Part
from lpl_lightning.losses.measurement import synchronize
from lpl_lightning.stages import Stage

__all__ = ["DecoderCost", "StageCost", "profile_decoder"]

Chunks = list[tuple[Tensor, Tensor]]
"""Estimates z0_hat and clean latents z0 (n, C, *positions) that go through the decoder together."""


@dataclass(frozen=True)
class StageCost:
    """Of one stage, for all samples.

    Attributes:
        name: Its name; "decoder" where a decoder with ``feature_modules`` runs as one.
        forward_s: Seconds of one run that keeps what its gradient needs. The loss runs it twice.
        input_gradient_s: Seconds of the gradient of its input.
        comparison_s: Seconds of its map's mask and distance with its gradient; None where it is not compared.
    """

    name: str
    forward_s: float
    input_gradient_s: float
    comparison_s: float | None


@dataclass(frozen=True)
class DecoderCost:
    """Medians over repeated measurements.

    Attributes:
        samples: Samples decoded.
        chunk_size: Of how many at once.
        repeats: Times that each was measured.
        stages: By stage.
        comparison_s: Seconds of all comparisons.
        loss_s: Seconds of the loss's value and its gradient.
        floor_s: Seconds of two partial forwards and one input-gradient pass.
        loss_over_floor: Their ratio.
    """

    samples: int
    chunk_size: int
    repeats: int
    stages: list[StageCost]
    comparison_s: float
    loss_s: float
    floor_s: float
    loss_over_floor: float


def profile_decoder(loss: LatentPerceptualLoss, z0_hat: Tensor, z0: Tensor, repeats: int) -> DecoderCost | None:
    """Measure the parts of a loss on samples that have passed its gate.

    Args:
        loss: The loss; its decoder is on the latents' device.
        z0_hat: Estimates (n, C, *positions).
        z0: Clean latents, likewise.
        repeats: How often; once more before that to warm up.

    Returns:
        What they cost, or None where the loss compares nothing.
    """
    if not loss.compared:
        return None
    size = loss.chunk_size(z0) if loss.execution.streamed else len(z0)
    size = math.ceil(len(z0) / math.ceil(len(z0) / size))  # as ``stream`` evens them out
    z0_hat, z0 = z0_hat.detach(), z0.detach()
    chunks = list(zip(z0_hat.split(size), z0.split(size), strict=True))
    floor = _Floor(loss, chunks)
    runner = _TimedStages(loss.execution)  # one, so that what it compiles and folds is done before times count
    floors: list[float] = []
    losses: list[float] = []
    stages: list[dict[str, tuple[float, float]]] = []
    compared: list[list[float]] = []
    # In turns, so that a drift of the machine shows in all alike.
    for _ in range(1 + repeats):
        floors.append(_timed(floor, z0.device))
        losses.append(_timed(lambda: _value_and_gradient(loss, z0_hat, z0), z0.device))
        stages.append(_by_stage(loss, chunks, runner))
        compared.append(_by_compared(loss, chunks))
    loss.flush()
    # Up to each map, which cannot take longer than up to a later one, so that the cost of one is what it adds.
    medians = [median(times) for times in zip(*compared[1:], strict=True)]
    up_to = [0.0, *(min(medians[i:]) for i in range(len(medians)))]
    alone = {name: after - before for name, (before, after) in zip(loss.compared, pairwise(up_to), strict=True)}
    loss_s, floor_s = median(losses[1:]), median(floors[1:])
    return DecoderCost(
        samples=len(z0),
        chunk_size=size,
        repeats=repeats,
        stages=[
            StageCost(
                name,
                forward_s=median(run[name][0] for run in stages[1:]),
                input_gradient_s=median(run[name][1] for run in stages[1:]),
                comparison_s=up_to[-1] if name == "decoder" else alone.get(name),
            )
            for name in stages[0]
        ],
        comparison_s=up_to[-1],
        loss_s=loss_s,
        floor_s=floor_s,
        loss_over_floor=loss_s / floor_s,
    )


class _TimedStages(StageRunner):
    """Takes the time of each stage by itself, and of its gradient."""

    def __init__(self, execution: Execution) -> None:
        super().__init__(execution)
        self.taken: dict[str, tuple[float, float]] = {}

    def __call__(self, stage: Stage, current: Any, z: Tensor) -> Any:
        """Run a stage, cut off from those before."""
        current = _leaf(current)
        leaves = [tensor for tensor in _tensors(current) if tensor.requires_grad]
        with torch.enable_grad():
            start = synchronize(z.device)
            output = super().__call__(stage, current, z)
            forward = synchronize(z.device) - start
            outputs = [tensor for tensor in _tensors(output) if tensor.requires_grad]
            cotangents = [torch.randn_like(tensor) for tensor in outputs]
            start = synchronize(z.device)
            if outputs:
                torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
        self.taken[stage.name] = (forward, synchronize(z.device) - start)
        return output


def _by_stage(loss: LatentPerceptualLoss, chunks: Chunks, runner: _TimedStages) -> dict[str, tuple[float, float]]:
    """Seconds of each stage and of its gradient."""
    total: dict[str, tuple[float, float]] = {}
    for z0_hat, _ in chunks:
        runner.taken = {}
        if loss.autoencoder.in_stages:
            with torch.no_grad():
                loss.features(z0_hat, loss.compared, runner)
        else:
            leaf = _leaf(z0_hat)
            start = synchronize(z0_hat.device)
            maps = [m for m in loss.features(leaf, loss.compared, runner) if m.requires_grad]
            forward = synchronize(z0_hat.device) - start
            cotangents = [torch.randn_like(m) for m in maps]
            start = synchronize(z0_hat.device)
            torch.autograd.grad(maps, leaf, cotangents)
            runner.taken["decoder"] = (forward, synchronize(z0_hat.device) - start)
        for name, times in runner.taken.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + times[0], before[1] + times[1])
    return total


def _by_compared(loss: LatentPerceptualLoss, chunks: Chunks) -> list[float]:
    """Seconds of comparing the first map, the first two, and so on."""
    count, all_names = len(loss.compared), loss.comparison.names
    seconds = [0.0] * count
    with torch.no_grad():
        for z0_hat, z0 in chunks:
            predictions, targets = loss.features(z0_hat, all_names), loss.features(z0, all_names)
            # The longest first: what it warms up is then warm for all.
            for i in reversed(range(count)):
                names = all_names[: all_names.index(loss.compared[i]) + 1]
                part = Part(None, names, (1.0,) * count)
                maps, others = predictions[: len(names)], targets[: len(names)]
                start = synchronize(z0.device)
                with torch.autocast(z0.device.type, enabled=False):
                    loss.comparison(part, (z0_hat, z0), maps, others, with_gradients=True)
                seconds[i] += synchronize(z0.device) - start
    return seconds


class _Floor:
    """Two partial forwards and one input-gradient pass, of each chunk."""

    def __init__(self, loss: LatentPerceptualLoss, chunks: Chunks) -> None:
        self.loss = loss
        self.chunks = chunks
        # Not streamed, operations run as they are.
        self.runner = StageRunner(replace(loss.execution, streamed=False, compile=False, checkpoint=False))
        self._cotangents: list[Tensor] = []

    def __call__(self) -> None:
        """Run it."""
        for z0_hat, z0 in self.chunks:
            with torch.no_grad():
                self.loss.features(z0, self.loss.compared, self.runner)
            leaf = _leaf(z0_hat)
            maps = [m for m in self.loss.features(leaf, self.loss.compared, self.runner) if m.requires_grad]
            # Made once, in the warm-up: the first chunk is never smaller than the others.
            self._cotangents = self._cotangents or [torch.randn_like(m) for m in maps]
            torch.autograd.grad(maps, leaf, [c[: len(leaf)] for c in self._cotangents])


def _value_and_gradient(loss: LatentPerceptualLoss, z0_hat: Tensor, z0: Tensor) -> None:
    leaf = _leaf(z0_hat)
    torch.autograd.grad(loss(leaf, z0).mean(), leaf)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    start = synchronize(device)
    run()
    return synchronize(device) - start


def _leaf(value: Any) -> Any:
    """Tensors, also of a tuple or list, as leaves that take a gradient; all else as it is."""
    if isinstance(value, tuple | list):
        return type(value)(_leaf(item) for item in value)
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.is_floating_point())
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Tensor):
        yield value
