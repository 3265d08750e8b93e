"""RMSNorm: the layer that every rank holds whole."""

import math

import torch
from torch import nn

from common.layers.linear import loadable

try:  # a CPU build of torch comes without Triton
    from common.kernels import fused
except ImportError:
    fused = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (Zhang and Sennrich 2019).

    Not cut over ranks: each rank has all D features of x after an all-reduce, and the weight is D numbers. root_weight is made
    of it: whoever writes one writes the other.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = loadable(torch.zeros(size), self.load_weight, {None: (size,)})
        self._root_floor = torch.tensor(math.sqrt(size * eps), dtype=torch.float32)
        self.root_weight = torch.zeros(size, dtype=torch.float32)

    def load_weight(self, source, shard_id=None) -> None:
        self.weight.copy_(source.read(0, 0, source.shape[0]))
        self.root_weight.copy_(self.weight.float() * math.sqrt(len(self.weight)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if fused and x.is_cuda:
            return fused.rms_norm(x, self.weight, self.eps)
        # sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(D eps)) / sqrt(D), and the last sqrt(D) is in the weight: half of the
        # operators. To a CPU whose caches attention has just swept, each is as dear as ten times its arithmetic
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).hypot_(self._root_floor)
        return (x / root).mul_(self.root_weight).to(x.dtype)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual): the pair that runs through a pre-norm decoder."""
        if fused and x.is_cuda:
            return fused.add_rms_norm(x, residual, self.weight, self.eps)
        residual = x + residual
        return self(residual), residual
