"""A quantized matrix of a checkpoint, with the face that weight loaders know: read some rows or columns of it.

    QuantizedTensor     codes in the files
    RoundedTensor       full precision in the files, codes from here on (--quantization)

Both give codes of any rectangle, for a layer that keeps them, and the numbers that the codes stand for, for one that does not.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from common.models.json_file import names_shown
from common.quantization.codes import Codes, stack_rows
from common.quantization.methods import METHODS
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Scheme

LOOK_AT = 1 << 22  # numbers that are rounded, or dequantised, at a time


class QuantizedTensor:
    """parts: {suffix: what is indexed as a tensor and may lie in a file} (methods.py). shape: [out, in], or [E, out, in] of stacked
    matrices. A slice is widened to the words, groups and blocks that it lies in, and no more is read."""

    def __init__(self, scheme: Scheme, parts: Mapping[str, Any], name: str, shape: tuple[int, ...]):
        self.scheme, self.parts, self.name, self.shape = scheme, parts, name, shape

    @property
    def input_scale(self) -> float | None:
        """x's, if the checkpoint has one. Raises ValueError, with the module's name, unless it is finite and above zero."""
        if ".input_scale" not in self.parts:
            return None
        value = float(self.parts[".input_scale"][...])
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"{self.name}: input_scale is {value}; a scale is finite and above zero, fetch the files again"
            )
        return value

    def codes(self, rows: slice, columns: slice, matrix: int | None = None) -> Codes:
        """Raises ValueError, with the module's name, for scales that are not finite numbers."""
        parts = self.parts if matrix is None else {name: _OneOf(part, matrix) for name, part in self.parts.items()}
        try:
            codes = METHODS[self.scheme.method].codes(self.scheme, parts, self.shape[-2:], rows, columns)
            _refuse_what_is_not_finite(codes)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return codes

    def read(self, dim: int, start: int, stop: int, matrix: int | None = None) -> torch.Tensor:
        """float32: rows (dim 0) or columns (dim 1) start .. stop - 1, of one matrix if several are stacked."""
        everything = slice(0, self.shape[-2]), slice(0, self.shape[-1])
        part = slice(start, stop)
        rows, columns = (part, everything[1]) if dim == 0 else (everything[0], part)
        return self.codes(rows, columns, matrix).dequantise()


class RoundedTensor(QuantizedTensor):
    """source: a full-precision tensor, with a loader's `read`. Scales are of whole rows, so that each rank rounds to the same
    numbers: for columns of a matrix its rows are read whole, some at a time."""

    def __init__(self, scheme: Scheme, source: Any, name: str, shape: tuple[int, ...]):
        super().__init__(scheme, {}, name, shape)
        self.source = source

    def codes(self, rows: slice, columns: slice, matrix: int | None = None) -> Codes:
        one, some = {} if matrix is None else {"matrix": matrix}, max(1, LOOK_AT // self.shape[-1])
        found = []
        for start in range(rows.start, rows.stop, some):
            w = self.source.read(0, start, min(start + some, rows.stop), **one)
            found.append(round_to_nearest(w, self.scheme).cut(columns=columns))
            if not found[-1].scale.isfinite().all():
                raise ValueError(f"{self.name}: NaN or infinity in the weights; fetch them again")
        return stack_rows(found)


class _OneOf:
    """One of several stacked matrices, as if it were alone."""

    def __init__(self, stacked: Any, matrix: int):
        self.stacked, self.matrix = stacked, matrix

    def __getitem__(self, index: Any) -> torch.Tensor:
        rest = index if isinstance(index, tuple) else (index,)
        rest = () if rest == (...,) else rest
        return self.stacked[(slice(self.matrix, self.matrix + 1), *rest)][0]


def _refuse_what_is_not_finite(codes: Codes) -> None:
    bad = {name: int((~x.isfinite()).sum()) for name in ("scale", "zero") if (x := getattr(codes, name)) is not None}
    if any(bad.values()):
        said = names_shown(f"{count} {name}s" for name, count in bad.items() if count)
        raise ValueError(f"NaN or infinity in {said}; fetch the files again")
