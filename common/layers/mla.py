"""Multi-head latent attention: what is cached is not K and V of heads, but one row they can all be made from.

    x [T, D] -+- q_a_proj, norm, q_b_proj (or q_proj) -> q [T, H/R, dn + r]                      heads cut over ranks
              `- kv_a_proj_with_mqa -> latent [T, c], norm -+
                                       one key part [T, r] -+-> row [T, c + r] -> the page       the same on every rank
                                                            |
    attention reads rows through kv_b_proj [H/R, dn + dv, c] -> o [T, H/R, dv] -> o_proj -> all-reduce

The last r numbers of each query, and the one part of the key that all heads share, are turned by their positions; the first dn
have none: a turn between q and Wk could not be moved from one to the other (attention/latent.py, "absorbed").

Tensor parallelism cuts heads: q_b_proj, kv_b_proj and o_proj. The two projections before are narrow and feed all heads, so
every rank has them whole, computes the same rows, and keeps the same cache: R copies. Data ranks keep one each of their own.
DeepSeek-V2, arXiv 2405.04434, section 2.1; SGLang 0.5.23, srt/models/deepseek_v2.py (DeepseekV2AttentionMLA).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from common.layers.heads import HeadLayout
from common.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    load_pieces,
    loadable,
    multiply_both,
)
from common.layers.norm import RMSNorm
from common.layers.rotary import apply_rotary
from common.parallel_state import TPGroup
from common.quantization.method import PLAIN, LayerMethods, LinearMethod

try:  # a CPU build of torch comes without Triton
    from common.kernels import latent_rows as fused
except ImportError:
    fused = None

EPS = 1e-6  # of the two norms in here, whatever rms_norm_eps says, as in transformers 5.23


@dataclass(frozen=True)
class Latent:
    """The sizes of a model's latent attention."""

    kv_rank: int  # c
    rope_dim: int  # r
    nope_dim: int  # dn
    v_dim: int  # dv
    q_rank: int | None  # None: queries are projected in one go
    scale: float  # of the scores; with yarn not (dn + r)^-0.5 alone
    interleaved: bool = True  # features 2i and 2i + 1 are turned together; else i and i + r/2

    @property
    def row(self) -> int:
        """Numbers that are cached for a token and layer."""
        return self.kv_rank + self.rope_dim


class LatentTurning(NamedTuple):
    """What a layer does to q and to the new rows before it attends: their positions turn them, and the latent is normed."""

    rotary: tuple[torch.Tensor, torch.Tensor]  # RotaryEmbedding's
    norm: RMSNorm  # of the latent [c]
    interleaved: bool

    def __call__(self, q: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q [T, H/R, dn + r], row [T, c + r] as they are projected -> both as attention takes them."""
        if fused and q.is_cuda:
            return fused.turn(q, row, self)
        c, r = len(self.norm.weight), self.rotary[0].shape[-1]
        plain, turned = q.split((q.shape[-1] - r, r), dim=-1)
        latent, key = row.split((c, r), dim=-1)
        key = self._turn(key.unsqueeze(1)).squeeze(1)  # one for all heads
        return torch.cat((plain, self._turn(turned)), dim=-1), torch.cat((self.norm(latent), key), dim=-1)

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H, r] -> turned. The turned pairs stay apart, evens then odds, in q and k alike: their product is the same."""
        if self.interleaved:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return apply_rotary(x, self.rotary)


class HeadsLinear(ColumnParallelLinear):
    """Column-parallel, cut between heads: x [T, in] -> [T, H/R * width]; zero heads where R does not divide them."""

    def __init__(
        self, in_features: int, num_heads: int, width: int, tp: TPGroup, heads: HeadLayout, name: str,
        method: LinearMethod | None = None,
    ):  # fmt: skip
        shards = {None: (num_heads * width, heads.q_pieces(width))}
        self._init(in_features, (heads.num_q * width,), shards, tp, bias=False, name=name, method=method)


class Expansion(nn.Module):
    """kv_b_proj: what makes keys and values of a latent. A matrix in its plain form, as attention takes it apart."""

    def __init__(self, num_heads: int, latent: Latent, heads: HeadLayout):
        super().__init__()
        width = latent.nope_dim + latent.v_dim
        self.pieces, self.width = heads.q_pieces(width), width
        shape = {None: (num_heads * width, latent.kv_rank)}
        self.weight = loadable(torch.zeros(heads.num_q * width, latent.kv_rank), self.load_weight, shape)

    def load_weight(self, source, shard_id=None) -> None:
        load_pieces(self.weight, source, 0, self.pieces)

    @property
    def by_head(self) -> torch.Tensor:
        """[H/R, dn + dv, c]."""
        return self.weight.unflatten(0, (-1, self.width))


class LatentAttention(nn.Module):
    """x [T, D] -> [T, D], in place of a decoder's SelfAttention; `attention` stores the rows and attends over the pages.

    tp: the ranks that cut the heads. layer: its number; place: which of a stage's layers it is in the pages. bias: of what
    leaves D and of what comes back to it. reduce_results=False: what comes out is this rank's part of the sum.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, latent: Latent, tp: TPGroup, layer: int, place: int, bias: bool = False,
        reduce_results: bool = True, methods: LayerMethods = PLAIN,
    ):  # fmt: skip
        super().__init__()
        name, query_dim = f"layers.{layer}", latent.nope_dim + latent.rope_dim
        self.layer, self.latent = place, latent
        self.heads = heads = HeadLayout.of(num_heads, 1, tp.rank, tp.size)  # a row is one KV head, which every rank has
        self.q_a_proj = self.q_a_layernorm = self.q_b_proj = self.q_proj = None
        if latent.q_rank is None:
            self.q_proj = HeadsLinear(hidden_size, num_heads, query_dim, tp, heads, f"{name}.q_proj", methods("q_proj"))
        else:
            self.q_a_proj = ReplicatedLinear(
                hidden_size, latent.q_rank, tp, bias, f"{name}.q_a_proj", methods("q_a_proj")
            )
            self.q_a_layernorm = RMSNorm(latent.q_rank, EPS)
            self.q_b_proj = HeadsLinear(
                latent.q_rank, num_heads, query_dim, tp, heads, f"{name}.q_b_proj", methods("q_b_proj")
            )
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            hidden_size, latent.row, tp, bias, f"{name}.kv_a_proj_with_mqa", methods("kv_a_proj_with_mqa")
        )
        self.kv_a_layernorm = RMSNorm(latent.kv_rank, EPS)
        self.kv_b_proj = Expansion(num_heads, latent, heads)
        self.o_proj = RowParallelLinear(
            num_heads * latent.v_dim, hidden_size, tp, bias, f"{name}.o_proj",
            pieces=(heads.num_q * latent.v_dim, heads.q_pieces(latent.v_dim)), reduce_results=reduce_results,
            method=methods("o_proj"),
        )  # fmt: skip

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], attention, adapters: None = None
    ) -> torch.Tensor:
        """adapters: none; LoRA is refused for this attention (models/adapter_files.py)."""
        # row [T, c + r]
        if self.q_a_proj is None:
            q, row = multiply_both(x, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            q, row = multiply_both(x, self.q_a_proj, self.kv_a_proj_with_mqa)
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.unflatten(-1, (self.heads.num_q, -1))  # [T, H/R, dn + r]
        turning = LatentTurning(rotary, self.kv_a_layernorm, self.latent.interleaved)
        given = self.kv_b_proj.by_head, self.latent.scale
        if getattr(attention, "turns", False):  # it does so while it absorbs and stores
            o = attention(self.layer, q, row, *given, turning)  # [T, H/R, dv]
        else:
            o = attention(self.layer, *turning(q, row), *given)  # [T, H/R, dv]
        return self.o_proj(o.flatten(1))  # all-reduce inside
