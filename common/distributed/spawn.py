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

from common.distributed.membership import Membership
from common.distributed.nodes import Node, choose_interface, meet
from common.distributed.processes import RankFailure, refuse_too_many_ranks

FRAME = 256  # words of the message that a rank without work waits for (messages.py); the first is how many are meant
LEAVE = -1  # in its place: no more work, ever
ROOT = Path(__file__).parents[2]
START_S = 180.0  # to import torch on a machine that is busy
LEAVE_S = 3.0
EXIT_CODE_S = 5.0
BEREAVED = 3  # exit code of a rank that ends because another one has


class RankZeroLeft(Exception):
    """Rank 0 has told its followers that there is no more work."""


@dataclass(frozen=True)
class Follower:
    """What every rank but 0 does: call `target`, "package.module:function", with `arguments`, which are JSON.

    The function builds what rank 0 builds and executes what rank 0 sends, without end: `messages.receive` ends it.
    node: which one this host is, if the ranks are on several.
    """

    target: str
    arguments: dict[str, Any]
    node: Node | None = None


class SpawnedRanks:
    """The ranks that rank 0 has started. A follower holds one too, with no processes in it.

    size: of the world. here: those of this host, of which the first has started the others; node_rank: which host, if there are
    several; members: all those hosts, in the process of the first.
    """

    def __init__(self, folder: Path, size: int, here: range | None = None, node_rank: int | None = None):
        self.folder, self.size, self.here, self.node_rank = folder, size, here or range(size), node_rank
        self.node: Node | None = None
        self.members: Membership | None = None
        self.processes: list[subprocess.Popen] = []  # rank r is processes[r - first - 1]
        self.started_here = False  # by this process
        self.broken = False  # the ranks are out of step: nobody will hear a "leave"
        self.ended = False

    @property
    def first(self) -> int:
        return self.here.start

    @property
    def several_nodes(self) -> bool:
        return self.node_rank is not None

    def meet(self, rank: int) -> str:
        """The file over which all ranks can join now: nobody is left to wait for one that has died before."""
        if rank != self.first:
            self._ready_file(rank).touch()
        else:
            self._wait_until_ready()
        return str(self.folder / "store")

    def tell_store(self, host: str, port: int) -> None:
        """To the other ranks of this host: where those of all hosts meet."""
        half = self.folder / "store.half"
        half.write_text(json.dumps([host, port]), encoding="utf-8")
        half.rename(self.folder / "store.there")  # whole, or not there

    def store_of_node_0(self) -> tuple[str, int]:
        """Once the first rank has told it; it is there, or this process ends with it (rank_main.py)."""
        file = self.folder / "store.there"
        while not file.exists():
            time.sleep(0.01)
        return tuple(json.loads(file.read_text(encoding="utf-8")))

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
        if rank == self.first or not self.processes:
            return False
        try:  # while its threads are still being ended, a process is dead and has no exit code yet
            return self.processes[rank - self.first - 1].wait(EXIT_CODE_S) == BEREAVED
        except subprocess.TimeoutExpired:
            return False

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        missing = dict(enumerate(self.processes, start=self.first + 1))
        while missing:
            if self.members and self.members.lost:
                raise RankFailure(self.members.lost)
            for rank, process in list(missing.items()):
                if self._ready_file(rank).exists():
                    del missing[rank]
                elif process.poll() is not None:
                    raise RankFailure(f"rank {rank} (pid {process.pid}) has died at its start{self.last_words(rank)}")
            if time.monotonic() > deadline:
                raise RankFailure(f"rank {min(missing)} of {self.size} was not ready after {START_S:.0f} s")
            time.sleep(0.01)
        if self.members:
            self.members.watch = self._dead_rank

    def _dead_rank(self) -> str | None:
        """For the other hosts: who of this one has died by itself. Its first rank may wait for a rank elsewhere, and not see it."""
        for rank, process in enumerate(self.processes, start=self.first + 1):
            if process.poll() not in (None, 0, BEREAVED):
                return f"rank {rank} (pid {process.pid}) on {self.members.where} has died{self.last_words(rank)}"
        return None

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        """Wait for the ranks, which know that they shall leave; kill those that do not. Leaves no file behind."""
        if self.members:
            self.members.leave()
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


def start_ranks(follower: Follower, size: int, asked: str = "") -> SpawnedRanks:
    """Ranks 1..size-1, on their way to `meet`; of several nodes, those of this node but the first. asked: for them, in words.

    Raises ValueError for arguments that cannot travel, and what nodes.meet raises.
    """
    node = follower.node
    here = node.ranks(size) if node else range(size)
    refuse_too_many_ranks(asked or f"{size} ranks", len(here), started=len(here) - 1)
    arguments = _as_json(follower.arguments)
    members = meet(node) if node else None
    if members:
        choose_interface(members.address)  # of this process's own talk, and of the ranks that it starts
    node_rank = node.node_rank if node else None
    ranks = SpawnedRanks(Path(tempfile.mkdtemp(prefix="ranks-")), size, here, node_rank)
    ranks.node, ranks.members, ranks.started_here = node, members, True
    _started.add(ranks)
    job = {
        "path": sys.path, "cwd": os.getcwd(), "parent": os.getpid(), "folder": str(ranks.folder), "size": size,
        "here": [here.start, here.stop], "node_rank": node_rank, "target": follower.target, "arguments": arguments,
    }  # fmt: skip
    try:
        for rank in here[1:]:
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


def lost_node() -> tuple[str | None, str | None]:
    """Of several nodes: (who has died, who has left in good order), from the start on; None if nobody has."""
    members = next((ranks.members for ranks in _started if ranks.members), None)
    return (
        (members.lost, next((f"{name} has left" for name in members.left.values()), None)) if members else (None, None)
    )


def end_all(why: str | None = None) -> None:
    """At once, all that this process has started: it leaves without a word, but to other nodes."""
    for ranks in list(_started):
        if ranks.members:
            ranks.members.leave(because=f"{ranks.members.name}: {why}" if why else None)
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
