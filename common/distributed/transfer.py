"""Numbers from the CPU to the device, and back, without making the CPU wait.

A plain copy from pageable memory blocks until the GPU has taken it. From pinned memory it is queued like any
kernel. Pinned memory is slow to get, so a few pieces are kept and used in turn; a piece is written again
only when its last copy is done. On a CPU nothing is copied.
"""

from functools import cache

import numpy as np
import torch

PIECES = 24  # in flight at once: a step needs three or four, one of a drafter up to ten, and one step runs ahead
PIECE_BYTES = 1 << 20


class _PinnedRing:
    """Pieces of pinned memory, used in turn."""

    def __init__(self):
        self._pieces = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(PIECES)]
        self._copied = [torch.cuda.Event() for _ in range(PIECES)]
        self._next = 0

    def copy(self, values: np.ndarray, target: torch.Tensor) -> None:
        """Queue target <- values; both contiguous, of one dtype and size."""
        values = torch.from_numpy(values).reshape(-1).view(torch.uint8)
        if len(values) > PIECE_BYTES:
            target.reshape(-1).view(torch.uint8).copy_(values.pin_memory(), non_blocking=True)
            return
        i, self._next = self._next, (self._next + 1) % PIECES
        self._copied[i].synchronize()
        piece = self._pieces[i][: len(values)].copy_(values)
        target.reshape(-1).view(torch.uint8).copy_(piece, non_blocking=True)
        self._copied[i].record()


@cache
def _ring() -> _PinnedRing:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
        return _PinnedRing()


def copy_to(values: np.ndarray, target: torch.Tensor) -> None:
    """Queue target <- values (same dtype and number of elements), wherever the contiguous `target` lies."""
    values = np.ascontiguousarray(values)
    if not values.size:
        return
    if target.is_cuda:
        _ring().copy(values, target)
    else:
        target.view(-1).copy_(torch.from_numpy(values).view(-1))


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """values -> tensor on `device`; one queued copy."""
    here = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cpu":
        return here
    there = torch.empty(here.shape, dtype=here.dtype, device=device)
    copy_to(values, there)
    return there


def upload_all(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Several int64 vectors in one copy.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for pointers that do not.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    starts = np.cumsum([0] + [len(a) + len(a) % 2 for a in arrays])
    packed = np.zeros(starts[-1], dtype=np.int64)
    for start, a in zip(starts, arrays, strict=False):
        packed[start : start + len(a)] = a
    there = upload(packed, device)
    return [there[start : start + len(a)] for start, a in zip(starts.tolist(), arrays, strict=False)]


class Download:
    """A tensor on its way to the CPU: `Download(x)` queues the copy, `.numpy()` waits for this copy alone."""

    def __init__(self, x: torch.Tensor):
        if x.device.type == "cpu":
            self._here, self._done = x, None
            return
        self._here = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._here.copy_(x, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def numpy(self) -> np.ndarray:
        if self._done is not None:
            self._done.synchronize()
        return self._here.numpy()
