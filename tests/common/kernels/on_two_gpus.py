"""The kernels of common/kernels/all_reduce.py between GPUs, against NCCL and plain PyTorch:

torchrun --standalone --nproc_per_node=2 -m tests.common.kernels.on_two_gpus     # or 4; "all right" of rank 0
"""

import random

import torch

from common.distributed.launch import run_main
from common.layers.norm import RMSNorm
from common.parallel_state import TPGroup, all_reduce_add_norm, initialize_tensor_parallel

SHAPES = [(1, 896), (3, 896), (64, 896), (7, 896), (1, 896)]  # rows come and go, so that rounds of rows differ
EPS = 1e-6


def main() -> None:
    for dtype, atol in ((torch.bfloat16, 0.05), (torch.float32, 1e-5)):
        for width in (896, 3584, 112):
            tp = initialize_tensor_parallel(device="cuda")  # rows of one length a group
            check(tp, dtype, width, atol)
    if tp.rank == 0:
        print("all right", flush=True)


def check(tp: TPGroup, dtype: torch.dtype, width: int, atol: float) -> None:
    fast = tp.fast_all_reduce
    if fast is None:
        raise ValueError("these GPUs share no memory; the kernels need NVLink or PCIe peer access")
    norm = RMSNorm(width, EPS).to(tp.device, dtype)
    norm.weight.data.copy_(1 + 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(1)))
    rng, seen = random.Random(0), set()
    for i in range(300):
        rows = rng.choice((1, 1, 2, 5, 33, 64))
        parts = [torch.randn(rows, width, generator=torch.Generator().manual_seed(1000 * i + r)).to(tp.device, dtype)
                 for r in range(tp.size)]  # fmt: skip
        residual = torch.randn(rows, width, generator=torch.Generator().manual_seed(i)).to(tp.device, dtype)
        one_kernel = fast.fits_norm(parts[0])  # with more ranks a message of many rows goes another way
        seen.add(one_kernel)
        assert one_kernel or tp.size > 2, (rows, width, dtype)
        if i % 7 == 0:
            fast(parts[tp.rank].clone())  # its own inbox, its own rounds
        y, total = all_reduce_add_norm(parts[tp.rank].clone(), residual, norm, tp, "test")
        summed = sum((part.float() for part in parts), start=torch.zeros_like(residual, dtype=torch.float32)).to(dtype)
        want = summed + residual
        away = (total.float() - want.float()).abs()
        if one_kernel:
            assert torch.equal(total, want), (i, rows, width, dtype, away.max().item())
        # else each addition rounds: half an eps of a number that is no larger than all of them together; `want` rounds twice
        magnitude = sum((part.float().abs() for part in parts), start=residual.float().abs())
        assert (away <= (tp.size + 2) * torch.finfo(dtype).eps / 2 * magnitude).all(), (
            i,
            rows,
            width,
            dtype,
            away.max().item(),
        )
        exact = total.float() * torch.rsqrt(total.float().square().mean(-1, keepdim=True) + EPS) * norm.weight.float()
        assert (y.float() - exact).abs().max() <= atol, (i, rows, width, dtype, (y.float() - exact).abs().max().item())
    assert True in seen, "no message was small enough for the kernel"
    replayed(tp, norm, dtype, width)


def replayed(tp: TPGroup, norm: RMSNorm, dtype: torch.dtype, width: int) -> None:
    """In a CUDA graph, as decode steps are: each replay is a round of its own."""
    x, residual = (torch.zeros(4, width, dtype=dtype, device=tp.device) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y, total = all_reduce_add_norm(x, residual, norm, tp, "test")
    for i in range(20):
        x.fill_(i + tp.rank)
        residual.fill_(0.5)
        graph.replay()
        want = tp.size * i + sum(range(tp.size)) + 0.5
        assert (total == want).all(), (i, total[0, 0].item(), want)
        assert torch.allclose(y.float(), norm.weight.float().expand(4, width), atol=0.02), i


if __name__ == "__main__":
    run_main(main)
