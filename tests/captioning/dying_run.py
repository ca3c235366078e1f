"""Runs ``lpl``, and kills itself when it has written a file, before that is on the disk.

``python dying_run.py NAME WRITES ARGUMENTS``: of files whose names hold NAME, that of so many writes.
"""

from __future__ import annotations

import os
import signal
import sys

from lpl_lightning.cli import main

if __name__ == "__main__":
    _, name, writes, *arguments = sys.argv
    sys.argv = ["lpl"]
    fsync, left = os.fsync, int(writes)

    def fatal(file: int) -> None:
        global left
        left -= name in os.readlink(f"/proc/self/fd/{file}")
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = fatal  # type: ignore[assignment]
    main(arguments)
