"""Which form of the attention contract runs on a device."""

import warnings

import torch

from common.attention.batch_invariant import BatchInvariantAttention
from common.attention.context_parallel import ContextParallelAttention
from common.attention.latent import LatentNativeAttention
from common.attention.torch_native import TorchNativeAttention

BACKENDS = ("auto", "torch_native", "triton", "flashinfer")


def pick_attention(
    device: torch.device, name: str = "auto", cp_size: int = 1, latent: bool = False, batch_invariant: bool = False
) -> type:
    """The backend class. auto is triton on an NVIDIA GPU that has it, torch_native elsewhere.

    cp_size: ranks over which the tokens of a sequence are spread; more than one have a form of their own. latent: pages hold
    latent rows, which each backend has a form of its own for, or none. batch_invariant: a token's result may not depend on the step
    that computes it (batch_invariant.py).
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
    if batch_invariant and (latent or cp_size > 1 or name == "flashinfer"):
        what = "a model that caches latent rows" if latent else f"cp_size={cp_size}" if cp_size > 1 else "flashinfer"
        raise ValueError(
            f"enable_deterministic_inference with {what}: attention in a fixed order is there for K and V on one rank, by "
            f"torch_native on a CPU and triton on a GPU; leave one of the two out"
        )
    native = LatentNativeAttention if latent else BatchInvariantAttention if batch_invariant else TorchNativeAttention
    if cp_size > 1 and name != "auto":
        raise ValueError(f"attention_backend={name} with cp_size={cp_size}: the ring has its own; leave it out")
    native = ContextParallelAttention if cp_size > 1 else native
    if name == "torch_native" or (name == "auto" and device.type != "cuda"):
        return _of_device(native, device)
    try:  # imported here because neither is part of a CPU installation
        if name == "flashinfer":
            import flashinfer  # noqa: F401, PLC0415

            from common.attention.flashinfer_backend import FlashInferAttention as Attention  # noqa: PLC0415
        elif cp_size > 1:
            from common.kernels.spread_attention import TritonContextParallelAttention as Attention  # noqa: PLC0415
        elif latent:
            from common.kernels.latent_attention import TritonLatentAttention as Attention  # noqa: PLC0415
        elif batch_invariant:
            from common.kernels.paged_attention import BatchInvariantTritonAttention as Attention  # noqa: PLC0415
        else:
            from common.kernels.paged_attention import TritonAttention as Attention  # noqa: PLC0415
    except ImportError as error:
        if name != "auto":
            raise ValueError(f"attention_backend={name}, but it is not installed ({error})") from None
        native = _of_device(native, device)
        warnings.warn(f"Triton is not installed ({error}): attention runs in plain PyTorch, and slower", stacklevel=2)
        return native
    if device.type != "cuda":
        raise ValueError(f"attention_backend={name} needs an NVIDIA GPU, this rank runs on {device}")
    return Attention


def _of_device(native: type, device: torch.device) -> type:
    """Raises ValueError for the one form in plain PyTorch that is made of an operator of CPUs."""
    if native is BatchInvariantAttention and device.type != "cpu":
        raise ValueError(
            f"enable_deterministic_inference with attention in plain PyTorch on {device}: its order is fixed on a CPU only; use "
            f"attention_backend=triton, or device=cpu"
        )
    return native
