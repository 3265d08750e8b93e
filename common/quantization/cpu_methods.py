"""Layers that keep codes on a CPU, and torch's packed kernels that multiply by them (FBGEMM's, on x86).

    HalfCodes        x times codes as float16, in float32, then the row's scale    2 bytes a weight; int8 and float8 are exact in it
    Int8OfHalves     INT8 x times INT8 weights, exact sums of integers             1 byte a weight
    RoundedInFloats  x rounded as a scheme says, times dequantised weights         4 bytes a weight; what kernels compute elsewhere

Measured cold, one core of a Zen 3 without instructions for bfloat16 or INT8 sums (torch 2.13, one thread), ms for 1, 8 and 32 rows;
float32 is the best of its forms (common/layers/cpu_linear.py):

    [out, in]           float32                HalfCodes             Int8OfHalves          bfloat16
    9728 x 896          1.40  19.7  40.2       1.11   2.2  39.4      0.87   2.2  23.9      2.0  62.1  231
    896 x 4864          0.95   3.0  17.2       1.11   1.7  11.8      0.72   1.3  14.0      0.9  17.9   86
    1152 x 896          0.26   0.58  1.29      0.19   0.35  1.07     0.35   0.56  1.44     0.22  1.7   15
    3072 x 576          0.34   0.80  1.88      0.24   0.50  1.33     0.41   0.83  2.34     0.38 11.4   40
    256 x 256           0.03   0.04  0.08      0.05   0.06  0.10     0.23   0.24  0.31     0.02  0.13   0.5

So `auto` takes HalfCodes for matrices of SMALLEST numbers and more, and the small ones are dequantised. Rounding x costs a
dozen small operations, which only a large matrix pays for: Int8OfHalves is for whoever asks. What did not win:
_weight_int8pack_mm and _weight_int4pack_mm_for_cpu want x in bfloat16, and lose to float32 from some ten rows on (9728 x 896:
1.8, 4.6, 42 and 1.4, 5.4, 48 ms); given float32 they are ten times slower than dequantised weights. Groups of 4 bits are not
exact in float16; whoever has no room for their numbers keeps them as codes all the same (packed_codes.py).

Where there are no instructions that add products of bytes in 32 bits (AVX-512 VNNI), FBGEMM adds two of them in 16, which is
too little: 2 * 255 * 127 saturates, and y is wrong by a tenth. torch's own way out is x of 7 bits. Here x keeps its 8:
x = 2 h + r, with h of 7 bits and r of one; both are rows of one product, W is read once, and y = 2 y_h + y_r.
"""

import math
import warnings
from functools import cache
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F

from common.quantization.codes import Codes
from common.quantization.method import Hardware, LinearMethod, Outline
from common.quantization.scheme import Scheme

SMALLEST = 1 << 19  # numbers
LARGEST = {"int": 127.0, "float": 448.0}
MIDDLE = 64  # is 0, in the unsigned bytes that FBGEMM wants of x


class PackedOnCpu(LinearMethod):
    """One scale a row, symmetric. What torch packs is no tensor: it stays where it is when other weights are put aside, and nobody
    can look at its numbers, so a digest of them stands beside the scales for whoever asks which weights these are."""

    bytes_each = 0  # a weight

    @classmethod
    def takes(cls, scheme: Scheme, on: Hardware, dtype: torch.dtype) -> bool:
        by_row = scheme.strategy in ("tensor", "channel") or (scheme.strategy == "group" and scheme.group_size is None)
        eight = scheme.bits == 8 and scheme.symmetric
        return on.type == "cpu" and dtype == torch.float32 and by_row and eight and cls.works()

    @classmethod
    def works(cls) -> bool:
        """Whether this build of torch has the kernel for this CPU: tried on a small matrix."""
        return _works(cls)

    @classmethod
    def packed(cls, q: torch.Tensor, scale: torch.Tensor) -> Any:
        raise NotImplementedError

    def multiply(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        raise NotImplementedError

    def pack(self, layer: Any, codes: Codes) -> None:
        layer.register_buffer("scale", codes.scale[:, 0].contiguous(), persistent=False)
        digest = sha256(codes.q.contiguous().view(torch.uint8).numpy()).digest()
        layer.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8), persistent=False)
        self.scale, self.matrix = layer.scale, self.packed(codes.q, layer.scale)
        self.opaque_bytes = codes.q.numel() * self.bytes_each
        self.static = max(self.input_scales) if self.input_scales else None

    def packed_bytes(self, outline: Outline, dtype: torch.dtype) -> int:
        return outline.numel * self.bytes_each + len(outline.rows) * torch.float32.itemsize + sha256().digest_size

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = self.multiply(x, self.matrix)
        return y if bias is None else y.add_(bias)


class Int8OfHalves(PackedOnCpu):
    """x is rounded by the row, or by the checkpoint's scale; a dynamic scale for all of x is found by the row as well."""

    name, bytes_each = "INT8 kernels", 1

    @classmethod
    def takes(cls, scheme: Scheme, on: Hardware, dtype: torch.dtype) -> bool:
        x = scheme.activations
        rounds = x is not None and x.bits == 8 and x.kind == "int" and x.strategy in ("tensor", "token")
        return rounds and scheme.kind == "int" and super().takes(scheme, on, dtype)

    @classmethod
    def packed(cls, q: torch.Tensor, scale: torch.Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from 2.13 on torch says that quantized tensors will go
            matrix = torch._make_per_channel_quantized_tensor(
                q.contiguous(), scale.double(), torch.zeros(len(q)).long(), 0
            )
        return torch.ops.quantized.linear_prepack(matrix, None)

    def multiply(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        q, x_scale = rounded(x, "int", self.static)
        half = torch.floor(q / 2)
        both = torch.cat([half, q.sub_(half, alpha=2)])
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, MIDDLE, packed)
        of_half, of_rest = y.split(len(x))
        return of_rest.add_(of_half, alpha=2).mul_(x_scale)


class HalfCodes(PackedOnCpu):
    """x as it is, sums in float32."""

    name, bytes_each = "float16 codes", 2

    @classmethod
    def packed(cls, q: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.ops.quantized.linear_prepack_fp16(q.float(), None)

    def multiply(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, packed).mul_(self.scale)


class RoundedInFloats(LinearMethod):
    """FP8 or INT8 x as any scheme asks for it, and weights of any bits; in floats, on any device. No faster, no smaller: for
    answers, not for speed."""

    name = "x rounded, weights dequantised"

    @classmethod
    def takes(cls, scheme: Scheme, on: Hardware, dtype: torch.dtype) -> bool:
        return scheme.activations is not None and scheme.activations.bits == 8

    def pack(self, layer: Any, codes: Codes) -> None:
        layer.register_buffer("plain", codes.dequantise(layer.dtype), persistent=False)
        self.static = max(self.input_scales) if self.input_scales and not self.scheme.activations.dynamic else None

    def packed_bytes(self, outline: Outline, dtype: torch.dtype) -> int:
        return outline.numel * dtype.itemsize

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        how = self.scheme.activations
        groups = x.split(how.group_size, dim=1) if how.strategy == "group" else [x]
        values = [q * scale for q, scale in (rounded(part.float(), how.kind, self.static) for part in groups)]
        return F.linear(torch.cat(values, dim=1).to(x.dtype), layer.plain, bias)


def rounded(x: torch.Tensor, kind: str, static: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, m] float32 -> (codes as float32, scale [T, 1]): the largest number of each row becomes the largest code; or by a scale
    that is given, and what is larger then becomes the largest code."""
    largest = LARGEST[kind]
    scale = x.abs().amax(1, keepdim=True).div_(largest) if static is None else x.new_full((len(x), 1), static)
    scale.masked_fill_(scale == 0, 1.0)
    q = (x / scale).clamp_(-largest, largest)
    return (q.round_() if kind == "int" else q.to(torch.float8_e4m3fn).float()), scale


@cache
def _works(kind: type[PackedOnCpu]) -> bool:
    q = torch.arange(-24 * 16, 24 * 16).reshape(24, 32).remainder(255).sub(127).to(torch.int8)
    x = torch.full((3, 32), 127.0)  # the largest sums that there are
    method = kind(None)
    method.scale, method.static = torch.ones(24), 1.0
    try:
        y = method.multiply(x, kind.packed(q, method.scale))
    except (AttributeError, NotImplementedError, RuntimeError):  # no such operator, none for this CPU
        return False
    return math.isclose((y - x @ q.float().t()).abs().max().item(), 0.0, abs_tol=1.0)
