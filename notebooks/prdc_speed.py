"""What precision, recall, density and coverage cost, ours and the prdc package's.

    OMP_NUM_THREADS=2 python notebooks/prdc_speed.py --count 10000 --dim 2048

Each runs in a process of its own, on the same normal features and with as many threads. Memory is the process's peak
above what it held with the features and libraries there. ``--package FOLDER`` is where ``pip install --target FOLDER
prdc`` put the package, if not beside this one; ``--ours`` leaves the package out, whose memory grows with the square of
the count. ``--spread`` makes the features tight clusters, so wide to the distance between them, far from the origin.
CPU seconds are of all threads. Those of one thread (OMP_NUM_THREADS=1) compare the work on a busy machine; of more,
they count threads that wait for each other.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch


def features(args: argparse.Namespace) -> list[torch.Tensor]:
    """Real and generated ones."""
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(args.count, args.dim, generator=generator) for _ in range(2)]
    if args.spread:
        centres = 10 + torch.randn(10, args.dim, generator=generator)
        for points in sets:
            points.mul_(args.spread).add_(centres[torch.arange(args.count) % 10])
    return sets


def memory(name: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def measure(args: argparse.Namespace, which: str) -> dict[str, object]:
    """One of them, in this process."""
    if which == "package":
        sys.path.append(args.package)
        from prdc import compute_prdc

        def run(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
            return dict(compute_prdc(x.numpy(), y.numpy(), nearest_k=args.k))

        version = importlib.metadata.version("prdc")
    else:
        from lpl_lightning import __version__ as version
        from lpl_lightning.metrics.prdc import prdc

        def run(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
            return prdc(x, y, args.k)._asdict()

    with contextlib.redirect_stdout(io.StringIO()):
        run(torch.randn(600, 64), torch.randn(600, 64))  # loads libraries, starts threads
        x, y = features(args)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        held, start, start_cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
        values = run(x, y)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "version": version,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "GiB": (memory("VmHWM") - held) / 2**30,
        "values": {name: float(value) for name, value in values.items()},
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--spread", type=float, default=0.0)
    parser.add_argument("--package", default="")
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--only", choices=["ours", "package"], help="what this process runs, printed as JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args, args.only)))
        return
    print(f"{args.count} x {args.dim}, k = {args.k}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}")
    seconds, cpu_seconds = {}, {}
    for which in ["ours"] if args.ours else ["ours", "package"]:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        seconds[which], cpu_seconds[which] = result["seconds"], result["cpu_seconds"]
        values = ", ".join(f"{name} {value:.5f}" for name, value in result["values"].items())
        print(
            f"{which} {result['version']}: {result['seconds']:.2f} s ({result['cpu_seconds']:.2f} CPU s), "
            f"{result['GiB']:.2f} GiB"
        )
        print(f"    {values}")
    if not args.ours:
        ratios = [taken["package"] / taken["ours"] for taken in (seconds, cpu_seconds)]
        print(f"package / ours: {ratios[0]:.1f} (of CPU seconds: {ratios[1]:.1f})")


if __name__ == "__main__":
    main()
