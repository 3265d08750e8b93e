"""The CSVs of the chapter's pictures are what its demos write now, and the README's tables what is in them."""

import csv
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ch06_tp_vllm.demo_4_two_ways import PARTS, sizes
from ch06_tp_vllm.exercises.check import EXERCISES
from ch06_tp_vllm.patch_hf_attention import patch_attention
from ch06_tp_vllm.record_messages import PROMPTS
from common.models.config import ModelConfig
from common.models.decoder import CausalLM
from common.parallel_state import TPGroup
from common.tiny_qwen import TINY_QWEN_PATH

ROOT = Path(__file__).parents[2]
README = (ROOT / "ch06_tp_vllm" / "README.md").read_text(encoding="utf-8")
COUNTED = {
    "toy_split": "demo_1_toy_split", "parallel_layers": "demo_2_parallel_layers", "heads": "demo_3_heads",
    "blocks": "demo_7_block_manager", "batching": "demo_8_scheduler",
}  # fmt: skip


def rows_of(name):
    with (ROOT / "figures" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", COUNTED)
def test_what_the_demo_writes_is_committed(name, tmp_path, monkeypatch):
    demo = importlib.import_module(f"ch06_tp_vllm.{COUNTED[name]}")
    monkeypatch.setattr(sys, "argv", ["demo", "--csv", str(tmp_path / "rows.csv")])
    demo.main()
    assert (tmp_path / "rows.csv").read_text() == (ROOT / "figures" / f"{name}.csv").read_text()


def test_the_two_ways_hold_what_the_picture_says():
    two, whole = TPGroup(0, 2), AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH)
    ways = {"one whole model": sizes(whole)}
    ways["patched attention"] = sizes(patch_attention(whole, two))
    with torch.device("meta"):
        ways["executor"] = sizes(CausalLM(ModelConfig.from_folder(TINY_QWEN_PATH), two))
    assert rows_of("two_ways") == [{"part": part} | {way: str(ways[way][part]) for way in ways} for part in PARTS]


def test_the_messages_are_those_of_the_formula():
    config = ModelConfig.from_folder(TINY_QWEN_PATH)
    for step, tokens in (("prefill", sum(map(len, PROMPTS))), ("decode", len(PROMPTS))):
        rows = [row for row in rows_of("messages") if row["step"] == step]
        ops = [row["op"] for row in rows]
        assert ops == ["broadcast", *["all_reduce"] * (1 + 2 * config.num_layers), "gather", "broadcast"]
        assert {row["shape"] for row in rows if row["op"] == "all_reduce"} == {f"[{tokens}, {config.hidden_size}]"}
        assert rows[-2]["shape"] == f"[{len(PROMPTS)}, {config.vocab_size // 2}]"


def test_the_memory_of_a_chat_service_is_what_the_demo_prints():
    """The waste is counted; what is timed beside it differs from run to run."""
    for row in rows_of("kv_cache"):
        if row["requests"] == "chat":
            *_, fits = (value for key, value in row.items() if key.startswith("run at once"))
            assert re.search(rf"{row['cache']} +{row['waste %']} +{fits}\n", README)


def test_what_paging_costs_a_single_request_is_in_the_csv():
    speed = {row["cache"]: float(row["tokens/s"]) for row in rows_of("kv_cache") if row["requests"] == "these four"}
    whole, paged = speed["contiguous, 512 each"], speed["blocks of 16"]
    said = f"cost a single request {100 * (1 - paged / whole):.0f} % there ({paged:.0f} tokens/s instead of {whole:.0f}"
    assert said in README
    for name, value in speed.items():
        assert re.search(rf"^  {name} +\d+\.\d\d +{value:.0f}$", README, re.MULTILINE)


def test_the_batching_picture_has_the_steps_of_the_table():
    rows = rows_of("batching")
    for name in dict.fromkeys(row["batching"] for row in rows):
        steps = 1 + max(int(row["step"]) for row in rows if row["batching"] == name)
        assert re.search(rf"^  {name} +{steps} ", README, re.MULTILINE)


def test_the_table_of_the_benchmark_is_the_csv():
    ours, theirs = (row for row in rows_of("bench_throughput") if row["contender"].endswith("greedy"))
    cells = (
        "this engine", f"{float(ours['tokens/s']):,.0f}", f"{ours['first token s, median']} s", f"{ours['ms per token']} ms",
        f"{ours['KV waste %']} %",
    )  # fmt: skip
    assert f"| {' | '.join(cells)} |" in README
    assert f"| transformers generate | {float(theirs['tokens/s']):,.0f} |" in README
    faster = float(ours["tokens/s"]) / float(theirs["tokens/s"])
    assert f"{faster:.1f} times" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_both_engines_numbers_are_the_csv_s():
    rows = {(row["model"], row["workload"], row["engine"]): row for row in rows_of("engines")}
    top = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(rows) == 2 * 4
    for model, workload in dict.fromkeys(key[:2] for key in rows):
        six, seven = (rows[model, workload, f"chapter {n}"] for n in (6, 7))
        numbers = [f"{float(row['tokens/s']):,.0f}" for row in (six, seven)]
        cells = (
            f"{model}, {workload}",
            *numbers,
            f"{six['first token s, median']} s",
            f"{six['ms per token']} ms",
            f"{six['KV waste %']} %",
        )
        assert f"| {' | '.join(cells)} |" in README
        assert re.search(rf"{numbers[0]} (tokens/s )?against\s+{numbers[1]}", top)


def test_every_step_has_a_picture_and_exercises_of_its_own():
    steps = re.split(r"^## \d+\. .+$", README, flags=re.MULTILINE)[1:]
    assert len(steps) == 10
    assert all(re.search(r"^!\[.+\]\(\.\./figures/\w+\.svg\)$", step, re.MULTILINE) for step in steps[:9])
    listed = [row.split("|")[5] for row in README.splitlines() if re.match(r"\| \d+ \|", row)]
    assert len(listed) == 10
    assert all(cell.strip() for cell in listed[:9])
    by_step = {i + 1: {int(n) for n in cell.split(",")} for i, cell in enumerate(listed[:9])}
    assert set.union(*by_step.values()) == set(EXERCISES.numbers)
    table = (ROOT / "ch06_tp_vllm" / "exercises" / "README.md").read_text(encoding="utf-8")
    for number in EXERCISES.numbers:
        (line,) = re.findall(rf"^\| {number} \|.*$", table, re.MULTILINE)
        assert {int(n) for n in line.split("|")[3].split(",")} == {
            step for step, own in by_step.items() if number in own
        }
