"""The same questions to the same model in every format: bytes, tokens a second, exact answers, and how far distributions move.

    python ch07_sglang_radix/quantization/demo_4_same_question.py [--questions 24] [--csv figures/quantization.csv]

Each format is written by common/quantization/make.py and loaded from its files. An answer is exact if the model, fed with the
glossary's own, finds each of its tokens most likely (glossary_answers.py). KL(float32 || this), in nats, is the mean over these
tokens. Tokens a second are those of one request, the best of a few rounds in which each format has its turn.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ch07_sglang_radix.quantization.glossary_answers import PAGE, Case, answers, questions
from common.distributed.launch import run_main
from common.executor import Executor
from common.models.quantized_tensors import weight_bytes
from common.quantization.make import config_of, make
from common.teaching.report import write_csv
from common.teaching.show import check, heading, table
from common.tiny_qwen import TINY_QWEN_PATH

GROUP = 32
CODES = {  # what make.config_of is asked for, and by which algorithm
    "FP8, a scale a matrix": ("fp8", {}, "nearest"),
    "FP8, a scale a row": ("w8a8_fp8", {}, "nearest"),
    "FP8, a scale a block": ("fp8-block", {}, "nearest"),
    "INT8, a scale a row": ("w8a8_int8", {}, "nearest"),
    "MXFP4": ("mxfp4", {}, "nearest"),
    "INT4, groups": ("w4a16", {"group_size": GROUP}, "nearest"),
    "INT4, groups, zeros (AWQ)": ("awq", {"group_size": GROUP}, "nearest"),
    "INT4, groups, by GPTQ": ("gptq", {"group_size": GROUP}, "gptq"),
    "INT3, groups": ("gptq", {"bits": 3, "group_size": GROUP}, "nearest"),
    "INT3, groups, by GPTQ": ("gptq", {"bits": 3, "group_size": GROUP}, "gptq"),
    "INT2, groups, by GPTQ": ("gptq", {"bits": 2, "group_size": GROUP, "zero_points": True}, "gptq"),
}
STEPS, ROUNDS, POOL = 48, 5, 512
PLAIN = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=24, help="of the glossary's, of which there are 360")
    parser.add_argument("--csv", type=Path, help="write what was measured, for figures/draw.py")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # that weights are dequantised is what the table says
    logging.disable_progress_bar()  # transformers', which calibrates
    with tempfile.TemporaryDirectory(prefix="formats-", ignore_cleanup_errors=True) as made:
        rows = every_format(args.questions, Path(made))
    what_is_said(rows)
    if args.csv:
        write_csv(list(rows.values()), args.csv)


def every_format(count: int, made: Path) -> dict[str, dict[str, Any]]:
    exact, narrow = (Executor(device="cpu", page_size=PAGE, max_total_tokens=POOL, dtype=name) for name in PLAIN)
    models = {PLAIN[0]: (TINY_QWEN_PATH, exact), PLAIN[1]: (TINY_QWEN_PATH, narrow)}
    for name, (format_, options, algorithm) in CODES.items():
        folder = made / name.replace(" ", "_")
        make(TINY_QWEN_PATH, folder, config_of(format_, **options), algorithm)
        models[name] = folder, Executor(folder, "cpu", PAGE, max_total_tokens=POOL)
    cases = questions(exact, count)
    heading(f"{len(cases)} questions of the glossary, the layers' matrices in each format")
    _, want = answers(exact, cases, torch.float32)
    rows = {name: row_of(name, *model, cases, want) for name, model in models.items()}
    rates = [{name: speed(executor, cases[0].prompt) for name, (_, executor) in models.items()} for _ in range(ROUNDS)]
    for name, row in rows.items():
        row["tokens_a_second"] = round(max(rate[name] for rate in rates))
    table(
        ("", "MB in files", "MB held", "tokens/s", "exact", "KL, mean"),
        [(name, f"{row['file_bytes'] / 1e6:.2f}", f"{row['held_bytes'] / 1e6:.2f}", row["tokens_a_second"],
          f"{row['exact']} of {row['asked']}", f"{row['kl_mean']:.1e}") for name, row in rows.items()],
    )  # fmt: skip
    print(
        "  1.6 MB of each file are the embedding, in bfloat16. Held: dequantised to float32, as a CPU does with matrices this"
    )
    print("  small; so tokens a second are float32's, and what fewer bits save here are files")
    return rows


def row_of(name: str, folder: Path, executor: Executor, cases: list[Case], want: torch.Tensor) -> dict[str, Any]:
    exact, logprobs = answers(executor, cases, executor.dtype)
    return {
        "name": name, "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "held_bytes": weight_bytes(executor.model), "tokens_a_second": 0, "asked": len(cases), "exact": exact,
        "kl_mean": (want.exp() * (want - logprobs)).sum(-1).mean().item(),
    }  # fmt: skip


def speed(executor: Executor, prompt: list[int]) -> float:
    """Tokens a second of one request."""
    one = np.zeros(1, dtype=np.int64)
    executor.table.set_pages([(0, 0, range(POOL // PAGE))])
    executor.ragged(np.array(prompt), one, one, one + len(prompt), np.ones(1, dtype=bool))
    start = time.perf_counter()
    for i in range(STEPS):
        executor.decode(one, one + len(prompt) + i)
    return STEPS / (time.perf_counter() - start)


def what_is_said(rows: dict[str, dict[str, Any]]) -> None:
    """Claims one hears, beside what was measured."""
    heading("What one hears of it")
    exact, kl, size = (
        {name: float(row[key]) for name, row in rows.items()} for key in ("exact", "kl_mean", "file_bytes")
    )
    asked = rows["float32"]["asked"]
    lost = max(exact["float32"] - exact[name] for name in ("FP8, a scale a row", "INT8, a scale a row"))
    print(f"  '8 bits cost less than 1% of the answers': at most {lost:.0f} of {asked} here")
    print(f"  'INT8 is as good as FP8': KL {kl['INT8, a scale a row']:.0e} and {kl['FP8, a scale a row']:.0e} nats")
    print(
        f"  '4 bits are a quarter of the bytes': {size['INT4, groups'] / size['bfloat16']:.2f} of the files of bfloat16"
    )
    print(
        f"  'GPTQ makes 4 bits free': {exact['INT4, groups, by GPTQ']:.0f} and {exact['INT4, groups']:.0f} of {asked} exact"
    )
    check("INT8 by the row is closer than FP8 by the row", kl["INT8, a scale a row"] < kl["FP8, a scale a row"])
    check("GPTQ is closer than rounding to nearest, at 4 bits and at 3", kl["INT4, groups, by GPTQ"] < kl["INT4, groups"]
          and kl["INT3, groups, by GPTQ"] < kl["INT3, groups"])  # fmt: skip
    check("fewer bits are further off", kl["INT8, a scale a row"] < kl["INT4, groups"] < kl["INT3, groups"])


if __name__ == "__main__":
    run_main(main)
