"""What is asked of the operating system about processes, in a way that Linux, macOS and Windows all answer (psutil)."""

import ctypes
import sys

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's, from glibc's malloc.h
KEPT_BYTES = 256 << 20  # of freed memory, that stay with the process


class RankFailure(RuntimeError):
    """A collective could not finish because another rank died, stopped or stayed away."""


def fate(pid: int) -> str | None:
    """None while the process runs, else what became of it."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:  # a zombie too, where it has no status
        return "has died"
    except psutil.AccessDenied:  # somebody else's, so it is there
        return None
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):  # killed, and its parent has not asked yet
        return "has died"
    return "is stopped (SIGSTOP)" if status == psutil.STATUS_STOPPED else None


def keep_freed_memory() -> None:
    """Tell glibc not to give memory back to the system that the next step asks for again.

    A CPU step allocates and frees megabytes of activations; page faults for them took 4 to 14 % of a run.
    vLLM's CPU backend advises another allocator for the same reason. Elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries for Linux have none
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
