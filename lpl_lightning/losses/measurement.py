r"""What each compared map costs and how much its gradient varies, and the best random subset for a cost.

With the probability :math:`q_l` of the l-th map (``subset``), the cost :math:`c_l` of getting to it from the one
before, and :math:`G_l` the gradient of the maps from the l-th on, the estimate's gradient has the second moment

.. math:: \sum_l V_l / q_l, \quad V_l = \mathbb{E} \|G_l\|^2 - \mathbb{E} \|G_{l+1}\|^2,

at the cost :math:`\sum_l c_l q_l`. The least for a cost has :math:`q_l \propto \sqrt{V_l / c_l}`, at most 1; where that
would rise, neighbouring maps share one probability.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lpl_lightning.execution import StageRunner
from lpl_lightning.losses.comparison import Part
from lpl_lightning.losses.lpl import LatentPerceptualLoss
from lpl_lightning.losses.streaming import compare_whole, stream

__all__ = ["MapCosts", "best_probabilities", "measure_maps", "second_moment", "synchronize"]

LEAST = 1e-3
"""No map is computed with less than this probability, so that none is forgotten."""


@dataclass(frozen=True)
class MapCosts:
    """Of each compared map, shallow to deep.

    Attributes:
        seconds: From the map before to it, for one sample: both passes, the comparison and the gradient.
        moments: V, see above; in units of the squared gradient at the latents.
    """

    seconds: tuple[float, ...]
    moments: tuple[float, ...]


def measure_maps(loss: LatentPerceptualLoss, z0_hat: Tensor, z0: Tensor, repeats: int = 3) -> MapCosts:
    """Measure a loss on latents of a training step.

    Args:
        loss: The loss.
        z0_hat: Estimates (n, C, *positions) of samples that passed the gate; at most four are looked at.
        z0: Clean latents, likewise.
        repeats: How often each time is taken; the least counts.
    """
    z0_hat, z0 = z0_hat[:4].detach(), z0[:4].detach()
    maps, names = len(loss.compared), loss.comparison.names
    everything = (1.0,) * maps
    seconds = []
    chunk = loss.chunk_size(z0)
    for name in loss.compared:
        part = Part(None, names[: names.index(name) + 1], everything)
        run = partial(stream, loss.features, loss.comparison, z0_hat, z0, [part], chunk, loss.execution.static_shapes)
        run()  # compiles, and finds memory
        taken = []
        for _ in range(repeats):
            start = synchronize(z0.device)
            run()
            taken.append(synchronize(z0.device) - start)
        seconds.append(min(taken) / len(z0))
    steps = [max(after - before, 1e-3 * seconds[-1]) for before, after in zip([0.0, *seconds], seconds, strict=False)]
    return MapCosts(tuple(steps), tuple(_moments(loss, z0_hat, z0)))


def _moments(loss: LatentPerceptualLoss, z0_hat: Tensor, z0: Tensor) -> list[float]:
    """V of each map, the mean over samples, one at a time for their graphs."""
    runner = StageRunner(replace(loss.execution, compile=False))  # of four samples, not worth compiling for
    part = Part(None, loss.comparison.names, (1.0,) * len(loss.compared))
    tails = torch.zeros(len(loss.compared) + 1, dtype=torch.float64)
    for i in range(len(z0)):
        leaf = z0_hat[i : i + 1].clone().requires_grad_()
        with torch.enable_grad():
            features = partial(loss.features, runner=runner)
            parts = compare_whole(features, loss.comparison, leaf, z0[i : i + 1], [part]).parts
        tail = torch.zeros_like(leaf)
        for k in reversed(range(len(parts))):
            (gradient,) = torch.autograd.grad(parts[k].sum(), leaf, retain_graph=k > 0)
            tail = tail + gradient
            tails[k] += tail.double().square().sum().cpu()
    found = (tails[:-1] - tails[1:]) / len(z0)
    return [value if math.isfinite(value) else 0.0 for value in found.tolist()]


def best_probabilities(costs: MapCosts, share: float) -> list[float]:
    """Probabilities of the least second moment for a cost.

    Args:
        costs: What the maps cost and vary.
        share: The cost, as a part of that of all maps of all samples, above 0.

    Returns:
        One for each map, from ``LEAST`` to 1, not rising.
    """
    if share >= 1:
        return [1.0] * len(costs.seconds)
    total = sum(abs(v) for v in costs.moments) or 1.0
    # Maps that share a probability: their cost, their moment and how many they are.
    pools: list[tuple[float, float, int]] = []
    for seconds, moment in zip(costs.seconds, costs.moments, strict=True):
        pools.append((seconds, moment, 1))
        while len(pools) > 1 and pools[-1][1] * pools[-2][0] >= pools[-2][1] * pools[-1][0]:
            (c, v, n), (d, w, m) = pools[-2:]
            pools[-2:] = [(c + d, v + w, n + m)]
    ratios = [math.sqrt(max(v, 1e-12 * total) / c) for c, v, n in pools for _ in range(n)]
    low, high = 0.0, 1 / min(ratios)
    for _ in range(100):
        scale = (low + high) / 2
        found = [min(1.0, max(LEAST, scale * ratio)) for ratio in ratios]
        spent = sum(c * q for c, q in zip(costs.seconds, found, strict=True))
        low, high = (scale, high) if spent < share * sum(costs.seconds) else (low, scale)
    return found


def second_moment(costs: MapCosts, probabilities: Sequence[float]) -> float:
    """That of the estimate's gradient, over that of the exact gradient."""
    return sum(v / q for v, q in zip(costs.moments, probabilities, strict=True)) / sum(costs.moments)


def synchronize(device: torch.device) -> float:
    """The time in seconds, after all work on a device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
