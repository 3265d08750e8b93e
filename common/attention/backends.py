"""Which form of the attention contract runs on a device."""

import warnings

import torch

from common.attention.context_parallel import ContextParallelAttention
from common.attention.latent import LatentNativeAttention
from common.attention.torch_native import TorchNativeAttention

BACKENDS = ("auto", "torch_native", "triton", "flashinfer")


def pick_attention(device: torch.device, name: str = "auto", cp_size: int = 1, latent: bool = False) -> type:
    """The backend class. auto is triton on an NVIDIA GPU that has it, torch_native elsewhere.

    cp_size: ranks over which the tokens of a sequence are spread; more than one have a form of their own. latent: pages hold
    latent rows, which each backend has a form of its own for, or none.
    Raises ValueError for an unknown name, or for one that cannot run here.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention_backend={name!r} is unknown; use {', '.join(BACKENDS)}")
    if latent and cp_size > 1:
        raise ValueError(
            f"cp_size={cp_size}: the ring sends K and V of heads round, and this model caches latent rows; use attn_dp_size, "
            f"which holds each row once, too"
        )
    if latent and name == "flashinfer":
        raise ValueError(
            "attention_backend=flashinfer attends to K and V here, and this model caches latent rows; use auto"
        )
    native = LatentNativeAttention if latent else TorchNativeAttention
    if cp_size > 1:
        if name != "auto":
            raise ValueError(f"attention_backend={name} with cp_size={cp_size}: the ring has its own; leave it out")
        return ContextParallelAttention
    if name == "torch_native" or (name == "auto" and device.type != "cuda"):
        return native
    try:  # imported here because neither is part of a CPU installation
        if name == "flashinfer":
            import flashinfer  # noqa: F401, PLC0415

            from common.attention.flashinfer_backend import FlashInferAttention as Attention  # noqa: PLC0415
        elif latent:
            from common.kernels.latent_attention import TritonLatentAttention as Attention  # noqa: PLC0415
        else:
            from common.kernels.paged_attention import TritonAttention as Attention  # noqa: PLC0415
    except ImportError as error:
        if name != "auto":
            raise ValueError(f"attention_backend={name}, but it is not installed ({error})") from None
        warnings.warn(f"Triton is not installed ({error}): attention runs in plain PyTorch, and slower", stacklevel=2)
        return native
    if device.type != "cuda":
        raise ValueError(f"attention_backend={name} needs an NVIDIA GPU, this rank runs on {device}")
    return Attention
