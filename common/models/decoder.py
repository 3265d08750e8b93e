"""One tensor-parallel decoder for Qwen2, Qwen2.5, Qwen3 and Llama.

A pure function of its arguments: `model(input_ids [T], positions [T], attention) -> hidden [T, D]`. The T
tokens of a step belong to any mix of sequences; only `attention` knows which. Who talks, per step:

    embed_tokens   1 all-reduce  [T, D]
    each layer     2 all-reduces [T, D]    after o_proj and after down_proj
    logits         1 gather      [B, V/R]  (vocab.gather_logits, outside the model)

Module names are Hugging Face's, with q/k/v and gate/up merged (weights.py maps them).
"""

import torch
from torch import nn

from common.layers.activation import SiluAndMul
from common.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from common.layers.norm import RMSNorm
from common.layers.rotary import RotaryEmbedding, Turning
from common.layers.vocab import ParallelLMHead, VocabParallelEmbedding
from common.models.config import ModelConfig
from common.parallel_state import TPGroup


class SelfAttention(nn.Module):
    """x [T, D] -> [T, D]. Projects this rank's heads; `attention` stores k, v and attends over the pages."""

    def __init__(self, config: ModelConfig, tp: TPGroup, layer: int):
        super().__init__()
        name, d = f"layers.{layer}", config.head_dim
        self.layer, self.head_dim = layer, d
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, d, config.num_heads, config.num_kv_heads, tp, config.qkv_bias, f"{name}.qkv_proj"
        )
        heads = self.qkv_proj.heads
        # o_proj's input columns are the query heads: whoever computed a head multiplies it
        self.o_proj = RowParallelLinear(
            config.num_heads * d, config.hidden_size, tp, config.o_bias, f"{name}.o_proj",
            pieces=(heads.num_q * d, heads.q_pieces(d)),
        )  # fmt: skip
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], attention) -> torch.Tensor:
        q, k, v = self.qkv_proj.split(self.qkv_proj(x))
        q = q.view(len(x), -1, self.head_dim)  # [T, Hq/R, d]
        k = k.view(len(x), -1, self.head_dim)  # [T, Hkv/R, d]
        v = v.view(len(x), -1, self.head_dim)  # [T, Hkv/R, d]
        turning = Turning(rotary, self.q_norm, self.k_norm)
        if getattr(attention, "turns", False):  # it does so while it reads q and k
            o = attention(self.layer, q, k, v, turning)  # [T, Hq/R, d]
        else:
            o = attention(self.layer, *turning(q, k), v)  # [T, Hq/R, d]
        return self.o_proj(o.reshape(len(x), -1))  # all-reduce inside


class MLP(nn.Module):
    """x [T, D] -> [T, D]: down(silu(gate(x)) * up(x)); column, then row, one all-reduce."""

    def __init__(self, config: ModelConfig, tp: TPGroup, layer: int):
        super().__init__()
        name, sizes = f"layers.{layer}", [config.intermediate_size] * 2
        self.gate_up_proj = MergedColumnParallelLinear(config.hidden_size, sizes, tp, name=f"{name}.gate_up_proj")
        self.act = SiluAndMul()
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, tp, name=f"{name}.down_proj")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_up_proj(x)))  # [T, 2F/R] -> [T, F/R] -> [T, D]


class DecoderLayer(nn.Module):
    """x = x + self_attn(norm(x)); x = x + mlp(norm(x)).

    `residual` is x, and `x` what the last block has to add to it: the addition then sits next to the norm
    that reads it, where a GPU kernel does both in one pass.
    """

    def __init__(self, config: ModelConfig, tp: TPGroup, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, tp, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, tp, layer)

    def forward(self, x, residual, rotary, attention) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, rotary, attention)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Embedding, L layers, final norm."""

    def __init__(self, config: ModelConfig, tp: TPGroup):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.rotary = RotaryEmbedding(**config.rotary)
        self.layers = nn.ModuleList(DecoderLayer(config, tp, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attention) -> torch.Tensor:
        x, residual = self.embed_tokens(input_ids), None  # [T, D]
        rotary = self.rotary(positions, x.dtype)
        for layer in self.layers:
            x, residual = layer(x, residual, rotary, attention)
        return self.norm.add(x, residual)[0]


class CausalLM(nn.Module):
    """The decoder and its LM head. `hidden = model(...)`, then `model.compute_logits(hidden[last rows])`."""

    def __init__(self, config: ModelConfig, tp: TPGroup):
        super().__init__()
        self.config, self.tp = config, tp
        self.model = Decoder(config, tp)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, tp, tied)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attention) -> torch.Tensor:
        """input_ids, positions [T] -> hidden [T, D]."""
        return self.model(input_ids, positions, attention)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, D] -> this rank's logits [B, V/R]."""
        return self.lm_head(hidden)

    @property
    def heads(self):
        """The heads of this rank (HeadLayout); the same in every layer."""
        return self.model.layers[0].self_attn.qkv_proj.heads
