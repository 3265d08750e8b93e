"""Kernels that no cache has wait until all are known, the others are loaded at once; nobody waits in vain."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.common.kernels.where import gpu, kernel

pytestmark = kernel

PROGRAM = """
import torch
import triton
from common.kernels import launch, linear
compiled = []
triton.knobs.compilation.listener = lambda **told: None if told["cache_hit"] else compiled.append(told["src"].name)
for number, alone in enumerate((True, False)):
    with launch.compile_ahead(alone):
        for dtype in (torch.float16, torch.bfloat16):
            weight = torch.zeros(1024 << number, 896, dtype=dtype, device="cuda")
            for rows in (16, 32, 64):
                for gated in (False, True):
                    linear.few_rows(weight.new_zeros(rows, 896), weight, dtype=torch.float32 if number else None, gated=gated)
    print(len(compiled))
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


@gpu
def test_children_leave_nothing_to_compile(tmp_path):
    """On one core there are no children. The second time kernels are compiled here, beside other ranks."""
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one core")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert run.returncode == 0, run.stderr
    in_children, here = map(int, run.stdout.split())
    assert in_children == 0
    assert here > 4
