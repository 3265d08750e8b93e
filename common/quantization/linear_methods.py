"""Which of the ways to multiply by quantized weights a layer takes."""

import torch

from common.quantization.cpu_methods import SMALLEST, HalfCodes, Int8OfHalves, RoundedInFloats
from common.quantization.gpu_methods import RoundedActivations, WeightOnlyKernels
from common.quantization.method import Hardware, LinearMethod
from common.quantization.packed_codes import CodesInMemory
from common.quantization.scheme import Scheme

LINEAR_METHODS: dict[str, tuple[type[LinearMethod], ...]] = {  # by --quantized-compute, the first that takes a scheme
    # codes are widened as they are multiplied; x keeps its dtype
    "weight_only": (WeightOnlyKernels, HalfCodes, CodesInMemory),
    # x is rounded too, and small numbers are multiplied
    "activations": (RoundedActivations, Int8OfHalves, RoundedInFloats),
}


def pick_linear_method(scheme: Scheme, on: Hardware, dtype: torch.dtype, compute: str) -> LinearMethod | None:
    """None: the weights are dequantised while they are read, and the layer is a plain one.

    auto: on a GPU activations for a scheme that rounds them, else weight_only; on a CPU weight_only where that is faster than
    dequantised weights (cpu_methods.py). Raises ValueError if `compute` was asked for and no method takes the scheme.
    """
    order = () if compute == "dequantise" else (compute,)
    if compute == "auto" and on.type == "cuda":
        order = ("activations", "weight_only") if scheme.activations else ("weight_only",)
    elif compute == "auto":
        order = ("weight_only",)
    kinds = [kind for name in order for kind in LINEAR_METHODS[name] if kind.takes(scheme, on, dtype)]
    if compute == "auto":
        kinds = [kind for kind in kinds if kind.unasked]
    if order and not kinds and compute != "auto":
        raise ValueError(
            f"quantized_compute={compute}: nothing here multiplies {str(dtype).removeprefix('torch.')} by {scheme} so on "
            f"{on.type}; use auto or dequantise"
        )
    if not kinds:
        return None
    method = kinds[0](scheme)
    if compute == "auto" and on.type == "cpu":
        method.smallest = SMALLEST
    return method


def pick_experts_method(scheme: Scheme, on: Hardware, dtype: torch.dtype, compute: str) -> LinearMethod | None:
    """The same for the matrices of experts: codes if weight_only was asked for, on a CPU. No kernel of experts multiplies by codes
    on a GPU here, and dequantised ones are faster everywhere."""
    asked = compute == "weight_only" and CodesInMemory.takes(scheme, on, dtype)
    return CodesInMemory(scheme) if asked else None
