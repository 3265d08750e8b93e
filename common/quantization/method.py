"""How a linear layer holds its matrix and multiplies by it, if it is not the plain way.

SGLang 0.5.23 and vLLM 0.30 have such an object beside each layer too (LinearMethodBase: create_weights,
process_weights_after_loading, apply). Here it is three steps as well:

    load(codes, at)          this rank's codes of a part of the layer have been read
    pack(layer, codes)       all are there: lay them out as the kernel wants them
    apply(layer, x, bias)    x [T, in/R] -> y [T, out/R]

A layer without one (None) multiplies by its plain `weight`: what is quantized is then dequantised while it is read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from common.quantization.codes import Codes, nothing, one_group, stack_columns, stack_rows
from common.quantization.rounded_rows import RoundedRows, Rounding
from common.quantization.scheme import Scheme


class Hardware(NamedTuple):
    """What multiplies: "cpu", or "cuda" with its compute capability, and whether Triton is there to write kernels with."""

    type: str
    capability: tuple[int, int] = (0, 0)
    triton: bool = True

    @classmethod
    def of(cls, device: torch.device) -> "Hardware":
        if device.type != "cuda":
            return cls(device.type)
        return cls("cuda", torch.cuda.get_device_capability(device), find_spec("triton") is not None)


class Outline(NamedTuple):
    """What codes of a layer look like without their numbers: what a planner knows of them. rows [out/R]: which scale each row has,
    the same number for the same ones, 0 for padding. group [in/R]: as in Codes; used: the groups that are no padding."""

    rows: torch.Tensor
    group: torch.Tensor
    used: torch.Tensor

    @property
    def numel(self) -> int:
        return len(self.rows) * len(self.group)


class LinearMethod:
    """One a layer. A subclass says what it takes, packs and multiplies.

    Until all is read, the layer's codes wait in `parts`: by shard id, (first row or column, codes). `input_scales`: those of its
    matrices, where a checkpoint has such. The layer's own `weight` has no memory (device meta): it tells its shape and loaders to
    whoever asks. What pack() makes belongs into layer.register_buffer(name, tensor, persistent=False), so that it moves, is counted
    and sleeps with the model.
    """

    name = ""  # as reports say it
    smallest = 0  # a matrix of fewer numbers is dequantised
    opaque_bytes = 0  # of what pack() made that is no tensor
    unasked = True  # may `auto` take it?
    rounds = False  # may `rounding` ask for codes of x?

    @classmethod
    def takes(cls, scheme: Scheme, on: Hardware, dtype: torch.dtype) -> bool:
        """Whether it can hold matrices of that scheme there, and multiply x of that dtype by them."""
        raise NotImplementedError

    def __init__(self, scheme: Scheme | None = None):
        self.scheme = scheme
        self.parts: dict[Any, list[tuple[int, Codes]]] = {}
        self.input_scales: list[float] = []

    def pack(self, layer: Any, codes: Codes) -> None:
        """codes [out/R, in/R] of the whole layer on its device, padding included; columns may begin inside a group."""
        raise NotImplementedError

    def apply(self, layer: Any, x: torch.Tensor | RoundedRows, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in/R] in the layer's dtype, or as `rounding` wants so many rows -> x W^T (+ bias) [T, out/R]."""
        raise NotImplementedError

    def gated(self, layer: Any, x: torch.Tensor | RoundedRows, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Of a layer that is gate and up: silu(gate) * up of the same by one launch, or None if that takes more."""
        return None

    def rounding(self, rows: int) -> Rounding | None:
        """As which codes `apply` wants so many rows of x, or None: as they are, which it takes as well."""
        return None

    def packed_bytes(self, outline: Outline, dtype: torch.dtype) -> int:
        """What pack() makes of codes of that outline in a layer of that dtype, in bytes: of tensors and of what is none."""
        raise NotImplementedError

    def together(self, dim: int, shape: tuple[int, int]) -> Codes | None:
        """The parts as one matrix, with zeros where this rank pads; None if their columns are not grouped alike."""
        found, at = [], 0
        parts = sorted((part for some in self.parts.values() for part in some), key=lambda part: part[0])
        dtype = parts[0][1].q.dtype if parts else torch.uint8
        columns_of = parts[0][1].group if parts and dim == 0 else one_group(shape[1])
        for dst, codes in [*parts, (shape[dim], None)]:
            if dst > at and dim == 0:
                found.append(nothing(dst - at, columns_of, dtype))
            elif dst > at:
                found.append(nothing(shape[0], one_group(dst - at), dtype))
            if codes is not None:
                found.append(codes)
                at = dst + codes.q.shape[dim]
        if dim == 0:
            return stack_rows(found)
        codes, scales = stack_columns(found), [part.scale for _, part in parts]
        whole_rows = scales and scales[0].shape[1] == 1 and all(torch.equal(scale, scales[0]) for scale in scales)
        if whole_rows and codes.zero is None:  # then a kernel may count on one scale a row, padding or not
            return codes._replace(scale=scales[0], group=one_group(shape[1]))
        return codes

    def dequantised(self, dim: int, shape: tuple[int, int]) -> torch.Tensor:
        """The same as numbers, float32."""
        values = torch.zeros(shape)
        for dst, codes in (part for some in self.parts.values() for part in some):
            values.narrow(dim, dst, codes.q.shape[dim]).copy_(codes.dequantise())
        return values


@dataclass(frozen=True)
class LayerMethods:
    """Handed down while a model is built: methods.under("mlp")("down_proj") is what the layer of that name gets."""

    pick: Callable[[str], LinearMethod | None]
    prefix: str = ""

    def under(self, name: str) -> "LayerMethods":
        return replace(self, prefix=f"{self.prefix}{name}.")

    def __call__(self, name: str) -> LinearMethod | None:
        return self.pick(self.prefix + name)


PLAIN = LayerMethods(lambda name: None)
