"""A quantized matrix in a checkpoint, with the face that weight loaders know: read some rows or columns of it."""

from collections.abc import Mapping

import torch

from common.quantization.codes import Codes
from common.quantization.scheme import Scheme


class QuantizedTensor:
    """parts: {suffix: what is indexed as a tensor and may lie in a file} (methods.py). shape: [out, in], or [E, out, in] of stacked
    matrices. A slice is widened to the words, groups and blocks that it lies in, and no more is read."""

    def __init__(self, scheme: Scheme, parts: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]):
        self.scheme, self.parts, self.name, self.shape = scheme, parts, name, shape

    def codes(self, rows: slice, columns: slice, matrix: int | None = None) -> Codes:
        """Raises ValueError, with the module's name, for scales that are not finite numbers."""
        raise NotImplementedError

    def read(self, dim: int, start: int, stop: int, matrix: int | None = None) -> torch.Tensor:
        """float32: rows (dim 0) or columns (dim 1) start .. stop - 1, of one matrix if several are stacked."""
        raise NotImplementedError
