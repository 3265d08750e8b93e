"""The tables of the wing disaggregation's README, from the CSVs that bench_disaggregation.py has written.

    python -m ch07_sglang_radix.benchmarks.disaggregation_report

Measures nothing: figures/disaggregation.csv and disaggregation_gpu.csv go between their marks in the README.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from common.distributed.launch import run_main
from common.teaching.report import FIGURES

README = Path(__file__).parents[1] / "disaggregation" / "README.md"
CSVS = ("disaggregation.csv", "disaggregation_gpu.csv")
COLUMNS = {  # name: columns of the CSV, which one that was measured before may lack
    "contender": ("contender",), "prompt": ("prompt_tokens",), "every, s": ("every_s",),
    "between tokens, median": ("itl_median_ms",),
    "99th percentile (lowest to highest round)": ("itl_p99_ms", "itl_p99_lowest_ms", "itl_p99_highest_ms"),
    "the model's": ("itl_p99_model_ms",), "longest": ("itl_longest_ms",),
    "first token of the prompt, median": ("ttft_median_ms",), "the model's median": ("ttft_model_ms",),
    "99th percentile": ("ttft_p99_ms",),
}  # fmt: skip


def readme_table(rows: Sequence[dict[str, str]]) -> str:
    """rows: a CSV's."""
    shown = {head: names for head, names in COLUMNS.items() if names[0] in rows[0]}
    lines = [" | ".join(shown), " | ".join(["---"] * len(shown))]
    lines += [" | ".join(_cell([row[name] for name in names]) for names in shown.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(values: Sequence[str]) -> str:
    """One value, or a value with the two that it lies between, unless there was one round."""
    first, *ends = [f"{int(one):,}" if one.isdigit() else f"{float(one):,.2f}" if "." in one else one for one in values]
    return f"{first} ({ends[0]} to {ends[1]})" if ends and ends[0] != ends[1] else first


def read_table(name: str) -> str:
    """name: one of CSVS."""
    with (FIGURES / name).open(newline="", encoding="utf-8") as file:
        return readme_table(list(csv.DictReader(file)))


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for name in CSVS:
        block = f"<!-- {name} -->\n\n{read_table(name)}\n\n<!-- /{name} -->"
        text, found = re.subn(f"<!-- {name} -->.*?<!-- /{name} -->", block, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{README} has {found} blocks <!-- {name} -->; its table goes into one")
    README.write_text(text, encoding="utf-8")
    print(f"wrote {README}")


if __name__ == "__main__":
    run_main(main)
