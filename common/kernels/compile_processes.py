"""Compiling kernels that no cache has, in processes.

Triton walks a kernel's syntax tree in Python, and of a process's threads one at a time runs Python. So a start that finds many
kernels missing forks a process a core. These take kernels as they get there, leave what they compile in Triton's cache, with the
function in C that launches it, and end. The process that asked then finds both there, as on every later start; what a child could
not compile it compiles itself, and says what is wrong.

A child is a copy of a process that holds a GPU, and must not touch it: compiling needs its kind only, which is asked before.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from hashlib import sha256
from pathlib import Path
from threading import Lock

import triton
from triton.runtime._async_compile import active_mode
from triton.runtime.cache import get_cache_manager

from common.kernels.children import in_children

FEW = 4  # missing kernels that are not worth processes


def usable_cores() -> int:
    """Logical ones, that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_cached(key: str) -> bool:
    """Whether Triton's cache has a kernel with that key (compiler.py, get_cache_key)."""
    folder = get_cache_manager(sha256(key.encode()).hexdigest()).cache_dir
    return any(Path(folder).glob("__grp__*"))


class _Later(Future):
    """A kernel that somebody compiles once: a thread that is told to, or whoever asks for it before. Later versions of Triton keep
    such a future as the kernel, so it must have an answer also when a start was given up."""

    def __init__(self, call: Callable):
        super().__init__()
        self.call, self._once = call, Lock()

    def result(self, timeout: float | None = None):
        with self._once:
            if not self.done():
                self.set_result(self.call())  # what it raises is for whoever asked, and the next one may have more luck
        return super().result(timeout)

    def compile(self) -> None:
        with self._once:
            if self.done():
                return
            try:
                self.set_result(self.call())
            except BaseException as error:
                self.set_exception(error)


class Compiling(triton.AsyncCompileMode):
    """Kernels that are cached are loaded on `cores` at once; for the others `compile_missing` says when."""

    def __init__(self, cores: Executor):
        super().__init__(self)
        self._cores, self._is_cached = cores, True
        self._loading: list[Future] = []
        self._missing: list[_Later] = []

    def __exit__(self, *error) -> None:
        try:
            super().__exit__(*error)
        finally:
            # Triton's own stays active when a kernel cannot be compiled, and refuses the next one
            active_mode.set(None)

    def submit(self, *asked):
        """Triton's own, with (key, what compiles, what is told, and what later versions add); it calls this one again, as its
        executor, with what compiles."""
        if len(asked) == 1:
            if self._is_cached:
                self._loading.append(self._cores.submit(*asked))
                return self._loading[-1]
            self._missing.append(_Later(asked[0]))
            return self._missing[-1]
        self._is_cached = is_cached(asked[0])
        return super().submit(*asked)

    def compile_missing(self, children: int) -> None:
        if len(self._missing) > FEW and children > 1:
            wait(self._loading)  # a copy of this process has none of its threads, and a lock that one held stays locked
            driver = triton.runtime.driver.active
            target = driver.get_current_target()

            def compile_one(call: Callable) -> None:
                driver.get_current_target = lambda: target
                kernel = call()
                driver.launcher_cls(kernel.src, kernel.metadata)

            in_children([lambda one=one: compile_one(one.call) for one in self._missing], children)
        for one in self._missing:
            self._cores.submit(one.compile)

    def give_up(self) -> None:
        """Nobody waits for what has not been compiled; it is compiled when it is asked for."""
        self.ignore_errors, self.raw_futures = True, []
