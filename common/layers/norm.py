"""RMSNorm: the layer that every rank holds whole."""

import math

import torch
from torch import nn

from common.layers.linear import loadable
from common.quantization.rounded_rows import RoundedRows

try:  # a CPU build of torch comes without Triton
    from common.kernels import fused, rounded_rows
except ImportError:
    fused = rounded_rows = None


def rms_norm(x: torch.Tensor, root_weight: torch.Tensor, root_floor: torch.Tensor) -> torch.Tensor:
    """x [T, D] normed; root_weight = weight sqrt(D), root_floor = sqrt(D eps)."""
    # sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(D eps)) / sqrt(D), and the last sqrt(D) is in the weight: half of the
    # operators. To a CPU whose caches attention has just swept, each is as dear as ten times its arithmetic
    root = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).hypot_(root_floor)
    return (x / root).mul_(root_weight).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (Zhang and Sennrich 2019).

    Not cut over ranks: each rank has all D features of x after an all-reduce, and the weight is D numbers. root_weight is made
    of it: whoever writes one writes the other. compiled: for few rows, both forms by torch.compile (compiled.py), or None.
    rounding: of the layer that reads what comes out (LinearBase.asks); on a GPU it gets RoundedRows where it wants them.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps, self.compiled, self.rounding = eps, None, None
        self.weight = loadable(torch.zeros(size), self.load_weight, {None: (size,)})
        self._root_floor = torch.tensor(math.sqrt(size * eps), dtype=torch.float32)
        self.root_weight = torch.zeros(size, dtype=torch.float32)

    def load_weight(self, source, shard_id=None) -> None:
        self.weight.copy_(source.read(0, 0, source.shape[0]))
        self.root_weight.copy_(self.weight.float() * math.sqrt(len(self.weight)))

    def forward(self, x: torch.Tensor) -> torch.Tensor | RoundedRows:
        if self.compiled and len(x) <= self.compiled.max_rows:
            return self.compiled.norm(x, self.root_weight, self._root_floor)
        if fused and x.is_cuda:
            if self.rounding and (rounding := self.rounding(len(x))):
                return rounded_rows.rms_norm(x, self.weight, self.eps, rounding)
            return fused.rms_norm(x, self.weight, self.eps)
        return rms_norm(x, self.root_weight, self._root_floor)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor | RoundedRows, torch.Tensor]:
        """(norm(x + residual), x + residual): the pair that runs through a pre-norm decoder."""
        if self.compiled and len(x) <= self.compiled.max_rows:
            return self.compiled.add_norm(x, residual, self.root_weight, self._root_floor)
        if fused and x.is_cuda:
            if self.rounding and (rounding := self.rounding(len(x))):
                return rounded_rows.add_rms_norm(x, residual, self.weight, self.eps, rounding)
            return fused.add_rms_norm(x, residual, self.weight, self.eps)
        residual = x + residual
        return self(residual), residual
