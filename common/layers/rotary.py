"""Rotary position embedding: a function of a token's position, equal on every rank."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from common.layers.norm import RMSNorm

try:  # a CPU build of torch comes without Triton
    from common.kernels import fused
except ImportError:
    fused = None


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021), the half-split form of Hugging Face's checkpoints.

    The angles of a step's positions are looked up once and used by all layers. theta and scaling: see
    `inverse_frequencies`.
    """

    def __init__(self, head_dim: int, max_positions: int, theta: float, scaling: dict[str, Any] | None = None):
        super().__init__()
        angles = torch.outer(torch.arange(max_positions).float(), inverse_frequencies(head_dim, theta, scaling))
        self.register_buffer("cos", angles.cos(), persistent=False)  # [max_position, d/2], float32 in any model
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] -> cos, sin [T, 1, d]: each angle serves feature i and feature i + d/2."""
        if fused and positions.is_cuda:
            return fused.angles(positions, self.cos, self.sin, dtype)
        cos, sin = self.cos[positions].to(dtype), self.sin[positions].to(dtype)  # [T, d/2]
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def apply_rotary(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [T, H, d] -> x turned by its position's angles; (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    cos, sin = rotary
    return x.roll(x.shape[-1] // 2, dims=-1).mul_(sin).addcmul_(x, cos)


class Turning(NamedTuple):
    """What a layer does to q and k before it attends: Qwen3 norms each head, then their positions turn them."""

    rotary: tuple[torch.Tensor, torch.Tensor]  # RotaryEmbedding's
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None

    def __call__(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q [T, Hq/R, d], k [T, Hkv/R, d] -> both with their positions in them."""
        if fused and q.is_cuda:
            return fused.turn(q, k, *self.rotary, *self.norms)
        if self.q_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, self.rotary), apply_rotary(k, self.rotary)

    @property
    def norms(self) -> tuple:
        """(weight of q's norm [d], weight of k's, epsilon), or nothing."""
        return (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.q_norm else ()


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None = None) -> torch.Tensor:
    """theta^(-2i/d) for i < d/2 -> [d/2], rescaled for long contexts if the checkpoint says so."""
    i = torch.arange(0, head_dim, 2, dtype=torch.int64).float()
    inv_freq = 1.0 / theta ** (i / head_dim)
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    # llama3: long waves are stretched by `factor`, short ones kept, those in between blended
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # turns within the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretch, 1: keep
    return (1 - keep) * inv_freq / scaling["factor"] + keep * inv_freq
