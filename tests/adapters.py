"""Adapters with random numbers as peft saves them, and what transformers answers with one of them: alone, unmerged and merged."""

from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(base: Path, folder: Path, seed: int = 1, strength: float = 0.1, **config) -> Path:
    """config: peft's LoraConfig; all linear layers of the decoder by default. A and B are random, so that every module counts."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR} | config))
    random = torch.Generator().manual_seed(seed)
    for name, param in peft.named_parameters():
        if "lora_" in name:
            param.data = torch.randn(param.shape, generator=random) * strength
    peft.save_pretrained(folder)
    return folder


@cache
def adapted_model(base: Path, adapter: Path, merged: bool = False) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if merged and model.config.tie_word_embeddings:  # what is merged into the one would be in the other
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model = PeftModel.from_pretrained(model, adapter)
    return (model.merge_and_unload() if merged else model).eval()


def greedy_with(base: Path, adapter: Path, prompt: list[int], n: int, merged: bool = False) -> list[int]:
    """transformers' greedy continuation by n tokens, this prompt and this adapter alone."""
    ids = torch.tensor([prompt])
    out = adapted_model(base, adapter, merged).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
