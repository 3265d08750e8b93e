"""All-reduce of small messages over NVLink without a library call in between: PyTorch's symmetric memory.

A decode step sends 2L + 1 messages of B * D numbers, a few kilobytes each, and for those NCCL's latency is all the
cost. In symmetric memory every rank can read every other rank's buffer:

    one-shot   copy mine into my buffer, wait for the others, read all R buffers and add      R - 1 messages read
    two-shot   add up my R-th of all buffers, then fetch the other sums                       2 (R - 1) / R

The first has one meeting of the ranks less, the second moves less. Multicast and multimem stay off.
"""

import os

import torch
import torch.distributed as dist

ONE_SHOT_BYTES = 256 << 10
MAX_BYTES = 1 << 20  # beyond that NCCL's pipelines win


class SymmetricAllReduce:
    """x [...] on each rank -> the sum, as a new tensor; `fits(x)` says for which x. Made by `connect`."""

    def __init__(self, buffer: torch.Tensor, group_name: str):
        self._buffer, self._group = buffer, group_name

    @staticmethod
    def connect(group: dist.ProcessGroup, device: torch.device) -> "SymmetricAllReduce | None":
        """Collective over `group`; None if a GPU cannot reach another one's memory, on every rank alike."""
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        try:
            import torch.distributed._symmetric_memory as symm_mem  # noqa: PLC0415, not in every build of torch

            buffer = symm_mem.empty(MAX_BYTES // 4, dtype=torch.float32, device=device)
            symm_mem.rendezvous(buffer, group)
        except (ImportError, RuntimeError):
            return None
        return SymmetricAllReduce(buffer, group.group_name)

    @staticmethod
    def reachable(device: torch.device, size: int) -> bool:
        """Can this GPU read the memory of the `size` first GPUs of this host?"""
        others = (i for i in range(size) if i != device.index)
        return torch.cuda.device_count() >= size and all(
            torch.cuda.can_device_access_peer(device.index, i) for i in others
        )

    @staticmethod
    def fits(x: torch.Tensor) -> bool:
        size = x.numel() * x.element_size()
        return x.is_cuda and x.dtype in (torch.bfloat16, torch.float32) and size <= MAX_BYTES and size % 16 == 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1)
        mine = self._buffer.view(x.dtype)[: len(flat)]
        if x.numel() * x.element_size() <= ONE_SHOT_BYTES:
            return torch.ops.symm_mem.one_shot_all_reduce_copy(mine, flat, "sum", self._group).view(x.shape)
        mine.copy_(flat)
        torch.ops.symm_mem.two_shot_all_reduce_(mine, "sum", self._group)
        return mine.clone().view(x.shape)
