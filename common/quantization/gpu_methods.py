"""Layers that keep codes on an NVIDIA GPU, and the kernels that multiply by them."""

from typing import Any

import torch

from common.quantization.codes import Codes
from common.quantization.method import Hardware, Outline
from common.quantization.packed_codes import CodesInMemory
from common.quantization.rounded_rows import RoundedRows, Rounding
from common.quantization.scheme import Scheme

try:  # a CPU build of torch comes without Triton
    from common.kernels import quantized_activations as rounded
    from common.kernels import quantized_linear as weight_only
    from common.kernels import quantized_row
except ImportError:
    rounded = weight_only = quantized_row = None

FP8_SINCE = (8, 9)  # compute capability
GROUP = 128  # columns that share a scale where both factors are rounded
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class WeightOnlyKernels(CodesInMemory):
    """Any codes of at most 8 bits; x keeps its dtype, no weight is rounded (common/kernels/quantized_linear.py)."""

    name, unasked = "weight-only kernels", True

    @classmethod
    def takes(cls, scheme: Scheme, on: Hardware, dtype: torch.dtype) -> bool:
        return on.triton and on.type == "cuda" and dtype in FLOATS and scheme.bits <= 8

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return weight_only.linear(x, self.packed, bias)

    def gated(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        if quantized_row.takes(x, self.packed):
            return quantized_row.one_row(self.packed.ordered(x), self.packed, bias, gated=True)
        return None


class RoundedActivations(WeightOnlyKernels):
    """FP8 or INT8 weights of a scheme that rounds x as well: by the row, or by groups of 128 columns where W's blocks have as
    many; or by the checkpoint's scale where it has one.

    A scale for all of x (strategy tensor) that is found as x comes is found by the row here: a finer one, and no row's scale
    depends on who else is in the step. Where W is in blocks, many rows of x stay as they are and W is dequantised: no kernel here
    multiplies so many rows by blocks as fast as the library multiplies 16-bit floats. So it is where a rank's columns are cut into
    shorter runs than 128 each (heads of 64 that do not lie side by side). And so it is with one row of 16-bit floats: rounding
    makes products cheap, and there W's bytes are the cost; it would take a launch, and make the answer less exact. So a request
    alone in its step is computed more exactly than beside others, and its tokens may differ.

    x is rounded by a launch of its own, unless whoever makes it has asked for `rounding`.
    """

    name, rounds = "FP8 and INT8 kernels", True

    @classmethod
    def takes(cls, scheme: Scheme, on: Hardware, dtype: torch.dtype) -> bool:
        x = scheme.activations
        if x is None or not super().takes(scheme, on, dtype):
            return False
        if not (scheme.bits == x.bits == 8 and scheme.kind == x.kind and scheme.symmetric):
            return False
        grouped = (
            (scheme.block[1] if scheme.block else scheme.group_size) if scheme.strategy in ("block", "group") else None
        )
        if grouped not in (None, GROUP) or (grouped is not None and scheme.kind == "int"):
            return False
        if x.strategy == "group" and (grouped is None or x.group_size != GROUP):
            return False
        return scheme.kind == "int" or on.capability >= FP8_SINCE

    def pack(self, layer: Any, codes: Codes) -> None:
        super().pack(layer, codes)
        self.static = max(self.input_scales) if self.input_scales and not self.scheme.activations.dynamic else None
        self.row_scale = None
        if not self.packed.group and self.packed.q.is_floating_point():  # as the library wants it
            by_row = self.packed.scale.float().repeat_interleave(self.packed.share, dim=1)
            self.row_scale = by_row[:, : self.packed.out].contiguous()
            layer.register_buffer("row_scale", self.row_scale, persistent=False)

    def packed_bytes(self, outline: Outline, dtype: torch.dtype) -> int:
        own_scales = self.scheme.kind == "float" and not outline.group.any()
        return super().packed_bytes(outline, dtype) + own_scales * len(outline.rows) * torch.float32.itemsize

    def apply(self, layer: Any, x: torch.Tensor | RoundedRows, bias: torch.Tensor | None) -> torch.Tensor:
        packed = self.packed
        if isinstance(x, RoundedRows):
            q, scale, dtype = x.codes, x.scales, x.dtype
        elif quantized_row.takes(x, packed) or not self._rounded(len(x)):
            return weight_only.linear(x, packed, bias)
        else:
            dtype = x.dtype
            q, scale = rounded.round_rows(packed.ordered(x), packed.q.dtype, bool(packed.group), self.static)
        in_blocks_of_16 = packed.out % 16 == 0 and packed.width % 16 == 0
        if len(q) > rounded.TILE and self.row_scale is not None and dtype == torch.bfloat16 and in_blocks_of_16:
            return torch._scaled_mm(q, packed.q.t(), scale, self.row_scale, bias, out_dtype=dtype, use_fast_accum=True)
        return rounded.multiply(q, scale, packed.q, packed.scale, packed.share, dtype, bias)

    def _rounded(self, rows: int) -> bool:
        """Are so many rows of x, more than one or of float32, multiplied as codes?"""
        return self.packed.group == 0 or (self.packed.group == GROUP and rows <= weight_only.MANY)

    def rounding(self, rows: int) -> Rounding | None:
        packed = self.packed
        if rows < 2 or packed.order is not None or not self._rounded(rows):
            return None
        return Rounding(packed.q.dtype, bool(packed.group), self.static)
