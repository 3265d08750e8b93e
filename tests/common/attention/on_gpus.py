"""Tokens spread over GPUs, against dense attention over each sequence: every step of some short lives, and recorded decode steps.

torchrun --standalone --nproc_per_node=2 -m tests.common.attention.on_gpus     # or 4; "all right" of rank 0
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from common.attention import context_table
from common.distributed.launch import run_main
from common.parallel_state import TPGroup, initialize_tensor_parallel
from tests.common.attention.test_context_parallel import LAYER, Life, dense, live

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of numbers that are mostly smaller than 3


def main() -> None:
    cp = initialize_tensor_parallel(device="cuda")
    if cp.fast_all_reduce is None:
        raise ValueError("these GPUs share no memory; the kernels need NVLink or PCIe peer access")
    for dtype, most in TOLERANCE.items():
        for group in (
            cp,
            replace(cp, fast_all_reduce=None),
        ):  # one kernel that gathers and merges, and the library's message
            for page_size in (1, 4, 16):
                for seed in range(3):
                    context_table.LONG = 1024 if seed else 6  # with 6 some pieces are launches of their own
                    worst = live(page_size, seed, dtype, group)
                    assert worst < most, (dtype, group is cp, page_size, seed, worst)
            recorded(group, dtype, most)
        assert cp.fast_all_reduce._merged, "the one kernel was never asked"
        cp = initialize_tensor_parallel(device="cuda")  # heads of one size a group
    if cp.rank == 0:
        print("all right", flush=True)


def captured(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    return graph.replay, o


@torch.inference_mode()
def recorded(cp: TPGroup, dtype: torch.dtype, most: float) -> None:
    """One graph of a decode step with a row of padding, replayed while the sequences grow: each replay is a round of its own."""
    life = Life(cp, 4, 200, 7, dtype)
    for row in range(3):
        life.begin(row)
    life.step({0: 37, 1: 1, 2: 6})
    rows, positions = (torch.full((4,), -1, device=cp.device) for _ in range(2))
    q, k, v = (torch.zeros(4, h, 8, dtype=dtype, device=cp.device) for h in (6, 2, 2))

    def step() -> torch.Tensor:
        meta = life.table.decode_on_device(rows, positions, life.table.page_table.shape[1]).meta
        return life.attention(life.cache, meta)(LAYER, q, k, v)

    replay, o = captured(step)
    for _ in range(20):
        new = [torch.randn(3, h, 8, generator=life.rng, dtype=torch.float64).to(dtype).double() for h in (6, 2, 2)]
        for row in range(3):
            life.k[row], life.v[row] = (
                torch.cat((old, one[row : row + 1]))
                for old, one in zip((life.k[row], life.v[row]), new[1:], strict=True)
            )
            if len(life.k[row]) > 4 * len(life.pages[row]):
                life.pages[row].append(life.free.pop())
                life.table.set_pages([(row, len(life.pages[row]) - 1, life.pages[row][-1:])])
        for x, told in zip((q, k, v), new, strict=True):
            x[:3] = told.to(cp.device, dtype)
        rows[:3] = torch.arange(3, device=cp.device)
        positions[:3] = torch.from_numpy(np.array([len(life.k[row]) - 1 for row in range(3)])).to(cp.device)
        replay()
        for row in range(3):
            want = dense(new[0][row : row + 1], life.k[row], life.v[row], True)[0]
            away = (o[row].double().cpu() - want[0]).abs().max().item()
            assert away < most, (dtype, row, len(life.k[row]), away)
        assert not o[3].any(), "padding attends to nothing"


if __name__ == "__main__":
    run_main(main)
