"""Where kernels are tested: on an NVIDIA GPU, or without one in Triton's interpreter, if Triton is installed."""

import importlib.util

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NO_TRITON = (
    "Triton is not installed; on Linux `pip install triton==3.6.0` lets its interpreter run kernels without a GPU"
)
kernel = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=NO_TRITON)
gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
# float32, and a 16-bit float: the interpreter does not multiply bfloat16. Relative distance to float64
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16 if GPU else torch.float16: 1e-2 if GPU else 1e-3}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12)).item()
