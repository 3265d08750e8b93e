"""The MLP's activation: number by number, so each rank does its own columns."""

import torch
import torch.nn.functional as F
from torch import nn

from common.quantization.rounded_rows import RoundedRows

try:  # a CPU build of torch comes without Triton
    from common.kernels import fused, rounded_rows
except ImportError:
    fused = rounded_rows = None


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class SiluAndMul(nn.Module):
    """SwiGLU's gate: x [T, 2F/R] = (gate, up) side by side -> silu(gate) * up [T, F/R] (Shazeer 2020).

    compiled: for few rows, the same by torch.compile (compiled.py), or None. rounding: as a norm's (norm.py).
    """

    compiled = rounding = None

    def forward(self, x: torch.Tensor) -> torch.Tensor | RoundedRows:
        if self.compiled and len(x) <= self.compiled.max_rows:
            return self.compiled.gate(x)
        if fused and x.is_cuda:
            if self.rounding and (rounding := self.rounding(len(x))):
                return rounded_rows.silu_and_mul(x, rounding)
            return fused.silu_and_mul(x)
        return silu_and_mul(x)
