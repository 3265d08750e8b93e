"""What a rank saves where its layers keep a checkpoint's codes in place of numbers: bytes, as these layers pack them.

Which matrices are quantized says the config (common/quantization/config.py), and which of them a layer keeps as codes, how, and how
large that is, the methods that multiply by them: they are asked here, for layers without memory. Experts are dequantised as they
are read, embedding, norms and routers are plain. A scale is taken to have the type in which make.py writes it, and a matrix whose
columns were quantized in another order (desc_act) is taken to be cut between groups.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from common.distributed.collectives import TPGroup
from common.distributed.layout import Layout
from common.layers.heads import Piece
from common.layers.linear import LinearBase
from common.layers.mla import LatentAttention
from common.layers.mlp import MLP
from common.layers.vocab import ParallelLMHead
from common.models.config import ModelConfig
from common.models.decoder import SelfAttention
from common.models.tensor_names import name_of_one
from common.planner.plan import Load, Stage, Way
from common.quantization.linear_methods import pick_linear_method
from common.quantization.method import Hardware, Outline
from common.quantization.scheme import Scheme

RANKS = (
    16  # of a group that are looked at: those behind are like them, but for where their columns begin inside a group
)
BESIDE = 1 << 32  # more than the rows of a matrix
Pieces = tuple[tuple[Piece, ...], ...]  # of each matrix in a layer, those that a rank has


def saved_by_codes(config: ModelConfig, way: Way, stage: Stage, load: Load) -> int:
    """Of the rank of a stage that saves least; what is saved is not read in a step, either."""
    if config.quantization is None:
        return 0
    plain = replace(config, rope_scaling=None, vision=None)  # what a cache can tell apart
    return _saved(plain, way.layout, way.travels, stage, load.dtype, load.hardware)


@lru_cache(maxsize=4096)
def _saved(config: ModelConfig, layout: Layout, travels: bool, stage: Stage, dtype: torch.dtype, on: Hardware) -> int:
    return min(
        sum(
            _of_layer(config, layer, name, dtype, on)
            for name, layer in _linear_layers(config, layout, travels, stage, rank)
        )
        for rank in range(min(layout.tp, RANKS))
    )


def _linear_layers(
    config: ModelConfig, layout: Layout, travels: bool, stage: Stage, rank: int
) -> Iterator[tuple[str, LinearBase]]:
    """(name, layer without memory) of all in a stage; layers of one shape are one object."""
    tp, attn_tp = TPGroup(rank, layout.tp), TPGroup(rank % layout.attn_tp, layout.attn_tp)
    hidden, mixture = config.hidden_size, config.mixture
    with torch.device("meta"):
        if config.latent is None:
            attention: nn.Module = SelfAttention(config, attn_tp, 0)
        else:
            attention = LatentAttention(hidden, config.num_heads, config.latent, attn_tp, 0, 0, config.o_bias)
        dense = MLP(hidden, config.intermediate_size, tp)
        shared = MLP(hidden, mixture.shared_size, TPGroup() if travels else tp) if mixture else nn.Module()
        lm_head = ParallelLMHead(config.vocab_size, hidden, tp)
    for i in range(stage.start, stage.start + stage.layers):
        sparse = bool(mixture and mixture.sparse[i])
        for name, module in (
            ("self_attn", attention),
            ("mlp.shared_expert" if sparse else "mlp", shared if sparse else dense),
        ):
            for own, layer in module.named_modules():
                if isinstance(layer, LinearBase) and layer.weight.numel():
                    yield f"model.layers.{i}.{name}.{own}", layer
    if stage.last and config.quantization.names_the_head and not config.tie_word_embeddings:
        yield "lm_head", lm_head


def _of_layer(config: ModelConfig, layer: LinearBase, name: str, dtype: torch.dtype, on: Hardware) -> int:
    parts = [name_of_one(f"{name}.weight", shard).removesuffix(".weight") for shard in layer.weight.shard_shapes]
    schemes = {config.quantization.scheme_of(part) for part in parts}
    if len(schemes) > 1 or (scheme := schemes.pop()) is None:
        return 0
    dim, _ = layer.places(next(iter(layer.weight.shard_shapes)))
    pieces = tuple(tuple(layer.places(shard)[1]) for shard in layer.weight.shard_shapes)
    width = next(iter(layer.weight.shard_shapes.values()))[1]
    return _saved_by_matrix(scheme, dim, tuple(layer.weight.shape), pieces, width, dtype, on)


@lru_cache(maxsize=4096)
def _saved_by_matrix(
    scheme: Scheme, dim: int, shape: tuple[int, int], pieces: Pieces, width: int, dtype: torch.dtype, on: Hardware
) -> int:
    method = pick_linear_method(scheme, on, dtype, "auto")
    outline = outline_of(scheme, dim, shape, pieces, width)
    if method is None or outline.numel < method.smallest:
        return 0
    return outline.numel * dtype.itemsize - method.packed_bytes(outline, dtype)


def outline_of(scheme: Scheme, dim: int, shape: tuple[int, int], pieces: Pieces, width: int) -> Outline:
    """Of a layer's codes as LinearMethod.together puts them side by side. shape: of them, [out/R, in/R], cut along `dim` into
    `pieces`; width: in."""
    rows, columns = shape
    placed = sorted((dst, src, n, matrix) for matrix, own in enumerate(pieces) for dst, src, n in own)
    if dim == 0:
        which = torch.zeros(rows, dtype=torch.int64)
        for dst, src, n, matrix in placed:
            which[dst : dst + n] = 1 + matrix * BESIDE + _scale_of_rows(scheme, torch.arange(src, src + n))
        group = _group_of_columns(scheme, 0, columns, width)
        return Outline(which, group, group.unique())
    groups, used, sources, at = [], [], set(), 0
    for dst, src, n, _ in [*placed, (columns, 0, 0, 0)]:
        if dst > at:  # padding, in a group of its own
            groups.append(torch.full((dst - at,), _behind(groups)))
        if n:
            own = _group_of_columns(scheme, src, src + n, width)
            sources |= set(own.tolist())
            groups.append(own - own.min() + _behind(groups))
            used += groups[-1].unique().tolist()
            at = dst + n
    which, group = 1 + _scale_of_rows(scheme, torch.arange(rows)), torch.cat(groups)
    if scheme.symmetric and len(sources) == 1:  # one scale a row, whatever is padded
        group, used = torch.zeros_like(group), [0]
    return Outline(which, group, torch.tensor(used))


def _behind(groups: list[torch.Tensor]) -> int:
    """The number of the next group."""
    return int(groups[-1].max()) + 1 if groups else 0


def _scale_of_rows(scheme: Scheme, rows: torch.Tensor) -> torch.Tensor:
    if scheme.strategy == "tensor":
        return torch.zeros_like(rows)
    return rows // scheme.block[0] if scheme.strategy == "block" else rows


def _group_of_columns(scheme: Scheme, start: int, stop: int, width: int) -> torch.Tensor:
    columns = torch.arange(start, stop)
    size = scheme.block[1] if scheme.strategy == "block" else scheme.group_size or width
    if scheme.strategy not in ("block", "group"):
        size = width
    return columns % -(-width // size) if scheme.act_order else columns // size
