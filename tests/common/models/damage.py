"""Tiny checkpoints, and tools to damage them: each tool makes a function of a folder."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.common.models.files import rewrite

TINY = dict(
    vocab_size=61, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, eos_token_id=7, bos_token_id=3,
)  # fmt: skip
BASES = {
    "qwen2": Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**TINY, tie_word_embeddings=True, head_dim=8),
    "llama": LlamaConfig(**TINY, tie_word_embeddings=False),
    "qwen2_moe": Qwen2MoeConfig(
        **TINY,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **TINY, head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True
    ),
    "mixtral": MixtralConfig(**TINY, num_local_experts=5, num_experts_per_tok=2),
}
WEIGHTS, INDEX, CONFIG, GENERATION = (
    "model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
)  # fmt: skip
Damage = Callable[[Path], object]


def save_base(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(BASES[name], dtype=torch.float32).save_pretrained(folder)
    return folder


# --- tools


def edit(file: str, **changes) -> Damage:
    """Set keys of a JSON file; NaN and Infinity are written as Python writes them."""
    return lambda folder: rewrite_json(folder / file, lambda raw: raw.update(changes))


def drop(file: str, *keys: str) -> Damage:
    return lambda folder: rewrite_json(folder / file, lambda raw: [raw.pop(key, None) for key in keys])


def rewrite_json(path: Path, change: Callable[[dict], None]) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


def put(file: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(file: str, keep: float) -> Damage:
    """Keep the first bytes only: a share, or with -1 all but the last."""

    def damage(folder):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: -1 if keep < 0 else int(keep * len(data))])

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS) -> Damage:
    return lambda folder: rewrite(folder, change, file)


def header(change: Callable[[dict], None], file: str = WEIGHTS) -> Damage:
    """Change what the header of the weights claims, and leave the bytes as they are."""

    def damage(folder):
        data = (folder / file).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        claims = json.loads(data[8 : 8 + size])
        change(claims)
        text = json.dumps(claims).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return damage


def header_length(n: int, file: str = WEIGHTS) -> Damage:
    return lambda folder: (folder / file).write_bytes(struct.pack("<Q", n) + (folder / file).read_bytes()[8:])


def header_noise(seed: int, file: str = WEIGHTS) -> Damage:
    """A few bytes of the header's text are other bytes."""

    def damage(folder):
        rng, data = random.Random(seed), bytearray((folder / file).read_bytes())
        (size,) = struct.unpack("<Q", data[:8])
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[8 + rng.randrange(size)] = rng.randrange(256)
        (folder / file).write_bytes(bytes(data))

    return damage


def in_two_files(change: Callable[[dict], None] = lambda index: None) -> Damage:
    """model.safetensors cut in two with an index, which is then changed."""

    def damage(folder):
        content = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names, weight_map = sorted(content), {}
        for file, part in (("a.safetensors", names[:9]), ("b.safetensors", names[9:])):
            save_file({name: content[name] for name in part}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        change(index)
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return damage


def one_file_named(name) -> Damage:
    """The index names that file for one tensor."""
    return in_two_files(lambda index: index["weight_map"].update({"model.norm.weight": name}))


def replaced_by(file: str, make: Callable[[Path], None]) -> Damage:
    def damage(folder):
        (folder / file).unlink()
        make(folder / file)

    return damage


def sparse(file: str, size: int) -> Damage:
    def damage(folder):
        with (folder / file).open("r+b") as f:
            f.truncate(size)

    return damage


def then(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]
