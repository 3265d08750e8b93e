"""How kernels follow each other.

A decode step is some two hundred kernels of one to five microseconds, and between two of them the GPU drains
and fills up again. Programmatic dependent launch (compute capability 9.0 and later) starts a kernel while the one
before still runs: it may load weights, which nobody writes, and then waits at `wait_for_previous` until
all that came before is written. Each kernel here says `let_next_start` first and waits before it touches
anything a kernel could have written, so the order of reads and writes is that of plain launches.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def pdl() -> bool:
    """Can kernels on this GPU be launched before their predecessor has ended?"""
    return torch.cuda.get_device_capability()[0] >= 9


@cache
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel, grid: tuple[int, ...], *args, num_warps: int = 4, num_stages: int = 3, **constants) -> None:
    """Queue `kernel`, which takes PDL as its last constant."""
    early = {"launch_pdl": True} if pdl() else {}
    kernel[grid](*args, **constants, PDL=pdl(), num_warps=num_warps, num_stages=num_stages, **early)


@triton.jit
def let_next_start(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
