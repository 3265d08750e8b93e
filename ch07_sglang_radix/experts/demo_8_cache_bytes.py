"""Bytes a token: what MHA, GQA and latent attention keep of it, on one rank and on all, cut by heads or by requests.

    python ch07_sglang_radix/experts/demo_8_cache_bytes.py

For published models, and for the bundled one and its form with latent attention, the pages of every rank are made as they are,
one page of each pool, and measured. Then that form answers on two ranks, which start by themselves: cut by heads, with the same
rows on both, and as two data ranks, each with rows of its own.
"""

from typing import NamedTuple

import torch

from ch07_sglang_radix import Engine
from common.attention.kv_cache import PagedKVCache
from common.distributed.launch import run_main
from common.layers.heads import HeadLayout
from common.models.config import ModelConfig
from common.models.published_configs import published_shape
from common.teaching.report import csv_option, write_csv
from common.teaching.show import check, heading, table
from common.tiny_qwen import LATENT_PATH, TINY_QWEN_PATH

MODELS = (
    "SmolLM2-1.7B", "Qwen1.5-MoE-A2.7B", "Qwen2.5-7B", "Llama-3.1-8B", "Llama-3.1-70B", "Qwen3-30B-A3B", "Qwen3-235B-A22B",
    "DeepSeek-V2-Lite", "DeepSeek-V2", "DeepSeek-V3",
)  # fmt: skip
RANKS, PAGE = (1, 2, 4, 8), 16
QUESTIONS = ["What is a radix cache?", "什么是全归约？", "Define retraction.", "What is tensor parallelism?"]
WORDS = 12  # tokens of each answer


class Cut(NamedTuple):
    """A model over R ranks, heads cut over attn_tp of them: bytes of a token on a rank that holds it, and on all together."""

    rank: int
    everywhere: int


def main() -> None:
    path = csv_option(__doc__.splitlines()[0])
    shapes = models()
    one_token(shapes)
    cut_over_ranks(shapes)
    on_two_ranks()
    if path:
        write_csv(rows_of(shapes), path, measured=False)


def models() -> dict[str, ModelConfig]:
    bundled = {"tiny_qwen": TINY_QWEN_PATH, "tiny_qwen/latent": LATENT_PATH}
    shapes = {name: ModelConfig.from_folder(folder) for name, folder in bundled.items()}
    return shapes | {name: published_shape(name) for name in MODELS}


def rows_of(shapes: dict[str, ModelConfig]) -> list[dict]:
    """For the picture: bytes of a token on one of R ranks that cut the heads, and on all of them together."""
    cuts = {name: {ranks: measured(config, ranks) for ranks in RANKS} for name, config in shapes.items()}
    return [
        {"model": name, "kind": kind(config), "ranks": ranks, "on a rank": cut.rank, "on all": cut.everywhere}
        for name, config in shapes.items()
        for ranks, cut in cuts[name].items()
    ]


def kind(config: ModelConfig) -> str:
    if config.latent:
        return "MLA"
    return "MHA" if config.num_kv_heads == config.num_heads else "GQA"


def pages(config: ModelConfig, ranks: int, rank: int, count: int = 1) -> PagedKVCache:
    """Those of one of the ranks that cut the heads."""
    heads = HeadLayout.of(config.num_heads, config.num_kv_heads, rank, ranks)
    return PagedKVCache(config.num_layers, count, PAGE, heads.num_kv, dtype=torch.bfloat16, **config.kv_row)


def measured(config: ModelConfig, attn_tp: int) -> Cut:
    """A token's bytes; all ranks that cut the heads of one attention hold their part of it, and nobody else holds any."""
    each = [pages(config, attn_tp, rank).kv.nbytes // PAGE for rank in range(attn_tp)]
    return Cut(max(each), sum(each))


def one_token(shapes: dict[str, ModelConfig]) -> None:
    heading("One token on one rank, bfloat16")
    rows = []
    for name, config in shapes.items():
        latent = config.latent
        if latent:
            what, made = f"{latent.kv_rank} + {latent.rope_dim}", config.num_heads * (config.head_dim + latent.v_dim)
        else:
            what, made = f"2 x {config.num_kv_heads} x {config.head_dim}", 2 * config.num_heads * config.head_dim
        numbers = measured(config, 1).rank // (2 * config.num_layers)
        rows.append(
            (name, kind(config), config.num_heads, what, numbers, made, config.num_layers, measured(config, 1).rank)
        )
    table(("model", "kind", "heads", "cached a layer", "numbers", "with K, V a head", "layers", "bytes a token"), rows)
    print('  "With K, V a head": as many numbers if every query head had a key and a value of its own in the cache.')


def cut_over_ranks(shapes: dict[str, ModelConfig]) -> None:
    heading("Heads cut over R ranks: bytes of a token on each rank, and on all ranks together")
    header = ("model", "kind", *(f"R = {ranks}" for ranks in RANKS), "on all 8", "on all 8, as data ranks")
    rows, copied = [], True
    for name, config in shapes.items():
        cut, alone = [measured(config, ranks) for ranks in RANKS], measured(config, 1)
        rows.append((name, kind(config), *(each.rank for each in cut), cut[-1].everywhere, alone.everywhere))
        copied &= not config.latent or cut[-1].everywhere == RANKS[-1] * alone.everywhere
    table(header, rows)
    check("of a latent row 8 ranks that cut heads hold 8 copies", copied)
    print(
        "  KV heads can be cut as long as there are some. A row that serves all heads cannot: every rank has all of it."
    )
    print("  A data rank has the whole of its own requests, so a token lies on one rank of the eight.")


def on_two_ranks() -> None:
    heading("Two ranks that answer, float32: the bundled model with a row of 32 + 16 numbers in each of four layers")
    plain, heads = serve(attn_dp_size=1)
    spread, data = serve(attn_dp_size=2)
    rows = [("tp 2", *heads), ("tp 2, attn-dp 2", *data)]
    table(("", "query heads a rank", "KV bytes a token", "pool of a rank, bytes", "tokens in all pools"), rows)
    for question, answer in zip(QUESTIONS, plain, strict=True):
        print(f"  {question} {answer.strip()} ...")
    check("the answers are the same", plain == spread)
    check("the same memory holds twice the tokens", data[3] == 2 * heads[3] and data[2] == heads[2])


def serve(attn_dp_size: int) -> tuple[list[str], tuple[int, ...]]:
    with Engine(
        LATENT_PATH, device="cpu", tp_size=2, attn_dp_size=attn_dp_size, page_size=PAGE, dtype="float32",
        max_total_tokens=1024, check=True,
    ) as engine:  # fmt: skip
        answers = engine.generate(QUESTIONS, sampling_params={"max_new_tokens": WORDS, "temperature": 0})
        wrapper, pool = engine.wrapper, engine.wrapper.kv_cache.kv
        tokens = engine.get_server_info()["max_total_num_tokens"]
        facts = wrapper.model.heads.num_q, pool.nbytes // (wrapper.num_pages * PAGE), pool.nbytes, tokens
    return [answer["text"] for answer in answers], facts


if __name__ == "__main__":
    run_main(main)
