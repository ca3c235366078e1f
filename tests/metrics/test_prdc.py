"""``python test_prdc.py FOLDER RANK`` computes the metric on one of two processes, of which one has none generated."""

from __future__ import annotations

import math
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from forked import Script, ended_well
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpl_lightning.metrics.pair_distances import (
    Points,
    Rounded,
    common_points,
    exact_squares,
    lower_bounds,
    upper_bounds,
)
from lpl_lightning.metrics.prdc import PRDC, Overlap, nearest_distances, prdc

TYPES = [torch.bfloat16, torch.float32, torch.float64]
PASSES = [None, [], *([dtype] for dtype in TYPES), TYPES]


def naive_radii(points: list[list[float]], k: int) -> list[float]:
    return [sorted(math.dist(a, b) for j, b in enumerate(points) if j != i)[k - 1] for i, a in enumerate(points)]


def naive(real: Tensor, generated: Tensor, k: int) -> Overlap:
    """The four definitions, one pair after another."""
    x, y = real.double().tolist(), generated.double().tolist()
    x_radii, y_radii = naive_radii(x, k), naive_radii(y, k)
    precise = recalled = held = covered = 0
    for b in y:
        balls = sum(math.dist(a, b) < radius for a, radius in zip(x, x_radii, strict=True))
        precise += balls > 0
        held += balls
    for a, radius in zip(x, x_radii, strict=True):
        recalled += any(math.dist(a, b) < other for b, other in zip(y, y_radii, strict=True))
        covered += any(math.dist(a, b) < radius for b in y)
    return Overlap(precise / len(y), recalled / len(x), held / k / len(y), covered / len(x))


def normal(n: int, m: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, dim), 0.9 * torch.randn(m, dim) + 0.1


def clusters(spread: float) -> tuple[Tensor, Tensor]:
    """Tight ones, hundreds apart, thousands from the origin."""
    centres = 3000 + 300 * torch.randn(4, 12, dtype=torch.float64)
    real, generated = (
        centres.repeat(count, 1) + spread * torch.randn(4 * count, 12, dtype=torch.float64) for count in (30, 25)
    )
    return real, generated


def as_floats(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    return real.float(), generated.float()


def outliers(n: int) -> Tensor:
    return torch.cat([1e4 * torch.randn(3, 8), torch.randn(n, 8)])


CASES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "equal": lambda: normal(90, 90, 16),
    "unequal": lambda: normal(150, 40, 3),
    "line": lambda: normal(60, 70, 1),
    "clusters": lambda: as_floats(*clusters(0.01)),
    "tight": lambda: clusters(1e-5),
    "tightest": lambda: clusters(1e-8),
    "ties": lambda: (torch.randint(4, (80, 2)).float(), torch.randint(4, (70, 2)).float()),
    "outliers": lambda: (outliers(90), outliers(80)),
    "large": lambda: (1e30 * torch.randn(50, 8), 1e30 * torch.randn(50, 8)),
    "small": lambda: (1e-30 * torch.randn(50, 8), 1e-30 * torch.randn(50, 8)),
    "collapsed": lambda: (torch.randn(60, 8), torch.ones(50, 8) * torch.randn(1, 8)),
    "one point": lambda: (torch.ones(20, 3), torch.ones(30, 3)),
}


@pytest.mark.parametrize("passes", PASSES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_a_double_loop(case: str, passes: list[torch.dtype] | None) -> None:
    real, generated = CASES[case]()
    for k in (1, 5):
        expected = naive(real, generated, k)
        assert prdc(real, generated, k, block_bytes=160 * 33**2, passes=passes) == pytest.approx(expected, abs=1e-12)
        radii = torch.tensor(naive_radii(real.double().tolist(), k), dtype=torch.float64)
        found = nearest_distances(real, k, block_bytes=160 * 33**2, passes=passes)
        torch.testing.assert_close(found, radii, rtol=1e-13, atol=0)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 50),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
    st.sampled_from(PASSES),
    st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_equals_a_double_loop(
    n: int,
    m: int,
    dim: int,
    k: int,
    side: int,
    dtype: torch.dtype,
    passes: list[torch.dtype] | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    real, generated = torch.randn(n + k, dim).to(dtype), torch.randn(m + k, dim).to(dtype)
    found = prdc(real, generated, k, block_bytes=160 * side**2, passes=passes)
    assert found == pytest.approx(naive(real, generated, k), abs=1e-12)


def test_equals_the_prdc_package() -> None:
    package = pytest.importorskip("prdc")
    real, generated = (x.double() for x in normal(300, 200, 32))
    expected = package.compute_prdc(real.numpy(), generated.numpy(), nearest_k=5)
    assert prdc(real, generated)._asdict() == pytest.approx(expected, abs=1e-12)


def test_a_set_and_itself() -> None:
    for x in (torch.randn(50, 7), 1e5 + torch.randn(300, 64)):
        assert prdc(x, x) == (1, 1, 1, 1)
        assert prdc(x, x.flip(0), 3) == (1, 1, 1, 1)


def test_sets_apart() -> None:
    assert prdc(torch.randn(50, 7), 1000 + torch.randn(40, 7)) == (0, 0, 0, 0)


def test_one_set_within_another() -> None:
    """Balls of radius 1 around 0 to 9, and of radius 0.1 around points between 4 and 5."""
    wide, narrow = torch.arange(10.0)[:, None], torch.tensor([[4.4], [4.5], [4.6]])
    assert prdc(wide, narrow, k=1) == (1, 0, 2, 0.2)
    assert prdc(narrow, wide, k=1) == (0, 1, 0, 0)


def test_distances_to_neighbours() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0], [3.0], [7.0]])
    assert nearest_distances(line, 1).tolist() == [1, 1, 0, 0, 4]
    assert nearest_distances(line, 2).tolist() == [3, 2, 2, 2, 4]
    assert nearest_distances(line, 4).tolist() == [7, 6, 4, 4, 7]


def test_points_at_equal_distances() -> None:
    """Corners of a simplex, each of which has all others as its nearest: none can be left out by bounds."""
    corners = torch.eye(1500)
    assert nearest_distances(corners, 5).tolist() == [math.sqrt(2)] * 1500
    few = torch.eye(120)
    assert nearest_distances(few, 5).tolist() == [math.sqrt(2)] * 120
    # Itself at the centre of its ball, and all others at its edge, outside.
    assert prdc(few, few, 5) == pytest.approx((1, 1, 1 / 5, 1))


def test_a_collapsed_set_is_measured_around_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the mean of both sets products do not order its distances, and all pairs would be measured one by one."""

    def refused(*args: Any) -> NoReturn:
        raise AssertionError("all pairs are measured")

    real, generated = torch.randn(300, 32), torch.randn(1, 32) + 1e-7 * torch.randn(300, 32)
    monkeypatch.setattr("lpl_lightning.metrics.pair_distances._nearest_of_all", refused)
    assert prdc(real.double(), generated.double()) == naive(real, generated, 5)


def test_features_are_rounded_only_for_passes_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 copies take twice the memory of the features."""
    made: list[torch.dtype] = []
    rounded = Points.rounded

    def watched(points: Points, dtype: torch.dtype) -> Rounded:
        made.append(dtype)
        return rounded(points, dtype)

    monkeypatch.setattr(Points, "rounded", watched)
    prdc(*normal(400, 300, 64), passes=[torch.float32])
    assert set(made) == {torch.float32}


@pytest.mark.parametrize("passes", PASSES, ids=str)
@pytest.mark.parametrize("side", [11, 40, 500])
def test_many_ties_equal_a_double_loop(side: int, passes: list[torch.dtype] | None) -> None:
    """More points equally near than are kept for each: a lattice, copies, a simplex beside a point far away."""
    lattice = torch.cartesian_prod(*[torch.arange(3.0)] * 4) + 0.1
    copies = torch.randn(4, 5).repeat(30, 1)
    simplex = torch.cat([torch.eye(60), torch.full((1, 60), 1e5)])
    for points in (lattice, copies, simplex, torch.cat([copies, 50 + torch.randn(30, 5)])):
        for k in (1, 3):
            radii = torch.tensor(naive_radii(points.double().tolist(), k), dtype=torch.float64)
            found = nearest_distances(points, k, 160 * side**2, passes)
            torch.testing.assert_close(found, radii, rtol=1e-13, atol=0)


@pytest.mark.parametrize("passes", PASSES, ids=str)
def test_block_size_changes_nothing(passes: list[torch.dtype] | None) -> None:
    real, generated = normal(130, 110, 40)
    distances = nearest_distances(real, 3)
    values = prdc(real, generated, 3)
    for side in (11, 64, 129, 130, 500):
        assert nearest_distances(real, 3, 160 * side**2, passes).equal(distances)
        assert prdc(real, generated, 3, 160 * side**2, passes) == values
    few = prdc(real[:12], generated[:9], 3)
    assert prdc(real[:12], generated[:9], 3, 160, passes) == few  # one pair at a time


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 500])
def test_bounds_hold(dtype: torch.dtype, dim: int) -> None:
    a, b = torch.randn(200, dim) * torch.logspace(-6, 1, 200)[:, None], torch.randn(150, dim)
    b[:50] = -a[:50]
    b[50:100] = a[50:100] * (1 + 1e-3 * torch.randn(50, 1))
    x, y = common_points(a + 3, b + 3)
    i, j = (index.flatten() for index in torch.meshgrid(torch.arange(200), torch.arange(150), indexing="ij"))
    rounded = x.rounded(dtype), y.rounded(dtype)
    exact = exact_squares(x, y, i, j)
    lower = lower_bounds(*rounded).flatten()
    upper = upper_bounds(*rounded, i, j, lower)
    assert (lower <= exact).all()
    assert (exact <= upper).all()
    norms = (rounded[0].squares[i] + rounded[1].squares[j]).double()
    width = {torch.bfloat16: 0.04, torch.float32: 3e-4, torch.float64: 1e-12}[dtype]
    assert (upper - lower <= width * norms + 1e-27).all()


@pytest.fixture(params=["medium products", "autocast", "threads"])
def lowered(request: pytest.FixtureRequest) -> Iterator[None]:
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=request.param == "autocast"):
        if request.param == "medium products":
            torch.set_float32_matmul_precision("medium")
        if request.param == "threads":
            torch.set_num_threads(2 if threads == 1 else 1)
        yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("lowered")
def test_global_settings_change_nothing() -> None:
    real, generated = (torch.randn(150, 64) for _ in range(2))
    assert prdc(real, generated, passes=[torch.float32]) == pytest.approx(naive(real, generated, 5), abs=1e-12)


def measure(batches: list[tuple[Tensor, bool]], metric: PRDC | None = None) -> dict[str, float]:
    metric = metric or PRDC(k=3)
    for features, real in batches:
        metric.update(features, real=real)
    return {name: value.item() for name, value in metric.compute().items()}


def test_batch_size_and_order_change_nothing() -> None:
    real, generated = normal(60, 50, 9)
    expected = {name: torch.tensor(value).item() for name, value in naive(real, generated, 3)._asdict().items()}
    for size in (1, 7, 60):
        batches = [(b, True) for b in real.split(size)] + [(b, False) for b in generated.split(size)]
        random.Random(size).shuffle(batches)
        assert measure(batches) == expected


def test_what_torchmetrics_users_expect() -> None:
    real, generated = normal(40, 50, 6)
    metric = PRDC(k=3)
    expected = measure([(real, True), (generated, False)], metric)
    assert metric.higher_is_better
    assert metric.is_differentiable is False
    assert metric.full_state_update is False
    copy = pickle.loads(pickle.dumps(metric))
    assert {name: value.item() for name, value in copy.compute().items()} == expected
    metric.reset()
    metric.update(real, real=True)
    with pytest.raises(ValueError, match="`generated` .* got 0"):
        metric.compute()
    metric.reset()
    # Another dimension is welcome after a reset.
    assert measure([(real[:, :2], True), (generated[:, :2], False)], metric) == measure(
        [(real[:, :2], True), (generated[:, :2], False)]
    )
    moved = copy.to("meta")
    assert moved.device.type == "meta"
    assert moved.real[0].device.type == "meta"


def test_batches_may_be_written_over() -> None:
    """By the next ones, as where features come in one buffer."""
    real, generated = normal(42, 36, 6)
    expected = measure([(real, True), (generated, False)])
    metric, buffer = PRDC(k=3), torch.empty(6, 6)
    for features, is_real in ((real, True), (generated, False)):
        for batch in features.split(6):
            metric.update(buffer.copy_(batch), real=is_real)
    assert {name: value.item() for name, value in metric.compute().items()} == expected


def test_a_call_is_refused_and_loses_nothing() -> None:
    real, generated = normal(40, 50, 6)
    metric = PRDC(k=3)
    expected = measure([(real, True), (generated, False)], metric)
    with pytest.raises(ValueError, match=r"`PRDC` must be given batches by `update`, got a call"):
        metric(generated, real=False)
    assert {name: value.item() for name, value in metric.compute().items()} == expected


def test_features_keep_their_precision() -> None:
    real, generated = clusters(1e-6)
    batches = [(real, True), (generated, False)]
    exact = naive(real, generated, 3)._asdict()
    double = PRDC(k=3)
    double.set_dtype(torch.float64)
    assert measure(batches, double) == pytest.approx(exact, rel=1e-6)
    single = naive(real.float(), generated.float(), 3)._asdict()
    assert single != exact
    assert measure(batches) == pytest.approx(single, rel=1e-6)
    # A module of 16-bit weights takes its metrics along.
    assert measure(batches, PRDC(k=3).to(torch.bfloat16)) == pytest.approx(single, rel=1e-6)


def test_refusals() -> None:
    x = torch.randn(8, 3)
    with pytest.raises(ValueError, match=r"`generated` must have at least k \+ 1 = 6 samples, got 5"):
        prdc(x, x[:5])
    with pytest.raises(ValueError, match=r"`real` must have at least k \+ 1 = 8 samples, got 2"):
        prdc(x[:2], x, k=7)
    with pytest.raises(ValueError, match=r"`features` must have at least k \+ 1 = 9 samples, got 8"):
        nearest_distances(x, 8)
    with pytest.raises(ValueError, match=r"as many dimensions, got \{'real': 3, 'generated': 2\}"):
        prdc(x, x[:, :2])
    with pytest.raises(ValueError, match="`k` must be 1 or more, got 0"):
        prdc(x, x, k=0)
    with pytest.raises(ValueError, match="`k` must be 1 or more, got 0"):
        PRDC(k=0)
    with pytest.raises(ValueError, match="`block_bytes` must be 160 or more"):
        PRDC(block_bytes=100)
    with pytest.raises(ValueError, match=r"`real` must be floating-point \(N, D\), got torch.int64"):
        prdc(x.long(), x)
    with pytest.raises(ValueError, match=r"`generated` must be floating-point .* \(2, 4, 3\)"):
        prdc(x, x.view(2, 4, 3))
    with pytest.raises(ValueError, match="`passes` must be"):
        prdc(x, x, passes=[torch.float16])
    with pytest.raises(ValueError, match="scale them down"):
        nearest_distances(1e200 * x.double(), 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_found(value: float) -> None:
    broken = torch.randn(8, 3)
    broken[6, 1] = value
    with pytest.raises(ValueError, match="`real` must be finite, got NaN or infinity in row 6"):
        prdc(broken, torch.randn(8, 3))
    metric = PRDC()
    metric.update(torch.randn(8, 3), real=True)
    with pytest.raises(ValueError, match=r"`features` of update 2 \(generated\) must be finite.* in row 6"):
        metric.update(broken, real=False)


def test_updates_of_other_dimensions_are_refused() -> None:
    metric = PRDC()
    metric.update(torch.randn(8, 3), real=True)
    with pytest.raises(ValueError, match=r"as many dimensions in all updates, got \[3, 4\]"):
        metric.update(torch.randn(8, 4), real=False)


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    real, generated = normal(61, 47, 9)
    torch.save((real, generated), tmp_path / "data.pt")
    ended_well(*(Script(__file__, tmp_path, rank) for rank in range(2)))
    expected = measure([(real, True), (generated, False)])
    for rank in range(2):
        unequal, empty, dimensions = torch.load(tmp_path / f"{rank}.pt")
        assert unequal == expected
        assert empty == expected
        assert "got [8, 9]" in dimensions


def run(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    real, generated = torch.load(folder / "data.pt")
    values = []
    for first in (17, 0):  # of the generated, what the first process has
        mine = (real[:40], generated[:first]) if rank == 0 else (real[40:], generated[first:])
        batches = [(b, kind) for x, kind in zip(mine, (True, False), strict=True) for b in x.split(6) if len(b)]
        values.append(measure(batches, PRDC(k=3).to(torch.bfloat16) if first == 0 else None))
    try:
        measure([(real[:, rank:], True), (generated[:, rank:], False)])
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    torch.save((*values, refusal), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[2]), Path(sys.argv[1]))
