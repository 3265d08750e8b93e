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
    `inverse_frequencies`. sections: frequencies that turn with each of several positions a token (M-RoPE, vision/mrope.py).
    """

    def __init__(
        self, head_dim: int, max_positions: int, theta: float, scaling: dict[str, Any] | None = None,
        sections: tuple[int, ...] = (),
    ):  # fmt: skip
        super().__init__()
        if torch.get_default_device().type == "meta":
            return  # asked for names and shapes of parameters: it has none, and torch imports for seconds to pretend
        angles = torch.outer(torch.arange(max_positions).float(), inverse_frequencies(head_dim, theta, scaling))
        length = attention_factor(scaling)
        self.register_buffer("cos", angles.cos().mul_(length), persistent=False)  # [max_position, d/2], always float32
        self.register_buffer("sin", angles.sin_().mul_(length), persistent=False)
        if sections:  # [d/2]: which of the positions a frequency turns with
            self.register_buffer(
                "axis", torch.arange(len(sections)).repeat_interleave(torch.tensor(sections)), persistent=False
            )

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T], or [3, T] -> cos, sin [T, 1, d]: each angle serves feature i and feature i + d/2."""
        if positions.dim() == 2:
            at = positions[self.axis].t()  # [T, d/2]
            cos, sin = self.cos.gather(0, at).to(dtype), self.sin.gather(0, at).to(dtype)
        elif fused and positions.is_cuda:
            return fused.angles(positions, self.cos, self.sin, dtype)
        else:
            cos, sin = self.cos[positions].to(dtype), self.sin[positions].to(dtype)  # [T, d/2]
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def apply_rotary(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [T, H, d] -> x turned by its position's angles; (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    cos, sin = rotary
    return x.roll(x.shape[-1] // 2, dims=-1).mul_(sin).addcmul_(x, cos)


def turn(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, Hq/R, d], k [T, Hkv/R, d], both turned."""
    return apply_rotary(q, (cos, sin)), apply_rotary(k, (cos, sin))


class Turning(NamedTuple):
    """What a layer does to q and k before it attends: Qwen3 norms each head, then their positions turn them."""

    rotary: tuple[torch.Tensor, torch.Tensor]  # RotaryEmbedding's
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None
    compiled: Any = None  # for few rows, the turning by torch.compile (compiled.py)

    def __call__(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q [T, Hq/R, d], k [T, Hkv/R, d] -> both with their positions in them."""
        compiles = self.compiled and len(q) <= self.compiled.max_rows
        if fused and q.is_cuda and not compiles:
            return fused.turn(q, k, *self.rotary, *self.norms)
        if self.q_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return (self.compiled.turn if compiles else turn)(q, k, *self.rotary)

    @property
    def norms(self) -> tuple:
        """(weight of q's norm [d], weight of k's, epsilon), or nothing."""
        return (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.q_norm else ()


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None = None) -> torch.Tensor:
    """theta^(-2i/d) for i < d/2 -> [d/2], rescaled for long contexts if the checkpoint says so.

    A frequency that turns often within the context of training tells neighbours apart and is kept; one that does not
    get around once would meet angles it never saw, and is stretched by `factor`. The scalings differ in what lies
    between: `linear` stretches all, `llama3` and `yarn` (Peng et al. 2023) blend, over turns and over i.
    """
    i = torch.arange(0, head_dim, 2, dtype=torch.int64).float()
    inv_freq = 1.0 / theta ** (i / head_dim)
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    if scaling["rope_type"] == "yarn":
        keep = _kept_by_yarn(head_dim, theta, scaling)
    else:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / scaling["factor"] + keep * inv_freq


def attention_factor(scaling: dict[str, Any] | None) -> float:
    """What cos and sin are multiplied by: q and k grow by it, scores by its square. More keys flatten the softmax.

    As transformers 5.23: 0.1 ln(factor) + 1 unless the checkpoint gives it, or the two numbers of DeepSeek for it.
    """
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling["attention_factor"] is not None:
        return scaling["attention_factor"]

    factor = scaling["factor"]
    if scaling["mscale"] and scaling["mscale_all_dim"]:
        return grown_by_yarn(factor, scaling["mscale"]) / grown_by_yarn(factor, scaling["mscale_all_dim"])
    return grown_by_yarn(factor)


def grown_by_yarn(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1: how much q and k grow for a context `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _kept_by_yarn(head_dim: int, theta: float, scaling: dict[str, Any]) -> torch.Tensor:
    """[d/2], 1: keep, 0: stretch; a ramp between the i that turns beta_fast times and the one that turns beta_slow."""

    def turning(times: float) -> float:  # the i, not rounded, whose frequency does so within the context of training
        context = scaling["original_max_position_embeddings"]
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = turning(scaling["beta_fast"] or 32), turning(scaling["beta_slow"] or 1)
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step
    return 1 - ((torch.arange(head_dim // 2).float() - first) / (last - first)).clamp(0, 1)
