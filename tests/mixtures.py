"""Mixtures of experts with random weights, small and odd: E that does not divide, k = 1, a layer without experts."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

_ALIKE = {"vocab_size": 1009, "hidden_size": 48, "max_position_embeddings": 512, "initializer_range": 0.2}
MIXTURES = {
    "shared": Qwen2MoeConfig(
        **_ALIKE, intermediate_size=64, moe_intermediate_size=20, shared_expert_intermediate_size=36, num_experts=5,
        num_experts_per_tok=2, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, mlp_only_layers=[1],
        tie_word_embeddings=True,
    ),
    "one each": Qwen3MoeConfig(
        **_ALIKE, intermediate_size=64, moe_intermediate_size=24, num_experts=7, num_experts_per_tok=1, head_dim=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, norm_topk_prob=True, tie_word_embeddings=False,
    ),
    "wide": MixtralConfig(
        **_ALIKE, intermediate_size=28, num_local_experts=4, num_experts_per_tok=3, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, sliding_window=None, bos_token_id=None,
        eos_token_id=None,
    ),
}  # fmt: skip


def save_mixture(name: str, folder: Path) -> Path:
    """Once; what is there is kept."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(MIXTURES[name], dtype=torch.float32)
        for key, param in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                param.data += 0.1 * torch.randn_like(param)
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder)
    return folder
