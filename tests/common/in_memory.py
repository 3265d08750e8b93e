"""A checkpoint tensor that lies in memory and writes down what is read from it."""

import torch

from common.models.weights import TensorSource


class InMemory(TensorSource):
    def __init__(self, tensor: torch.Tensor):
        super().__init__(tensor)
        self.reads: list[tuple[int, int, int]] = []

    def read(self, dim: int, start: int, stop: int) -> torch.Tensor:
        assert 0 <= start < stop <= self.shape[dim], f"[{start}:{stop}] of {self.shape[dim]}"
        self.reads.append((dim, start, stop))
        return super().read(dim, start, stop)

    def times_read(self, dim: int) -> list[int]:
        """How often each row (dim 0) or column (dim 1) has been read."""
        count = [0] * self.shape[dim]
        for along, start, stop in self.reads:
            assert along == dim
            for i in range(start, stop):
                count[i] += 1
        return count
