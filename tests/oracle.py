"""What must come out: checkpoints with random weights, and transformers' own greedy answers."""

import contextlib
import random
from functools import cache
from pathlib import Path

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.initialization import no_init_weights

YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.707,
    "mscale_all_dim": 1.0,
}  # fmt: skip
# odd sizes everywhere: 7 heads, 9 experts of 23, rows of 24 + 6
DEEPSEEK = dict(
    vocab_size=1009, hidden_size=112, intermediate_size=151, moe_intermediate_size=23, num_hidden_layers=3,
    num_attention_heads=7, num_key_value_heads=7, kv_lora_rank=24, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=9,
    n_routed_experts=9, num_experts_per_tok=3, n_group=3, topk_group=2, first_k_dense_replace=1, initializer_range=0.2,
    max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
# Qwen2.5-0.5B as published, except that the weights are random
PUBLISHED = dict(
    vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2,
    max_position_embeddings=32_768, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, initializer_range=0.05,
)  # fmt: skip
# heads and ratios are those of the real models, the rest is small enough for a test
SMALL = {
    "qwen2": Qwen2Config(
        vocab_size=1009, hidden_size=112, intermediate_size=151, num_hidden_layers=3, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
    ),
    "qwen3": Qwen3Config(
        vocab_size=1009, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=8, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, initializer_range=0.2,
    ),
    "llama": LlamaConfig(
        vocab_size=1009, hidden_size=128, intermediate_size=176, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    # mixtures of experts: 5 and 7 of them, which no number of ranks here divides, of odd width; dense layers, one shared expert
    "qwen2_moe": Qwen2MoeConfig(
        vocab_size=1009, hidden_size=112, intermediate_size=151, moe_intermediate_size=37, num_experts=5, num_experts_per_tok=2,
        shared_expert_intermediate_size=53, decoder_sparse_step=2, num_hidden_layers=4, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        vocab_size=1009, hidden_size=96, intermediate_size=160, moe_intermediate_size=41, num_experts=7, num_experts_per_tok=3,
        norm_topk_prob=True, mlp_only_layers=[1], num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=8,
        head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
    "mixtral": MixtralConfig(
        vocab_size=1009, hidden_size=128, intermediate_size=75, num_local_experts=8, num_experts_per_tok=2,
        num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
    ),
    # one expert a token, of so many that most have none
    "one_of_60": Qwen3MoeConfig(
        vocab_size=1009, hidden_size=64, intermediate_size=64, moe_intermediate_size=24, num_experts=60, num_experts_per_tok=1,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.2,
    ),
    # V2-Lite has no q_lora_rank and greedy routing, V2 has groups, V3 a bias and sigmoids
    "deepseek_v2_lite": DeepseekV2Config(**DEEPSEEK, q_lora_rank=None, rope_parameters=YARN),
    "deepseek_v2": DeepseekV2Config(
        **DEEPSEEK, q_lora_rank=20, topk_method="group_limited_greedy", routed_scaling_factor=3.0, attention_bias=True
    ),
    "deepseek_v3": DeepseekV3Config(**DEEPSEEK, q_lora_rank=20, rope_parameters=YARN, n_shared_experts=1),
    "qwen2.5-0.5b": Qwen2Config(**PUBLISHED, num_hidden_layers=24),
    "qwen2.5-0.5b of 2 layers": Qwen2Config(**PUBLISHED, num_hidden_layers=2),  # in its full width
}  # fmt: skip


# as published, and half of 2 GB to make, to write, and to read for each rank; both compute in float32
STORED = dict.fromkeys(("qwen2.5-0.5b", "qwen2.5-0.5b of 2 layers"), torch.bfloat16)


def save_random(name: str, folder: Path, **save_options) -> Path:
    """A checkpoint with random weights, and biases and norms that are not the trivial 0 and 1."""
    torch.manual_seed(0)
    large = name in STORED  # of these torch draws no weights of its own first, over which transformers' are written
    with no_init_weights() if large else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_config(SMALL[name], dtype=STORED.get(name, torch.float32))
    if large:
        model.init_weights()
    for key, param in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            param.data += 0.1 * torch.randn_like(param)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.add_(0.2 * torch.randn_like(buffer))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, **save_options)
    return folder


@cache
def reference_model(folder: Path) -> torch.nn.Module:
    # experts in a loop: transformers' default is torch's grouped product, which does not take odd widths
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


@cache
def _greedy(folder: Path, prompt: tuple[int, ...], n: int) -> tuple[int, ...]:
    model, ids = reference_model(folder), torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, eos_token_id=-1,
                         pad_token_id=0)  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())


def greedy(folder: Path, prompt: list[int], n: int) -> list[int]:
    """transformers' greedy continuation by n tokens, this prompt alone."""
    return list(_greedy(folder, tuple(prompt), n))


@cache
def _trie(tokenizer, vocab_size: int):
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)


def greedy_under_grammar(folder: Path, tokenizer, prompt: list[int], kind: str, written: str, n: int) -> list[int]:
    """The same with the best token that llguidance allows: transformers, one token after the other, and nothing of ours."""
    model, output = reference_model(folder), []
    grammar = {
        "json_schema": lambda: LLMatcher.grammar_from_json_schema(written, defaults={"whitespace_flexible": False}),
        "regex": lambda: LLMatcher.grammar_from_regex(written),
        "ebnf": lambda: LLMatcher.grammar_from_lark(written),
    }[kind]()
    matcher = LLMatcher(_trie(tokenizer, model.config.vocab_size), grammar)
    while len(output) < n and output[-1:] != [tokenizer.eos_token_id]:
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *output]])).logits[0, -1]
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        output.append(int(logits.masked_fill(torch.from_numpy(~allowed), -torch.inf).argmax()))
        assert matcher.consume_token(output[-1])
    return output


def some_prompts(vocab_size: int, count: int, shared: int = 40, longest: int = 30, seed: int = 0) -> list[list[int]]:
    """Prompts of unequal length: most begin alike, one is a single token, the last repeats the first."""
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(vocab_size) for _ in range(n)]  # noqa: E731
    system = ids(shared)
    prompts = [system + ids(rng.randint(1, longest)) for _ in range(count - 3)]
    return [*prompts, ids(1), ids(longest), prompts[0]]
