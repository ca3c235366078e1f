"""Runs ``lpl caption`` in processes of its own, forked where all is imported already, which takes seconds.

Reads JSON, one line each: ``{"args": [...], "die_in": NAME}`` starts a process, which kills itself where it has written
a file with this in its name, before that is on the disk, and writes its id; an id waits for its end, and writes how it
ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

from lpl_lightning.cli import main


def run(args: list[str], die_in: str | None) -> None:
    fsync = os.fsync

    def fatal(file: int) -> None:
        if die_in is not None and die_in in os.readlink(f"/proc/self/fd/{file}"):
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = fatal  # type: ignore[assignment]
    main(args)


if __name__ == "__main__":
    torch.set_num_threads(1)  # before the fork, behind which OpenMP's threads are gone
    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(order, int):
            print(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]), flush=True)
            continue
        if not (process := os.fork()):
            code = 1
            try:
                run(order["args"], order["die_in"])
                code = 0
            finally:
                os._exit(code)
        print(process, flush=True)
