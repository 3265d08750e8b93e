"""What is asked of the operating system about processes, in a way that Linux, macOS and Windows all answer (psutil)."""

import ctypes
import os
import sys
from collections.abc import Callable

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's, from glibc's malloc.h
KEPT_BYTES = 256 << 20  # of freed memory, that stay with the process
RANKS_A_CORE = 8
DEAD, STOPPED = "has died", "is stopped (SIGSTOP)"  # what became of a process


class RankFailure(RuntimeError):
    """A collective could not finish because another rank died, stopped or stayed away."""


def refuse_too_many_ranks(asked: str, ranks: int, started: int | None = None) -> None:
    """Before any is started: a mistyped number would fill the memory of a machine, and nobody could stop it.

    asked: for them, in words; started: of these ranks, by this process; by default all. Raises ValueError.
    """
    most = RANKS_A_CORE * (os.cpu_count() or 1)
    if ranks > most:
        raise ValueError(
            f"{asked} would start {ranks if started is None else started} processes; this machine takes {most} ranks"
        )


class Together:
    """What rank 0 of several does in step with the others: `with together:` is a step, `together.check()` what comes before one.

    Whatever breaks a step off here, too little memory or Ctrl-C, leaves the others in the middle of it, waiting for this rank's
    part of a sum. Nothing can be told them any more: an error becomes a RankFailure, and so does every step after it.
    """

    def __init__(self, ranks: int):
        self._several, self._torn = ranks > 1, False

    def check(self) -> None:
        if self._torn:
            raise RankFailure("a step was broken off and the ranks are out of step; make a new engine")

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None or not self._several:
            return
        self._torn = True
        if isinstance(error, Exception) and not isinstance(error, RankFailure):
            raise RankFailure(f"rank 0 broke a step off: {kind.__name__}: {error}; make a new engine") from error


def fate(pid: int) -> str | None:
    """None while the process runs, else DEAD or STOPPED."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:  # a zombie too, where it has no status
        return DEAD
    except psutil.AccessDenied:  # somebody else's, so it is there
        return None
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):  # killed, and its parent has not asked yet
        return DEAD
    return STOPPED if status == psutil.STATUS_STOPPED else None


def keep_freed_memory() -> None:
    """Tell glibc not to give memory back to the system that the next step asks for again.

    A CPU step allocates and frees megabytes of activations; page faults for them took 4 to 14 % of a run.
    vLLM's CPU backend advises another allocator for the same reason. Elsewhere than on glibc nothing happens.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back_freed_memory() -> None:
    """And now give it back: nothing is asked for again soon. Elsewhere than on glibc the allocator knows best."""
    trim = _of_glibc("malloc_trim")
    if trim:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; others for Linux have none of that name."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)
