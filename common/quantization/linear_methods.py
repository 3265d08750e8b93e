"""Which of the ways to multiply by quantized weights a layer takes."""

import torch

from common.quantization.method import LinearMethod
from common.quantization.scheme import Scheme

LINEAR_METHODS: dict[str, tuple[type[LinearMethod], ...]] = {  # by --quantized-compute; the first that takes it
    "weight_only": (),  # codes are widened as they are multiplied; x keeps its dtype
    "activations": (),  # x is rounded too, and small numbers are multiplied
}
QUANTIZED_COMPUTE = ("auto", "dequantise", *LINEAR_METHODS)


def pick_linear_method(
    scheme: Scheme, device: torch.device, dtype: torch.dtype, compute: str = "auto"
) -> LinearMethod | None:
    """None: the weights are dequantised while they are read, and the layer is a plain one.

    auto: on a GPU activations for a scheme that rounds them, else weight_only; on a CPU dequantise. Raises ValueError if `compute`
    was asked for and no method takes the scheme.
    """
    raise NotImplementedError
