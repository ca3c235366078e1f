"""Processes of tests, forked from one that has imported everything: an import takes seconds, and tests start dozens.

They are processes of their own all the same, that can be killed and share nothing with the one that has started them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess

FORKED = multiprocessing.get_context("forkserver")
"""What it has imported is said in ``conftest.py``."""
LPL = Path(__file__).resolve().parents[1] / "lpl_lightning" / "__main__.py"
"""The command."""


class Script:
    """What ``python PATH ARGUMENTS`` runs, in a session of its own.

    Attributes:
        process: Which can be asked and killed.
    """

    def __init__(self, path: str | Path, *arguments: object, **environment: str) -> None:
        self.words = [str(path), *map(str, arguments)]
        self.streams = tempfile.TemporaryDirectory()
        # What an earlier test's `seed_everything` left there, it would be seeded by.
        inherited = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
        given = (self.words, inherited | environment, os.getcwd(), self.streams.name)
        self.process = FORKED.Process(target=_run, args=given)
        self.process.start()

    def end(self, timeout: float = 600) -> CompletedProcess[str]:
        """How it ended and what it said; killed after so many seconds, and whatever it has started and left behind."""
        self.process.join(timeout)
        assert self.process.pid is not None
        with suppress(ProcessLookupError):  # nothing is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        assert self.process.exitcode is not None
        said = [(Path(self.streams.name) / name).read_text() for name in ("stdout", "stderr")]
        self.streams.cleanup()
        return CompletedProcess(self.words, self.process.exitcode, *said)


def _run(words: list[str], environment: dict[str, str], folder: str, streams: str) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # what it starts itself is started as usual
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(Path(streams) / name, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def run_script(path: str | Path, *arguments: object, **environment: str) -> CompletedProcess[str]:
    """Run a script to its end, which must be a good one."""
    return ended_well(Script(path, *arguments, **environment))[0]


def ended_well(*scripts: Script) -> list[CompletedProcess[str]]:
    """The ends of several that run at once."""
    found = [script.end() for script in scripts]
    for done in found:
        assert done.returncode == 0, f"{done.args}: {done.returncode}\n{done.stderr[-4000:]}"
    return found


def run_ranks(path: str | Path, *arguments: object, devices: int = 2) -> list[CompletedProcess[str]]:
    """Run a script that trains on several devices, as processes that ``torchrun`` would have started."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(devices), "GROUP_RANK": "0"}
    shared["TORCHELASTIC_RUN_ID"] = "none"
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(devices))
    return ended_well(*(Script(path, *arguments, **shared, **rank) for rank in ranks))
