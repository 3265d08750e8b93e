"""Jobs in copies of this process, for what they leave in files."""

import gc
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

PATIENCE_S = 120.0  # for children that do not end: a lock that another thread held at the fork, say
NUMBER = 4  # bytes of a job's


def in_children(jobs: Sequence[Callable[[], object]], count: int, patience_s: float = PATIENCE_S) -> None:
    """Run each job in one of `count` copies of this process, for what it leaves in files; whoever is free takes the next one. What
    a job raises is lost, and so are jobs that are not done after patience_s. Elsewhere than on POSIX systems nothing happens."""
    if os.name != "posix":
        return
    todo, numbers = os.pipe()
    os.write(numbers, b"".join(i.to_bytes(NUMBER, "little") for i in range(len(jobs))))
    os.close(numbers)
    children = []
    try:
        for _ in range(min(count, len(jobs))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's, about threads: a child waits for none
                try:
                    child = os.fork()
                except OSError:  # no room for one more; those that there are do it all
                    break
            if child == 0:
                _work(jobs, todo)
            children.append(child)
        until = time.monotonic() + patience_s
        while children and time.monotonic() < until:
            children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
            time.sleep(0.002)
    finally:
        os.close(todo)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _work(jobs: Sequence[Callable[[], object]], todo: int) -> None:
    """What a child does. It leaves without a word: whatever ends with an interpreter is its parent's."""
    if os.name != "posix":
        return
    try:
        gc.disable()  # what lies about here is on a GPU
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        while number := os.read(todo, NUMBER):
            with suppress(Exception):
                jobs[int.from_bytes(number, "little")]()
    finally:
        os._exit(0)
