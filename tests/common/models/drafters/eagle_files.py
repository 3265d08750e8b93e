"""EAGLE heads with random weights under the names of published checkpoints."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DRAFT_VOCAB = 301


def save_head(folder: Path, version: int, target: Path, seed: int = 1, **changed) -> Path:
    """A head for the target in a folder, with its embedding beside it as some published files have it. changed: config keys."""
    their = json.loads((target / "config.json").read_text())
    d_model, heads = their["hidden_size"], their["num_attention_heads"]
    d, kv, width = their.get("head_dim") or d_model // heads, their["num_key_value_heads"], 150
    torch.manual_seed(seed)

    def matrix(out: int, into: int) -> torch.Tensor:
        return torch.randn(out, into) * into**-0.5

    layer, wide = ("midlayer", 2 * d_model) if version == 3 else ("layers.0", d_model)
    tensors = {
        "fc.weight": matrix(d_model, d_model * (3 if version == 3 else 2)),
        f"{layer}.self_attn.q_proj.weight": 3 * matrix(heads * d, wide),  # so that it matters whom a node sees
        f"{layer}.self_attn.k_proj.weight": 3 * matrix(kv * d, wide),
        f"{layer}.self_attn.v_proj.weight": matrix(kv * d, wide),
        f"{layer}.self_attn.o_proj.weight": matrix(d_model, heads * d),
        f"{layer}.mlp.gate_proj.weight": matrix(width, d_model),
        f"{layer}.mlp.up_proj.weight": matrix(width, d_model),
        f"{layer}.mlp.down_proj.weight": matrix(d_model, width),
        f"{layer}.post_attention_layernorm.weight": 1 + 0.1 * torch.randn(d_model),
        "embed_tokens.weight": matrix(their["vocab_size"], d_model),
    }
    if version == 3:
        for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "norm"):
            tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(d_model)
        ids = torch.randperm(their["vocab_size"])[:DRAFT_VOCAB].sort().values
        tensors |= {"lm_head.weight": matrix(DRAFT_VOCAB, d_model) * 4, "d2t": ids - torch.arange(DRAFT_VOCAB)}
        tensors["t2d"] = torch.zeros(their["vocab_size"], dtype=torch.bool).index_fill(0, ids, True)
    else:
        tensors["fc.bias"] = torch.randn(d_model) * 0.1
    config = {
        "architectures": ["LlamaForCausalLMEagle3" if version == 3 else "LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": d_model, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": d, "num_hidden_layers": 1,
        "intermediate_size": width, "vocab_size": their["vocab_size"], "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0, "hidden_act": "silu", "torch_dtype": "float32",
    }  # fmt: skip
    if version == 3:
        config["draft_vocab_size"] = DRAFT_VOCAB
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changed))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def change_tensors(folder: Path, change) -> None:
    """change(tensors) changes the dict of tensors in the file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
