"""K and V in 32, 16, 8 and 4 bits: what a page then holds, how many tokens fit, and what becomes of the answers.

    python ch07_sglang_radix/quantization/demo_5_kv_bits.py [--questions 24] [--csv figures/quantization_kv.csv]

The weights stay in float32, so that all that changes is what attention reads. An answer is exact if at each of its tokens the model
finds the glossary's own one most likely: greedy decoding then writes it. KL(float32 || this) in nats is the mean over these tokens.
"""

import argparse
from pathlib import Path

import torch

from ch07_sglang_radix import Engine
from ch07_sglang_radix.quantization.glossary_answers import PAGE, Case, answers, forward, pages, questions, shape_of
from common.attention.kv_cache import PagedKVCache
from common.attention.kv_format import KV_DTYPES, kv_format, row_bytes
from common.attention.sequence_table import SequenceTable
from common.distributed.launch import run_main
from common.executor import Executor
from common.models.published_configs import model_shape
from common.teaching.report import write_csv
from common.teaching.show import check, heading, mistake, table

POOL = 1 << 20  # bytes, to count the tokens that fit
PUBLISHED = "Qwen3-0.6B"
SHOWN = ("float32", "bfloat16", "fp8_e4m3", "fp8_e5m2", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=24, help="of the glossary's, of which there are 360")
    parser.add_argument("--csv", type=Path, help="write what was measured, for figures/draw.py")
    args = parser.parse_args()
    executor = Executor(device="cpu", page_size=PAGE, max_total_tokens=PAGE)
    cases = questions(executor, args.questions)
    one_head(keys_of(executor, cases[0].prompt))
    no_scale(keys_of(executor, cases[0].prompt))
    rows = every_format(executor, cases)
    the_engine_agrees(cases[:4])
    if args.csv:
        write_csv(rows, args.csv)


# --- one row


def one_head(x: torch.Tensor) -> None:
    heading("One head of one token: sixteen numbers of K in each form")
    rows = []
    for name in SHOWN:
        form = kv_format(KV_DTYPES[name])
        parts = form.encode(x, torch.ones(()))
        back = form.decode(parts, torch.ones(())).float()
        code = int(parts[0].reshape(-1)[:1].view(torch.uint8)[0]) if form.coded else None
        first = "-" if code is None else f"{code:08b}"
        scale = f"{parts[1].item():.5f}" if form.row_scales else "-"
        off = (back - x).abs().max() / x.abs().max()
        rows.append((name, row_bytes(form.dtype, len(x)), first, scale, f"{back[0]:.4f}", f"{off:.2%}"))
    table(("", "bytes", "first byte of codes", "scale", "first number", "largest error"), rows)
    print("  the error is a share of the largest number; int4: the first number is the low nibble, 8 stands for zero")


def no_scale(x: torch.Tensor) -> None:
    heading("A scale that is missing: keys a hundred times as large, as some models have them")
    x, form = 100 * x, kv_format(torch.float8_e4m3fn)
    scale = x.abs().max() / form.most
    back = [form.decode(form.encode(x, s), s) for s in (torch.ones(()), scale)]
    largest = x.abs().topk(3).indices
    print(f"  the three largest of this head: {' '.join(f'{value:.1f}' for value in x[largest])}")
    mistake(f"e4m3 ends at 448; with k_scale {scale:.2f} it ends where the keys do", back[0][largest], back[1][largest])


def keys_of(executor: Executor, prompt: list[int]) -> torch.Tensor:
    """Of the prompt's last token, in the last layer's first head [d]."""
    cache, meta_rows = (
        PagedKVCache(*shape_of(executor, pages(len(prompt))), torch.float32),
        SequenceTable(1, pages(len(prompt)), PAGE, torch.device("cpu")),
    )
    forward(executor, cache, meta_rows, [prompt], [list(range(pages(len(prompt))))])
    slot = torch.tensor([len(prompt) - 1])
    return cache.read(executor.config.num_layers - 1, slot)[0][0, 0]


# --- all of them


def every_format(executor: Executor, cases: list[Case]) -> list[dict]:
    heading(f"{len(cases)} questions of the glossary behind one system prompt, the weights in float32")
    exact_logprobs, rows, shown = None, [], []
    config = model_shape(PUBLISHED)
    for name in SHOWN:
        dtype = KV_DTYPES[name]
        exact, logprobs = answers(executor, cases, dtype)
        exact_logprobs = logprobs if exact_logprobs is None else exact_logprobs
        kl = (exact_logprobs.exp() * (exact_logprobs - logprobs)).sum(-1)  # [answer tokens]
        a_token = PagedKVCache.bytes_per_page(*shape_of(executor, 1)[:1], 1, *shape_of(executor, 1)[3:], dtype)
        theirs = PagedKVCache.bytes_per_page(config.num_layers, 1, config.num_kv_heads, config.head_dim, dtype)
        rows.append({
            "kv_cache_dtype": name, "bytes_a_token": a_token, "tokens_in_1_MiB": POOL // a_token,
            f"bytes_a_token_{PUBLISHED}": theirs, "asked": len(cases), "exact": exact, "kl_mean": f"{kl.mean():.3e}",
            "kl_largest": f"{kl.max():.3e}",
        })  # fmt: skip
        shown.append((*list(rows[-1].values())[:4], f"{exact} of {len(cases)}", *list(rows[-1].values())[-2:]))
    table(("", "bytes a token", "tokens in 1 MiB", PUBLISHED, "exact", "KL, mean", "KL, largest"), shown)
    bytes_of, kl_of = ({row["kv_cache_dtype"]: float(row[key]) for row in rows} for key in ("bytes_a_token", "kl_mean"))
    check("float32 pages change nothing", kl_of["float32"] == 0)
    check("of two forms of 8 bits, more bits behind the leading one are closer", kl_of["fp8_e4m3"] < kl_of["fp8_e5m2"])
    check("a scale for each head keeps more than one for all, for 2 bytes a head", kl_of["int8"] < kl_of["fp8_e4m3"])
    check("int4 pages hold three times what bfloat16 ones hold", 3 * bytes_of["int4"] < bytes_of["bfloat16"] * 1.0001)
    return rows


def the_engine_agrees(cases: list[Case]) -> None:
    with Engine(device="cpu", kv_cache_dtype="int8", max_total_tokens=4096) as engine:
        params = {"temperature": 0, "max_new_tokens": 120}
        told = engine.generate(input_ids=[case.prompt for case in cases], sampling_params=params)
    wrote = [one["output_ids"] for one in told]
    check("Engine(kv_cache_dtype='int8') writes the glossary's answers", wrote == [case.answer for case in cases])


if __name__ == "__main__":
    run_main(main)
