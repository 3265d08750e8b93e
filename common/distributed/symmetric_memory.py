"""All-reduce of small messages over NVLink without a library call in between: PyTorch's symmetric memory.

A decode step sends 2L + 1 messages of B * D numbers, a few kilobytes each, and for those NCCL's latency is all the
cost. In symmetric memory a kernel can write to every other rank's buffer:

    one-shot   every rank gets all R messages and adds them up (kernels/all_reduce.py)     R - 1 messages out
    two-shot   add up my R-th of all buffers, then fetch the other sums (PyTorch's)        2 (R - 1) / R

The first is one trip, the second moves less. Multicast and multimem stay off.
"""

import os

import torch
import torch.distributed as dist

try:  # a CPU build of torch comes without Triton
    from common.kernels.all_reduce import letters, push, push_add_norm, push_merge
except ImportError:
    push = push_add_norm = push_merge = letters = None

ONE_SHOT_BYTES = 1 << 20  # out of a rank, for all others together
MERGED_BYTES = 4 << 20  # the same for answers that are merged: there is no second way that moves less
MAX_BYTES = 4 << 20  # beyond that NCCL's pipelines win


class SymmetricAllReduce:
    """x [...] on each rank -> the sum, as a new tensor; `fits(x)` says for which x. Made by `connect`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        import torch.distributed._symmetric_memory as symm_mem  # noqa: PLC0415, not in every build of torch

        self._made_of = group, device
        self._group, self._rank, self._size = group.group_name, group.rank(), group.size()
        self._one_shot = ONE_SHOT_BYTES // (self._size - 1)
        self._room = self._one_shot // 4  # words of one message
        self._buffer = symm_mem.empty(MAX_BYTES // 4, dtype=torch.float32, device=device)
        symm_mem.rendezvous(self._buffer, group)
        one = 2 * self._size * self._room
        self._inbox, self._inboxes = _inboxes(2 * one, group, device)  # of sums; of normed rows
        self._norm_inboxes = self._inboxes + one * self._inbox.itemsize
        self._rounds, self._norm_rounds = torch.zeros(2, self._room, dtype=torch.int32, device=device)
        self._norm_words = 0  # of a row; rounds are counted row by row, so all have the same number
        self._merge_room = MERGED_BYTES // (self._size - 1) // 64 * 16  # words of 4 bytes
        self._merged = None  # the form of heads that are merged, and their inbox: made when there are some

    @staticmethod
    def connect(group: dist.ProcessGroup, device: torch.device) -> "SymmetricAllReduce | None":
        """Collective over `group`; None if a GPU cannot reach another one's memory, on every rank alike."""
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        try:
            return SymmetricAllReduce(group, device) if push else None
        except (ImportError, RuntimeError):
            return None

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

    def close(self) -> None:
        """Nothing to say: a peer's end shows in the kernel that waits for it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() * x.element_size() <= self._one_shot:
            return push(x.contiguous(), self._inboxes, self._rounds, self._rank, self._size, self._room)
        flat = x.reshape(-1)
        mine = self._buffer.view(x.dtype)[: len(flat)]
        mine.copy_(flat)
        torch.ops.symm_mem.two_shot_all_reduce_(mine, "sum", self._group)
        return mine.clone().view(x.shape)

    def fits_norm(self, x: torch.Tensor) -> bool:
        """Can `add_norm` take x [T, D]? Rows of one length only: that of the first x."""
        words, rest = divmod(x.shape[-1] * x.element_size(), 4)
        small = x.numel() * x.element_size() <= self._one_shot
        return x.dim() == 2 and rest == 0 and small and self.fits(x) and self._norm_words in (0, words)

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
        """x [T, D] partial on each rank -> (norm(sum + residual), sum + residual), in one kernel."""
        self._norm_words = x.shape[-1] * x.element_size() // 4
        return push_add_norm(
            x.contiguous(), residual.contiguous(), weight, eps, self._norm_inboxes, self._norm_rounds, self._rank,
            self._size, self._room,
        )  # fmt: skip

    def fits_merge(self, answers) -> bool:
        """Can `merge` take these (kernels/merge.py)? Heads of one size only: that of the first."""
        o = answers.o
        whole = o.dtype in (torch.bfloat16, torch.float32) and o.shape[2] * o.element_size() % 4 == 0
        known = self._merged is None or self._merged[0] == (o.shape[2], o.dtype)
        return o.is_cuda and whole and known and letters(answers) <= self._merge_room

    def merge(self, answers) -> torch.Tensor:
        """What each rank's attention says of its keys -> attention over all of them [B, H, d], in one kernel.

        All ranks come here for the first time together, and not within a recording: they meet once more."""
        if self._merged is None:
            inbox, inboxes = _inboxes(2 * self._size * self._merge_room, *self._made_of)
            rounds = torch.zeros(self._merge_room, dtype=torch.int32, device=inbox.device)
            self._merged = (answers.o.shape[2], answers.o.dtype), inbox, inboxes, rounds
        _, _, inboxes, rounds = self._merged
        return push_merge(answers, inboxes, rounds, self._rank, self._size, self._merge_room)


def _inboxes(words: int, group: dist.ProcessGroup, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric memory of 64-bit words, all 0, as rounds count from 1 -> this rank's, and where each rank's begins [R] int64."""
    import torch.distributed._symmetric_memory as symm_mem  # noqa: PLC0415, not in every build of torch

    mine = symm_mem.empty(words, dtype=torch.int64, device=device)
    shared = symm_mem.rendezvous(mine, group)
    mine.zero_()
    torch.cuda.synchronize(device)
    shared.barrier()
    return mine, torch.tensor(shared.buffer_ptrs, dtype=torch.int64, device=device)


_spawned_have_met = False  # ranks that were started here, in this process


def meet_in_symmetric_memory(
    device: torch.device, device_group, control_group, peers: tuple[tuple[int, int], ...], spawned: bool
) -> SymmetricAllReduce | None:
    """Symmetric memory, if all ranks can have it: they must all send the same message the same way.

    Each process counts how often it has met others there, and for ever; the ranks of a second start, which are new and
    begin at 0, would wait for one another under different numbers. They talk through NCCL.
    """
    global _spawned_have_met
    possible = len({host for host, _ in peers}) == 1 and SymmetricAllReduce.reachable(device, len(peers))
    if not _all_agree(possible and not _spawned_have_met, control_group):
        return None
    _spawned_have_met = spawned
    fast = SymmetricAllReduce.connect(device_group, device)
    return fast if _all_agree(fast is not None, control_group) else None


def _all_agree(mine: bool, group) -> bool:
    vote = torch.tensor([int(mine)])
    dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=group)  # COMM all-reduce [1]: can every rank do it?
    return bool(vote)
