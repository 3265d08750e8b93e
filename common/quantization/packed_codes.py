"""Codes that stay codes in memory: two of 4 bits in a byte, and numbers only while somebody multiplies by them.

    CodesInMemory   a linear layer's matrix: its kernels on a GPU (gpu_methods.py), its plain form on a CPU
    CodedMatrices   the matrices of a rank's experts

On a CPU this is about memory and not about speed: PIECE numbers are made, multiplied by all rows of x and let go, in each
product anew. Making one takes 0.8 ns (INT8), 4 (GPTQ, 4 bits), 5 (FP8 in blocks) or 8 (MXFP4), multiplying by it 0.16 for one row
of x (one core of a Zen 3, CPU time, torch 2.13). So `auto` does not take it there. Experts are where it costs least: a step makes
the numbers of those alone that its tokens have chosen.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.kernels.quantized_layout import ROWS_ALIGNED, PackedCodes, numbers, pack, packed_bytes
from common.quantization.codes import Codes
from common.quantization.method import Hardware, LinearMethod, Outline
from common.quantization.methods import METHODS
from common.quantization.scheme import Scheme

PIECE = 1 << 20  # numbers, 4 MB: they come from a cache when they are multiplied


class CodesInMemory(LinearMethod):
    """Any codes of at most 8 bits; x keeps its dtype, no weight is rounded."""

    name = "codes, widened at each product"
    unasked = False
    packed: PackedCodes

    @classmethod
    def takes(cls, scheme: Scheme, on: Hardware, dtype: torch.dtype) -> bool:
        return on.type == "cpu" and scheme.bits <= 8

    def pack(self, layer: Any, codes: Codes) -> None:
        self.packed = pack(codes, self.scheme.bits)
        _register(layer, "", self.packed)

    def packed_bytes(self, outline: Outline, dtype: torch.dtype) -> int:
        return packed_bytes(*outline, self.scheme.bits, scale_bytes(self.scheme), self.scheme.symmetric)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        packed = self.packed
        some = max(PIECE // packed.width // ROWS_ALIGNED, 1) * ROWS_ALIGNED
        rows = [slice(first, min(first + some, packed.out)) for first in range(0, packed.out, some)]
        y = torch.cat([F.linear(x, numbers(packed.rows(part), x.dtype)) for part in rows], dim=1)
        return y if bias is None else y.add_(bias)


class CodedMatrices(nn.Module):
    """[S, out, in] with as much of a tensor's face as the runners of experts look at (common/layers/moe_runner.py): `shape`,
    `len`, and `[slot]`, which makes a matrix's numbers. A matrix has several parts, each with groups of its own; the rest is 0."""

    def __init__(self, method: LinearMethod, shape: tuple[int, int, int]):
        super().__init__()
        self.method, self.shape, self.dtype = method, shape, torch.get_default_dtype()
        self._parts: list[list[tuple[int, int, PackedCodes]]] = [[] for _ in range(len(self))]

    def put(self, slots: Sequence[int], dim: int, at: int, codes: Codes) -> None:
        """Rows (dim 0) or columns (dim 1) from `at` on of the matrices in these slots, which are alike and lie here once."""
        packed = pack(codes, self.method.scheme.bits)
        _register(self, f"{slots[0]}_{len(self._parts[slots[0]])}_", packed)
        for slot in slots:
            self._parts[slot].append((dim, at, packed))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, slot: int) -> torch.Tensor:
        matrix = torch.zeros(self.shape[1:], dtype=self.dtype)
        for dim, at, packed in self._parts[slot]:
            values = numbers(packed, self.dtype)
            matrix.narrow(dim, at, values.shape[dim]).copy_(values)
        return matrix


def scale_bytes(scheme: Scheme) -> int:
    """Of a scale as codes are packed, if it came from a file as make.py writes it: 2 where 16 bits hold it exactly."""
    power_of_two = scheme.kind == "float" and scheme.bits == 4
    return 2 if power_of_two else METHODS[scheme.method].stored.itemsize


def _register(module: nn.Module, prefix: str, packed: PackedCodes) -> None:
    for name in ("q", "scale", "zero", "order"):
        if (tensor := getattr(packed, name)) is not None:
            module.register_buffer(prefix + name, tensor, persistent=False)
