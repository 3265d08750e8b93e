"""Jobs in copies of this process, for what they leave in files."""

import gc
import mmap
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

PATIENCE_S = 120.0  # with a job: a child may not end, for a lock that another thread held at the fork, say
MOST = 32  # of a process's copies: each takes memory for its compiler, and the process as long to be copied
NUMBER = 4  # bytes of a job's


def in_children(jobs: Sequence[Callable[[], object]], count: int, patience_s: float = PATIENCE_S) -> None:
    """Run each job in one of `count` copies of this process, MOST at most, for what it leaves in files; whoever is free takes the
    next one. What a job raises is lost, and so are jobs that are not done when no child has taken one, or ended, for patience_s.
    Elsewhere than on POSIX systems nothing happens."""
    if os.name != "posix":
        return
    count = min(count, len(jobs), MOST)
    if count < 1:
        return
    taken = mmap.mmap(-1, count)  # how many jobs each child has taken, modulo 256
    todo, numbers = os.pipe()
    os.write(numbers, b"".join(i.to_bytes(NUMBER, "little") for i in range(len(jobs))))
    os.close(numbers)
    children: list[int] = []
    collects = gc.isenabled()
    try:
        gc.disable()  # in a child, too, from its first line on: what lies about here is on a GPU
        for place in range(count):
            try:
                _fork(children, jobs, todo, taken, place, patience_s)
            except OSError:  # no room for one more; those that there are do it all
                break
        seen, until = b"", time.monotonic() + patience_s
        while children and time.monotonic() < until:
            before = len(children)
            for child in list(children):
                if _has_ended(child):
                    children.remove(child)
            if len(children) < before or taken[:] != seen:
                seen, until = taken[:], time.monotonic() + patience_s
            time.sleep(0.002)
    finally:
        if collects:
            gc.enable()
        os.close(todo)
        for child in children:
            with suppress(ProcessLookupError, ChildProcessError):  # it has ended meanwhile
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _fork(
    children: list[int], jobs: Sequence[Callable[[], object]], todo: int, taken: mmap.mmap, place: int, patience_s: float
) -> None:  # fmt: skip
    """One child more. A signal waits until the child would not take it for its parent's, and the parent knows the child."""
    if os.name != "posix":
        return
    parent, blocked = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, about threads: a child waits for none
            child = os.fork()
        if child == 0:
            _work(jobs, todo, taken, place, patience_s, parent)
        children.append(child)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _has_ended(child: int) -> bool:
    if os.name != "posix":
        return True
    try:
        return os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:  # where SIGCHLD is ignored, which a process inherits, nobody has to wait for a child
        return True


def _work(
    jobs: Sequence[Callable[[], object]], todo: int, taken: mmap.mmap, place: int, patience_s: float, parent: int
) -> None:  # fmt: skip
    """What a child does. It leaves without a word: whatever ends with an interpreter is its parent's. It outlives its parent by the
    job at hand, and that by patience_s at most."""
    if os.name != "posix":
        return
    try:
        signal.set_wakeup_fd(-1)  # the parent's event loop would hear of this child's signals
        ends = {signal.SIGINT, signal.SIGTERM, signal.SIGALRM}
        for one in ends:
            signal.signal(one, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
        while os.getppid() == parent and (number := os.read(todo, NUMBER)):
            signal.alarm(int(patience_s) + 1)
            taken[place] = (taken[place] + 1) % 256
            with suppress(Exception):
                jobs[int.from_bytes(number, "little")]()
    finally:
        os._exit(0)
