"""How a linear layer holds its matrix and multiplies by it: plain, or in codes that a kernel reads.

SGLang 0.5.23 and vLLM 0.30 have such an object beside each layer too (LinearMethodBase: create_weights,
process_weights_after_loading, apply). Here it is three steps as well:

    load(layer, shard_id, source)     this rank's codes of one matrix of the checkpoint come in
    finish(layer)                     all are there: lay them out as the kernel wants them
    apply(layer, x, bias)             x [T, in/R] -> y [T, out/R]

A layer without such a method (None) has a plain `weight`: what is quantized is then dequantised while it is read.
"""

from typing import Any

import torch

from common.quantization.codes import Codes
from common.quantization.scheme import Scheme


class LinearMethod:
    """One a layer. A subclass packs and multiplies: it says what it `takes`, and has `pack` and `apply`.

    While this rank's matrices are read they wait in `parts`. The layer's own `weight` has no memory (device meta): it tells shapes
    and loaders to whoever asks. What pack() makes belongs into `layer.register_buffer(name, tensor, persistent=False)`, so that it
    moves, is counted and sleeps with the model.
    """

    name = ""  # as reports say it

    @classmethod
    def takes(cls, scheme: Scheme, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it can hold matrices of that scheme on that device, and multiply x of that dtype by them."""
        raise NotImplementedError

    def __init__(self, scheme: Scheme):
        self.scheme, self.parts = scheme, []

    def pack(self, layer: Any, codes: Codes) -> None:
        """codes [out/R, in/R] of the whole layer on its device, padding included; columns may begin inside a group."""
        raise NotImplementedError

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in/R] in the layer's dtype -> x W^T (+ bias) [T, out/R]."""
        raise NotImplementedError
