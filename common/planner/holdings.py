"""What one rank holds: weights, pages and what lives during a step. Weights and pages to the byte.

All ranks of a stage hold the same number of bytes: whatever does not divide is padded (layers/heads.py).
"""

from typing import NamedTuple

import torch

from common.attention.kv_cache import PagedKVCache
from common.distributed.layout import Layout
from common.layers.heads import HeadLayout, split_evenly
from common.layers.moe import Mixture
from common.models.config import ModelConfig
from common.models.stages import stage_layers
from common.planner.codes import saved_by_codes
from common.planner.plan import Load, Stage, Way


class Parameters(NamedTuple):
    """How many numbers of each kind a rank has."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int  # 0 if it is the embedding, held already
    router: int = 0  # and the gate of a shared expert
    shared: int = 0  # experts that every token visits
    experts: int = 0
    float32: int = 0  # of a router: its bias, whatever the other weights are

    @property
    def total(self) -> int:
        return sum(self)

    def nbytes(self, dtype: torch.dtype) -> int:
        return (self.total - self.float32) * dtype.itemsize + 4 * self.float32


class Holdings(NamedTuple):
    """Bytes of one rank."""

    weights: int
    kv: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def stages(config: ModelConfig, pp: int) -> list[Stage]:
    split = [stage_layers(config.num_layers, pp, rank) for rank in range(pp)]
    sparse = config.mixture.sparse if config.mixture else (False,) * config.num_layers
    return [
        Stage(
            len(own), i == 0, i == pp - 1, sum(sparse[own.start : own.stop]), own.start if config.quantization else 0
        )
        for i, own in enumerate(split)
    ]  # fmt: skip


def parameters(config: ModelConfig, layout: Layout, stage: Stage, travels: bool = False) -> Parameters:
    """Attention and embedding are cut over attn_tp ranks, MLP and head over tp; experts dealt out over ep, and cut over moe_tp.

    A shared expert is cut as an MLP, unless rows travel to the others: then its own rows stay with a rank, which has all of it.
    """
    hidden = config.hidden_size
    width, _ = split_evenly(config.intermediate_size, 0, layout.tp)
    embedded, rows = (split_evenly(config.vocab_size, 0, ranks)[0] for ranks in (layout.attn_tp, layout.tp))
    attention, norms = (_attention if config.latent is None else _latent_attention)(config, layout)
    # a head of its own where the embedding is stages away, or cut over fewer ranks
    tied = config.tie_word_embeddings and stage.first and layout.attn_tp == layout.tp
    return Parameters(
        embedding=embedded * hidden * stage.first,
        attention=attention * stage.layers,
        mlp=3 * width * hidden * (stage.layers - stage.sparse),
        norms=(norms + 2 * hidden) * stage.layers + stage.last * hidden,
        head=rows * hidden * (stage.last and not tied),
        **(_of_experts(config.mixture, hidden, layout, stage.sparse, travels) if config.mixture else {}),
    )


def _attention(config: ModelConfig, layout: Layout) -> tuple[int, int]:
    """Of a layer: (matrices, norms inside)."""
    hidden, d, heads = config.hidden_size, config.head_dim, own_heads(config, layout)
    qkv = (heads.num_q + 2 * heads.num_kv) * d
    attention = qkv * (hidden + config.qkv_bias) + heads.num_q * d * hidden + config.o_bias * hidden
    return attention, config.qk_norm * 2 * d


def _latent_attention(config: ModelConfig, layout: Layout) -> tuple[int, int]:
    """The same where K and V of all heads come from one row: what makes rows is whole on every rank."""
    hidden, latent, own = config.hidden_size, config.latent, own_heads(config, layout).num_q
    query, bias = own * (latent.nope_dim + latent.rope_dim), config.o_bias
    queries, norms = hidden * query, latent.kv_rank
    if latent.q_rank is not None:
        queries, norms = latent.q_rank * (hidden + bias + query), latent.kv_rank + latent.q_rank
    rows = latent.row * (hidden + bias)
    expansion = own * (latent.nope_dim + latent.v_dim) * latent.kv_rank
    return queries + rows + expansion + own * latent.v_dim * hidden + bias * hidden, norms


def _of_experts(mixture: Mixture, hidden: int, layout: Layout, layers: int, travels: bool) -> dict[str, int]:
    slots, _ = split_evenly(mixture.num_experts, 0, layout.ep)
    columns, _ = split_evenly(mixture.intermediate_size, 0, layout.moe_tp)
    shared, _ = split_evenly(mixture.shared_size, 0, 1 if travels else layout.tp)
    return {
        "router": (mixture.num_experts + mixture.shared_gate) * hidden * layers,
        "shared": 3 * shared * hidden * layers,
        "experts": slots * 3 * columns * hidden * layers,
        "float32": mixture.num_experts * mixture.router.bias * layers,
    }


def own_heads(config: ModelConfig, layout: Layout) -> HeadLayout:
    """Of a rank."""
    return HeadLayout.of(config.num_heads, config.num_kv_heads, 0, layout.attn_tp)


def pages_held(load: Load, layout: Layout) -> int:
    """By the fullest rank: those of its requests, or with cp every cp-th of them."""
    requests = -(-load.batch // (layout.dp * layout.attn_dp))
    return -(-requests * load.pages // layout.cp)


def page_bytes(config: ModelConfig, layout: Layout, stage: Stage, load: Load) -> int:
    """Of one page on one rank."""
    kv_heads = own_heads(config, layout).num_kv
    return PagedKVCache.bytes_per_page(stage.layers, load.page_size, kv_heads, dtype=load.kv_dtype, **config.kv_row)


def activations(config: ModelConfig, way: Way, stage: Stage, load: Load) -> int:
    """What must live at once in the widest moment of a prefill step: residual, hidden, and a layer's inside; or the logits.

    The least there can be: kernels take workspaces of their own, and what was freed is not free at once.
    """
    layout, hidden = way.layout, config.hidden_size
    tokens = min(load.chunk, load.context * -(-load.batch // layout.dp))
    own = -(-tokens // way.parts)  # rows that attention sees
    heads = own_heads(config, layout)
    width, _ = split_evenly(config.intermediate_size, 0, layout.tp)
    residual = -(-own // layout.attn_tp) if way.spreads else own
    attention = own * (hidden + (2 * heads.num_q + 2 * heads.num_kv) * config.head_dim)  # x, qkv and what heads give
    mlp = tokens * (hidden + 3 * width) if stage.sparse < stage.layers else 0  # x, gate and up, their product
    if mixture := config.mixture:  # the rows of this rank's experts, if all are as busy: x, gate and up, what comes out
        columns, _ = split_evenly(mixture.intermediate_size, 0, layout.moe_tp)
        chosen = -(-tokens * mixture.router.top_k // layout.ep)
        mlp = max(mlp, tokens * hidden + chosen * (2 * hidden + 3 * columns))
    # rank 0 has all ranks' logits, and a float32 copy to choose by
    logits = stage.last * -(-load.batch // layout.dp) * config.vocab_size
    inside = max(residual * hidden + max(attention, mlp), logits) * load.dtype.itemsize
    return inside + 4 * logits


def holdings(config: ModelConfig, way: Way, load: Load) -> Holdings:
    """Of the rank that holds most."""
    alike = dict.fromkeys(stages(config, way.layout.pp))  # most of many stages are
    each = (of_stage(config, way, load, stage) for stage in alike)
    return max(each, key=lambda held: held.total)


def of_stage(config: ModelConfig, way: Way, load: Load, stage: Stage) -> Holdings:
    """Of the rank of this stage with most requests."""
    pages = pages_held(load, way.layout)
    return Holdings(
        parameters(config, way.layout, stage, way.travels).nbytes(load.dtype)
        - saved_by_codes(config, way, stage, load),
        pages * page_bytes(config, way.layout, stage, load),
        activations(config, way, stage, load),
    )
