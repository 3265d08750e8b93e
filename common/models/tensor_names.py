"""Which tensor of a checkpoint fills which part of which parameter.

Names of modules here are Hugging Face's, but for what is merged so that one GEMM does the work of two or three, for the experts of
a layer, which are packed, and for families that write a few of them in their own way (Architecture.spelling). A checkpoint has
three tensors for each expert, or all experts of a layer in two, as transformers 5 holds them in memory:

    ours (model.layers.0.)       shard id     a tensor for each expert            all of them in one
    mlp.experts.w13              (7, 0)       mlp.experts.7.gate_proj.weight      mlp.experts.gate_up_proj [E, 2F, D]
    mlp.experts.w13              (7, 1)       mlp.experts.7.up_proj.weight        mlp.experts.gate_up_proj
    mlp.experts.w2               (7, 2)       mlp.experts.7.down_proj.weight      mlp.experts.down_proj [E, D, F]
"""

from collections.abc import Container
from typing import NamedTuple

from torch import nn

from common.models.checkpoint import Stored
from common.models.schema import ARCHITECTURES

# Hugging Face's module -> (ours, shard id)
MERGED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
PACKED = {"w13": "gate_up_proj", "w2": "down_proj"}  # ours -> theirs, of all experts
OF_AN_EXPERT = ("gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Needed(NamedTuple):
    """What a parameter is made of: a tensor, or the part of it with this shard id; `shape` is the whole tensor's."""

    tensor: str
    param: nn.Parameter
    shard_id: object
    shape: tuple[int, ...]


def needed_of(model: nn.Module, found: Container[str]) -> list[Needed]:
    """What fills every parameter of a CausalLM, or of one stage of it, from files that hold tensors of these names."""
    needed, config = [], model.config
    for name, param in model.named_parameters():  # a tied weight comes once, or twice if the head is cut in its own way
        fused = _name_of_all_experts(name)
        if fused is not None and fused not in found:
            fused = None
        shapes = param.fused_shapes if fused else param.shard_shapes
        for shard_id, shape in shapes.items():
            if fused:
                stored = fused
            elif config.tie_word_embeddings and name == HEAD:
                stored = EMBEDDING
            else:
                plain = name_of_one(name, shard_id)
                stored = plain if plain in found else _spelled(plain, config.architecture)
            needed.append(Needed(stored, param, shard_id, shape))
    return needed


def as_named_here(found: dict[str, Stored], architecture: str, where: str) -> dict[str, Stored]:
    """The same tensors under the one of an architecture's two ways to begin a name that is used here.

    Raises ValueError if a tensor is there under both.
    """
    renamed = {}
    for name, stored in found.items():
        begins = next((pair for pair in ARCHITECTURES[architecture].renamed if name.startswith(pair[0])), ("", ""))
        name = begins[1] + name.removeprefix(begins[0])  # noqa: PLW2901
        if name in renamed:
            raise ValueError(
                f"{where}: {renamed[name].name} and {stored.name} are two names of one tensor; use the weights of one checkpoint"
            )
        renamed[name] = stored
    return renamed


def name_of_one(name: str, shard_id) -> str:
    """model.layers.0.self_attn.qkv_proj.weight, "k" -> model.layers.0.self_attn.k_proj.weight."""
    if isinstance(shard_id, tuple):  # of one expert
        expert, part = shard_id
        return f"{name.rpartition('.')[0]}.{expert}.{OF_AN_EXPERT[part]}.weight"
    for theirs, (ours, shard) in MERGED.items():
        if shard == shard_id and f".{ours}." in name:
            return name.replace(f".{ours}.", f".{theirs}.")
    return name


def _name_of_all_experts(name: str) -> str | None:
    """model.layers.0.mlp.experts.w13 -> model.layers.0.mlp.experts.gate_up_proj; None for other parameters."""
    module, _, last = name.rpartition(".")
    return f"{module}.{PACKED[last]}" if last in PACKED else None


def _spelled(name: str, architecture: str) -> str:
    for ours, theirs in ARCHITECTURES[architecture].spelling:
        name = name.replace(ours, theirs)
    return name
