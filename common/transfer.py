"""Numbers from the CPU to the device, and back, without making the CPU wait.

A plain copy from pageable memory blocks until the GPU has taken it. From pinned memory it is queued like any
kernel, and PyTorch's allocator keeps the pinned memory until the copy is done. On a CPU nothing is copied.
"""

import numpy as np
import torch


def pinned(values: np.ndarray) -> torch.Tensor:
    """A copy in memory that a GPU can fetch by itself."""
    values = torch.from_numpy(np.ascontiguousarray(values))
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """values -> tensor on `device`; one queued copy, whatever the size."""
    if device.type == "cpu":
        return torch.from_numpy(np.ascontiguousarray(values))
    return pinned(values).to(device, non_blocking=True)


def upload_all(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Several int64 vectors in one copy."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    packed = upload(np.concatenate(arrays), device)
    return list(packed.split([len(a) for a in arrays]))


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
