"""Two real processes that end after an exchange."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ENDS = """
import sys, time
import torch
import torch.distributed as dist
from lpl_lightning.processes import threads_at_rest

class Slow:
    def __del__(self):
        time.sleep(0.2)

rank, folder = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=2)
with threads_at_rest():
    dist.barrier()
    tensor = torch.ones(2)
    tensor.kept = Slow()  # what the thread lets go of then takes as long
    dist.all_reduce(tensor, async_op=True)
    del tensor
print("ended")
"""


def test_a_thread_of_gloo_that_lets_go_late_does_not_abort_the_process(tmp_path: Path) -> None:
    """Without a rest both end with status -6, "terminate called without an active exception"."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ENDS, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert said == ["ended\n"] * 2
    assert [process.returncode for process in running] == [0, 0]
