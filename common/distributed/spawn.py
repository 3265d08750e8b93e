"""The other ranks of this machine, started by rank 0 itself where torchrun has started none.

    rank 0                                          rank r: python -m common.distributed.rank_main
    start_ranks(follower, R): a process each
      one line of JSON into its standard input ->   what to call, with which arguments, where to meet
      wait, and look whether all live          <-   "ready" (a file), once it has imported everything
    join the process group                          follower.target(**arguments): joins the group, builds the same
    ...                                             engine, and does what rank 0 sends
    shutdown_tensor_parallel(): "leave"        ->   ends; who has not after LEAVE_S is killed

Not multiprocessing: its `spawn` imports the user's script a second time in each child, so a script without
`if __name__ == "__main__"` would start ranks that start ranks, and its `fork` does not exist on Windows and breaks CUDA.
Here the script is not touched, so that a notebook, `python -c` and a bare script all work; what travels is JSON, never
pickle; the ranks meet through a file in a temporary folder, not a port. A rank watches rank 0 and ends with it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.distributed.processes import RankFailure

FRAME = 256  # words of the message that a rank without work waits for (messages.py); the first is how many are meant
LEAVE = -1  # in its place: no more work, ever
ROOT = Path(__file__).parents[2]
START_S = 180.0  # to import torch on a machine that is busy
LEAVE_S = 3.0
RANKS_A_CORE = 8
BEREAVED = 3  # exit code of a rank that ends because another one has


class RankZeroLeft(Exception):
    """Rank 0 has told its followers that there is no more work."""


@dataclass(frozen=True)
class Follower:
    """What every rank but 0 does: call `target`, "package.module:function", with `arguments`, which are JSON.

    The function builds what rank 0 builds and executes what rank 0 sends, without end: `messages.receive` ends it.
    """

    target: str
    arguments: dict[str, Any]


class SpawnedRanks:
    """The ranks that rank 0 has started. A follower holds one too, with no processes in it."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size
        self.processes: list[subprocess.Popen] = []  # rank r is processes[r - 1]
        self.broken = False  # the ranks are out of step: nobody will hear a "leave"
        self.ended = False

    def meet(self, rank: int) -> str:
        """The file over which all ranks can join now: nobody is left to wait for one that has died before."""
        if rank > 0:
            self._ready_file(rank).touch()
        else:
            self._wait_until_ready()
        return str(self.folder / "store")

    def _ready_file(self, rank: int) -> Path:
        return self.folder / f"{rank}.ready"

    def last_words_file(self, rank: int) -> Path:
        return self.folder / f"{rank}.error"

    def last_words(self, rank: int) -> str:
        """ ": why" if the rank could say why it ended, else nothing."""
        file = self.last_words_file(rank)
        return f": {file.read_text(encoding='utf-8')}" if file.exists() else ""

    def died_of_another(self, rank: int) -> bool:
        """Of a rank that is dead: did it end because another one had?"""
        if rank == 0 or not self.processes:
            return False
        try:  # while its threads are still being ended, a process is dead and has no exit code yet
            return self.processes[rank - 1].wait(1.0) == BEREAVED
        except subprocess.TimeoutExpired:
            return False

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        missing = dict(enumerate(self.processes, start=1))
        while missing:
            for rank, process in list(missing.items()):
                if self._ready_file(rank).exists():
                    del missing[rank]
                elif process.poll() is not None:
                    raise RankFailure(f"rank {rank} (pid {process.pid}) has died at its start{self.last_words(rank)}")
            if time.monotonic() > deadline:
                raise RankFailure(f"rank {min(missing)} of {self.size} was not ready after {START_S:.0f} s")
            time.sleep(0.01)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        """Wait for the ranks, which know that they shall leave; kill those that do not. Leaves no file behind."""
        deadline = time.monotonic() + LEAVE_S
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.ended = True
        _started.discard(self)
        forget_folder(self.folder)


_started: set[SpawnedRanks] = set()  # and not closed


def start_ranks(follower: Follower, size: int) -> SpawnedRanks:
    """Ranks 1..size-1, on their way to `meet`. Raises ValueError for arguments that cannot travel."""
    most = RANKS_A_CORE * (os.cpu_count() or 1)
    if size > most:
        raise ValueError(
            f"tensor_parallel_size={size} would start {size - 1} processes; this machine takes {most} ranks"
        )
    arguments = _as_json(follower.arguments)
    ranks = SpawnedRanks(Path(tempfile.mkdtemp(prefix="ranks-")), size)
    _started.add(ranks)
    job = {
        "path": sys.path, "cwd": os.getcwd(), "parent": os.getpid(), "folder": str(ranks.folder), "size": size,
        "target": follower.target, "arguments": arguments,
    }  # fmt: skip
    try:
        for rank in range(1, size):
            process = subprocess.Popen(
                [sys.executable, "-m", "common.distributed.rank_main"], cwd=ROOT, stdin=subprocess.PIPE
            )
            ranks.processes.append(process)
            with process.stdin as pipe:
                pipe.write(json.dumps(job | {"rank": rank}).encode())
    except BaseException:  # Ctrl-C too
        ranks.kill()
        ranks.close()
        raise
    return ranks


def end_all() -> None:
    """At once, all that this process has started: it leaves without a word."""
    for ranks in list(_started):
        ranks.kill()
        ranks.close()


def forget_folder(folder: Path) -> None:
    """Delete it as far as the system lets us: on Windows a file that somebody has open stays."""
    for file in folder.glob("*"):
        try:
            file.unlink()
        except OSError:
            return
    try:
        folder.rmdir()
    except OSError:
        return


def _as_json(arguments: dict[str, Any]) -> dict[str, Any]:
    """Paths become texts; raises ValueError for what is no JSON, before any process is started."""
    for name, value in arguments.items():
        try:
            json.dumps(value, default=os.fspath)
        except (TypeError, ValueError):
            raise ValueError(
                f"{name}={value!r:.80} cannot be sent to the other ranks; use plain values, or start with torchrun"
            ) from None
    return json.loads(json.dumps(arguments, default=os.fspath))
