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
from concurrent.futures import CancelledError, Executor, Future, wait
from hashlib import sha256
from pathlib import Path

import triton
from triton.runtime._async_compile import active_mode
from triton.runtime.cache import get_cache_manager

from common.kernels.children import in_children

FEW = 4  # missing kernels that are not worth processes


def cores() -> int:
    """CPU cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_cached(key: str) -> bool:
    """Whether Triton's cache has a kernel with that key (compiler.py, get_cache_key)."""
    folder = get_cache_manager(sha256(key.encode()).hexdigest()).cache_dir
    return any(Path(folder).glob("__grp__*"))


class Compiling(triton.AsyncCompileMode):
    """Kernels that are cached are loaded on `cores` at once; for the others `compile_missing` says when."""

    def __init__(self, cores: Executor):
        super().__init__(self)
        self._cores, self._is_cached = cores, True
        self._loading: list[Future] = []
        self._missing: list[tuple[Callable, Future]] = []

    def __exit__(self, *error) -> None:
        try:
            super().__exit__(*error)
        finally:
            active_mode.set(
                None
            )  # Triton's own stays active when a kernel cannot be compiled, and refuses the next one

    def submit(self, *asked):
        """Triton's own, with (key, what compiles, what is told); it calls this one again, as its executor, with what compiles."""
        if len(asked) == 1:
            if self._is_cached:
                self._loading.append(self._cores.submit(*asked))
                return self._loading[-1]
            self._missing.append((asked[0], Future()))
            return self._missing[-1][1]
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

            in_children([lambda call=call: compile_one(call) for call, _ in self._missing], children)
        for call, future in self._missing:
            self._cores.submit(_fulfil, future, call)

    def give_up(self) -> None:
        """Nobody waits for what has not been compiled."""
        self.ignore_errors = True
        for _, future in self._missing:
            future.set_exception(CancelledError())


def _fulfil(future: Future, call: Callable) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
