"""The layers that every rank holds whole: norms, rotary embedding, activation."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common.linear import loadable
from common.model_config import ModelConfig

try:  # a CPU build of torch comes without Triton
    from common.kernels import fused
except ImportError:
    fused = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (Zhang and Sennrich 2019).

    Not cut over ranks: each rank has all D features of x after an all-reduce, and the weight is D numbers.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = loadable(torch.zeros(size), self.load_weight, {None: (size,)})
        self._root_floor = torch.tensor(math.sqrt(size * eps), dtype=torch.float32)
        self._root_weight = torch.zeros(size, dtype=torch.float32)

    def load_weight(self, source, shard_id=None) -> None:
        self.weight.copy_(source.read(0, 0, source.shape[0]))
        self._root_weight = self.weight.float() * math.sqrt(len(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if fused and x.is_cuda:
            return fused.rms_norm(x, self.weight, self.eps)
        # sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(D eps)) / sqrt(D), and the last sqrt(D) is in the weight: half of the
        # operators. To a CPU whose caches attention has just swept, each is as dear as ten times its arithmetic
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).hypot_(self._root_floor)
        return (x / root).mul_(self._root_weight).to(x.dtype)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual): the pair that runs through a pre-norm decoder."""
        if fused and x.is_cuda:
            return fused.add_rms_norm(x, residual, self.weight, self.eps)
        residual = x + residual
        return self(residual), residual


class SiluAndMul(nn.Module):
    """SwiGLU's gate: x [T, 2F/R] = (gate, up) side by side -> silu(gate) * up [T, F/R] (Shazeer 2020)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if fused and x.is_cuda:
            return fused.silu_and_mul(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021), the half-split form of Hugging Face's checkpoints.

    The angles of a step's positions are looked up once and used by all layers.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), inverse_frequencies(config))
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


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """theta^(-2i/d) for i < d/2 -> [d/2], rescaled for long contexts if the checkpoint says so."""
    i = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    inv_freq = 1.0 / config.rope_theta ** (i / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    # llama3: long waves are stretched by `factor`, short ones kept, those in between blended
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # turns within the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretch, 1: keep
    return (1 - keep) * inv_freq / scaling["factor"] + keep * inv_freq
