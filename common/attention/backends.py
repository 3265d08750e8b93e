"""Which form of the attention contract runs on a device."""

import warnings

import torch

from common.attention.torch_native import TorchNativeAttention

BACKENDS = ("auto", "torch_native", "triton", "flashinfer")


def pick_attention(device: torch.device, name: str = "auto") -> type:
    """The backend class. auto is triton on an NVIDIA GPU that has it, torch_native elsewhere.

    Raises ValueError for an unknown name, or for one that cannot run here.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention_backend={name!r} is unknown; use {', '.join(BACKENDS)}")
    if name == "torch_native" or (name == "auto" and device.type != "cuda"):
        return TorchNativeAttention
    try:  # imported here because neither is part of a CPU installation
        if name == "flashinfer":
            import flashinfer  # noqa: F401, PLC0415

            from common.attention.flashinfer_backend import FlashInferAttention as Attention  # noqa: PLC0415
        else:
            from common.kernels.paged_attention import TritonAttention as Attention  # noqa: PLC0415
    except ImportError as error:
        if name != "auto":
            raise ValueError(f"attention_backend={name}, but it is not installed ({error})") from None
        warnings.warn(f"Triton is not installed ({error}): attention runs in plain PyTorch, and slower", stacklevel=2)
        return TorchNativeAttention
    if device.type != "cuda":
        raise ValueError(f"attention_backend={name} needs an NVIDIA GPU, this rank runs on {device}")
    return Attention
