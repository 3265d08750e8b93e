"""How kernels follow each other.

A decode step is some two hundred kernels of one to five microseconds, and between two of them the GPU drains
and fills up again. Programmatic dependent launch (compute capability 9.0 and later) starts a kernel while the one
before still runs: it may load weights, which nobody writes, and then waits at `wait_for_previous` until
all that came before is written. Each kernel here says `let_next_start` first and waits before it touches
anything a kernel could have written, so the order of reads and writes is that of plain launches
(the two of moe_gemv.py do as much in another order, and say why).

Without a GPU the kernels run in Triton's interpreter, one program after the other and each line in NumPy: slow,
and enough to see that they are right. `TRITON_INTERPRET=1` must be set before triton is imported.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from threading import Thread

import torch
import triton
import triton.language as tl

from common.kernels.compile_processes import Compiling, usable_cores

INTERPRETED = triton.knobs.runtime.interpret

if INTERPRETED:
    from triton.runtime import interpreter

    def _numbers(tensor, scope, patch=interpreter._patch_lang_tensor) -> None:
        """Triton 3.6 makes a loop's bounds arrays of one number, which NumPy 2.4 no longer takes for numbers."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _numbers

    _patched = set()  # files of Triton's library

    def _call(self, *args, **kwargs):
        """A function that a kernel calls. Triton turns the language into NumPy again at each call, in milliseconds.
        For a function of ours its kernel's launch has done so; what is done for one of the library stays."""
        if self.fn.__globals__.get("tl") is not tl and self.fn.__module__ not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call


def cdiv(x: int, y: int) -> int:
    """x / y rounded up, as Triton's may be called in a kernel. Triton's takes 2 us, at each of a few hundred launches of a step."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    return 1 << (int(n) - 1).bit_length() if n > 0 else 0


@cache
def pdl() -> bool:
    """Can kernels on this GPU be launched before their predecessor has ended?"""
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


@cache
def num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # the interpreter's programs run one after the other: enough that work is cut up
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program can have."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def counters(device: torch.device) -> torch.Tensor:
    """How many programs of each tile have ended [65536] int32: zero between two kernels, which use it in turn."""
    with torch.inference_mode(False):
        return torch.zeros(1 << 16, dtype=torch.int32, device=device)


_asking: Thread | None = None  # from `ask_the_compiler` to `compile_ahead`
# of the variants seen so far, inside `compile_ahead`; of this thread, as Triton's own mode: another engine's launches go on
_to_compile: ContextVar[set | None] = ContextVar("to_compile", default=None)


def launch(kernel, grid: tuple[int, ...], *args, num_warps: int = 4, num_stages: int = 3, **constants) -> None:
    """Queue `kernel`, which takes PDL as its last constant."""
    if 0 in grid:  # a rank without rows
        return
    early = {"launch_pdl": True} if pdl() else {}
    how = dict(**constants, PDL=pdl(), num_warps=num_warps, num_stages=num_stages, **early)
    seen = _to_compile.get()
    if seen is None:
        kernel[grid](*args, **how)
    elif (variant := (kernel, *map(_what_triton_asks, args), *how.values())) not in seen:
        seen.add(variant)
        kernel.warmup(*args, grid=grid, **how)


def room(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for numbers that others index with: zeros while kernels are only compiled, and nobody writes into it."""
    make = torch.empty if _to_compile.get() is None else torch.zeros
    return make(*shape, dtype=dtype, device=device)


def _what_triton_asks(arg):
    """What of an argument makes Triton compile a kernel anew."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    return (arg == 1, arg % 16 == 0, arg >= 1 << 31) if isinstance(arg, int) else None


def ask_the_compiler(device: torch.device) -> Thread:
    """Begin with what Triton finds out before it looks for a compiled kernel: a digest of its own files, of 400 MB, the version of
    ptxas, and its driver, which it compiles in C where that is not cached. Half a second that need not wait for weights.
    `compile_ahead` waits for it."""
    global _asking

    def ask() -> None:
        torch.cuda.set_device(device)
        with suppress(Exception):  # who needs the answer asks again, and hears what is wrong
            from triton.compiler.compiler import make_backend  # noqa: PLC0415, as triton_key: its place changes with versions
            from triton.runtime.cache import triton_key  # noqa: PLC0415

            make_backend(triton.runtime.driver.active.get_current_target()).hash()
            triton_key()

    _asking = Thread(target=ask, name="ask_the_compiler")
    _asking.start()
    return _asking


@contextmanager
def compile_ahead(alone: bool = False) -> Iterator[None]:
    """Inside, `launch` runs nothing. What it would have to compile is compiled on all CPU cores at once, in processes if this one
    is alone (compile_processes.py): what a library shares with other ranks or a NIC, a copy of the process must not hold."""
    global _asking
    asking, _asking = _asking, None
    if asking:
        asking.join()
    device, count = torch.cuda.current_device(), usable_cores()
    with ThreadPoolExecutor(count, initializer=torch.cuda.set_device, initargs=(device,)) as threads:
        before = _to_compile.set(set())
        try:
            with Compiling(threads) as compiling:
                try:
                    yield
                    compiling.compile_missing(count if alone else 1)
                except BaseException:
                    compiling.give_up()
                    raise
                kernels = list(compiling.future_kernels.values())  # later versions of Triton forget them at the end
        finally:
            _to_compile.reset(before)
        # `run` compiles the function that launches a kernel, and loads it; else its first launch would
        list(threads.map(lambda future: future.result().run, kernels))


@triton.jit
def let_next_start(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
