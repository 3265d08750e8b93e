"""Kernels that no cache has wait until all are known, the others are loaded at once; nobody waits in vain."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Thread

import pytest

from tests.common.kernels.where import gpu, kernel

pytestmark = kernel

PROGRAM = """
import torch
import triton
from common.kernels import compile_processes, launch, linear
compiled, forked, in_children = [], [], compile_processes.in_children
compile_processes.in_children = lambda *asked: forked.append(1) or in_children(*asked)
triton.knobs.compilation.listener = lambda **told: None if told["cache_hit"] else compiled.append(told["src"].name)
for number, alone in enumerate((True, False)):
    with launch.compile_ahead(alone):
        for dtype in (torch.float16, torch.bfloat16):
            weight = torch.zeros(1024 << number, 896, dtype=dtype, device="cuda")
            for rows in (16, 32, 64):
                for gated in (False, True):
                    linear.few_rows(weight.new_zeros(rows, 896), weight, dtype=torch.float32 if number else None, gated=gated)
    print(len(compiled), len(forked))
"""


@pytest.fixture
def compiling(monkeypatch):
    """(Compiling, keys that are cached)."""
    from common.kernels import compile_processes  # noqa: PLC0415, a CPU build of torch comes without Triton

    cached: set[str] = set()
    monkeypatch.setattr(compile_processes, "is_cached", cached.__contains__)
    return compile_processes.Compiling, cached


def test_what_is_cached_is_loaded_at_once_and_what_is_missing_when_it_is_said(compiling):
    make, cached = compiling
    cached.add("there")
    done, told = [], []
    with ThreadPoolExecutor(2) as cores, make(cores) as mode:
        for key in ("missing", "there", "missing"):
            mode.submit(key, lambda key=key: done.append(key) or key, told.append)
        mode.future_kernels["there"].future.result()
        assert done == ["there"]
        mode.compile_missing(1)
    assert sorted(done) == sorted(told) == ["missing", "there"]


def test_many_that_are_missing_are_compiled_in_children_first(compiling, monkeypatch):
    from common.kernels import compile_processes  # noqa: PLC0415

    make, _ = compiling
    asked = []
    monkeypatch.setattr(compile_processes, "in_children", lambda jobs, count: asked.append((len(jobs), count)))
    monkeypatch.setattr(compile_processes.triton.runtime.driver, "_active", DriverOfNoGPU())
    for missing in (compile_processes.FEW, compile_processes.FEW + 1):
        with ThreadPoolExecutor(1) as cores, make(cores) as mode:
            for key in range(missing):
                mode.submit(str(key), lambda: None, lambda _: None)
            mode.compile_missing(3)
    assert asked == [(compile_processes.FEW + 1, 3)]


class DriverOfNoGPU:
    def get_current_target(self):
        return None


def test_a_kernel_that_cannot_be_compiled_says_so(compiling):
    make, _ = compiling

    def fail():
        raise ValueError("no such instruction")

    def start():
        with ThreadPoolExecutor(1) as cores, make(cores) as mode:
            mode.submit("missing", fail, lambda _: None)
            mode.compile_missing(1)

    for _ in range(2):  # and the next start is not refused
        with pytest.raises(ValueError, match="no such instruction"):
            start()


def test_an_error_meanwhile_leaves_nobody_waiting(compiling):
    make, _ = compiling
    done = []
    with suppress(KeyError), ThreadPoolExecutor(1) as cores, make(cores) as mode:
        mode.submit("missing", lambda: done.append(1), lambda _: None)
        mode.give_up()
        raise KeyError
    assert done == []


def test_what_a_start_that_was_given_up_asked_for_can_still_be_had(compiling):
    """Triton 3.7 keeps what `submit` returned as the kernel: the next start gets it, and no error of the last one."""
    make, _ = compiling
    told = []
    with ThreadPoolExecutor(1) as cores, make(cores) as mode:
        kept = mode.submit("missing", lambda: "kernel", told.append)
        mode.give_up()
    assert told == []
    assert kept.result() == "kernel"
    assert told == ["kernel"]


def test_whoever_asks_before_all_are_known_gets_a_kernel_that_is_compiled_once(compiling):
    make, _ = compiling
    compiled, answers = [], []
    with ThreadPoolExecutor(1) as cores, make(cores) as mode:
        kept = mode.submit("missing", lambda: compiled.append(1) or "kernel", lambda _: None)
        thread = Thread(target=lambda: answers.append(kept.result()), daemon=True)
        thread.start()
        thread.join(30)
        mode.compile_missing(1)
    assert answers == ["kernel"]
    assert compiled == [1]


@pytest.fixture
def no_gpu(monkeypatch):
    from common.kernels import launch  # noqa: PLC0415

    monkeypatch.setattr(launch.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch.torch.cuda, "set_device", lambda _: None)
    return launch


@pytest.mark.parametrize("error", [KeyboardInterrupt, ChildProcessError])
def test_an_error_while_kernels_are_compiled_ends_the_start(compiling, no_gpu, monkeypatch, error):
    make, _ = compiling
    heard = []

    def interrupted(self, children):
        raise error

    def start():
        try:
            with no_gpu.compile_ahead():
                active_mode().submit("missing", lambda: "kernel", lambda _: None)
        except error:
            heard.append(error)

    monkeypatch.setattr(make, "compile_missing", interrupted)
    thread = Thread(target=start, daemon=True)
    thread.start()
    thread.join(30)
    assert heard == [error]
    assert active_mode() is None
    assert no_gpu._to_compile.get() is None


def active_mode():
    from triton.runtime._async_compile import active_mode as mode  # noqa: PLC0415

    return mode.get()


class Kernel:
    """Counts its launches, and what is only compiled."""

    def __init__(self):
        self.launched, self.compiled = 0, 0

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *_, **__):
        self.launched += 1

    def warmup(self, *_, **__):
        self.compiled += 1


def test_another_thread_launches_while_one_compiles(no_gpu):
    mine, its = Kernel(), Kernel()
    with no_gpu.compile_ahead():
        no_gpu.launch(mine, (1,))
        thread = Thread(target=no_gpu.launch, args=(its, (1,)))
        thread.start()
        thread.join()
    no_gpu.launch(mine, (1,))
    assert (mine.launched, mine.compiled) == (1, 1)
    assert (its.launched, its.compiled) == (1, 0)


def test_kernels_are_loaded_here_though_triton_forgets_them_at_the_end(compiling, no_gpu, monkeypatch):
    """As 3.9 does."""
    make, cached = compiling
    cached.add("there")
    loaded = []

    class Compiled:
        run = property(lambda self: loaded.append(1))

    def forget(self, *error):
        leave(self, *error)
        self.future_kernels.clear()

    leave = make.__exit__
    monkeypatch.setattr(make, "__exit__", forget)
    with no_gpu.compile_ahead():
        active_mode().submit("there", Compiled, lambda _: None)
    assert loaded == [1]


CACHED = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key
from common.kernels.compile_processes import is_cached
@triton.jit
def kernel(x):
    tl.store(x, 1.0)
target = GPUTarget("cuda", 90, 32)
source, backend = ASTSource(kernel, {"x": "*fp32"}, {}), make_backend(target)
from triton._C.libtriton import get_cache_invalidating_env_vars
key = get_cache_key(source, backend, backend.parse_options({}), get_cache_invalidating_env_vars())
print(is_cached(key))
triton.compile(source, target=target, _env_vars=get_cache_invalidating_env_vars())
print(is_cached(key), is_cached(key + " and more"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")
def test_what_triton_has_compiled_is_cached(tmp_path):
    program = tmp_path / "program.py"  # Triton reads a kernel's source from its file
    program.write_text(CACHED, encoding="utf-8")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["False", "True", "False"]


@gpu
def test_children_leave_nothing_to_compile(tmp_path):
    """On one core there are no children. The second time kernels are compiled here, beside other ranks."""
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one core")
    first, again = (compiled_and_forked(tmp_path) for _ in range(2))
    (in_children, forks), (here, forks_beside_others) = first
    assert (in_children, forks) == (0, 1)
    assert here > 4
    assert forks_beside_others == 1, "none of its own"
    assert again == [(0, 0), (0, 0)], "all is cached"


def compiled_and_forked(cache) -> list[tuple[int, int]]:
    """Of a start alone, and then of one beside other ranks: kernels compiled here, and how often children were asked."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert run.returncode == 0, run.stderr
    return [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
