"""What must come out: checkpoints with random weights, and transformers' own greedy answers."""

import random
from functools import cache
from pathlib import Path

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

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
    # Qwen2.5-0.5B as published, except that the weights are random
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, initializer_range=0.05,
    ),
}  # fmt: skip


def save_random(name: str, folder: Path, **save_options) -> Path:
    """A checkpoint with random weights, and biases and norms that are not the trivial 0 and 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SMALL[name], dtype=torch.float32)
    for key, param in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            param.data += 0.1 * torch.randn_like(param)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, **save_options)
    return folder


@cache
def reference_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


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
