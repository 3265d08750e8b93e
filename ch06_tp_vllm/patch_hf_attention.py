"""The old way to tensor parallelism: take a Hugging Face model and exchange its attention projections in place.

    model = AutoModelForCausalLM.from_pretrained(folder)
    apply_tp_to_attention_layer(model.model.layers[0], tp)     # or patch_attention(model, tp) for all layers

Quick to write, and it teaches what a rank needs of a layer. What it does not give: every rank has loaded the whole model
first, MLP, embedding and LM head are still computed in full on each, and there are no pages, so no continuous
batching. demo_4_two_ways.py puts it beside the executor, which builds only what the rank holds.
"""

import torch
from torch import nn

from common.layers.linear import QKVParallelLinear, RowParallelLinear
from common.models.weights import TensorSource
from common.parallel_state import TPGroup


class _Part(nn.Module):
    """One of q, k, v out of the fused projection: the Hugging Face layer calls the three one by one."""

    def __init__(self, fused: QKVParallelLinear, index: int):
        super().__init__()
        self.fused, self.index = [fused], index  # in a list: a submodule would be listed, and counted, three times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (fused,) = self.fused
        first = sum(fused.sizes[: self.index])
        rows = slice(first, first + fused.sizes[self.index])
        bias = None if fused.bias is None else fused.bias[rows]
        return nn.functional.linear(x, fused.weight[rows], bias)  # [B, S, D] -> [B, S, H/R * d]


def apply_tp_to_attention_layer(layer: nn.Module, tp: TPGroup) -> None:
    """Exchange the projections of one decoder layer (Qwen2, Qwen3 or Llama) for this rank's shards, in place.

    Afterwards `layer.self_attn` computes this rank's heads and ends in one all-reduce. The full matrices are let go
    layer by layer, but they had to be in memory to begin with.
    """
    attention, config = layer.self_attn, layer.self_attn.config
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    old = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
    name = f"layers.{attention.layer_idx}"
    fused = QKVParallelLinear(config.hidden_size, d, heads, kv_heads, tp, old["q"].bias is not None, f"{name}.qkv_proj")
    for key, projection in old.items():
        fused.weight.weight_loader(TensorSource(projection.weight), key)
        if projection.bias is not None:
            fused.bias.weight_loader(TensorSource(projection.bias), key)
    mine = fused.heads
    o_proj = RowParallelLinear(
        heads * d, config.hidden_size, tp, attention.o_proj.bias is not None, f"{name}.o_proj",
        pieces=(mine.num_q * d, mine.q_pieces(d)),
    )  # fmt: skip
    o_proj.weight.weight_loader(TensorSource(attention.o_proj.weight))
    if attention.o_proj.bias is not None:
        o_proj.bias.weight_loader(TensorSource(attention.o_proj.bias))
    attention.qkv_proj, attention.o_proj = fused, o_proj
    attention.q_proj, attention.k_proj, attention.v_proj = (_Part(fused, i) for i in range(3))
    attention.num_key_value_groups = mine.num_q // mine.num_kv  # query heads that share a KV head, on this rank


def patch_attention(model: nn.Module, tp: TPGroup) -> nn.Module:
    """apply_tp_to_attention_layer for all layers of a Hugging Face causal language model; returns the model."""
    with torch.inference_mode():
        for layer in model.model.layers:
            apply_tp_to_attention_layer(layer, tp)
    return model
