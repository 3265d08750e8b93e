"""The README's tables of two and four cards: measurements are those of the CSV files, bounds are the planner's of today."""

import csv
import re

import torch

from ch07_sglang_radix.benchmarks import bench_layouts
from common.distributed.layout import Layout
from common.distributed.machines import Machine
from common.models.published_configs import model_shape
from common.planner.bounds import Bound, bound
from common.planner.choice import room_of
from common.planner.plan import Load, Way
from common.quantization.method import Hardware
from tests.readme import ROOT

TEXT = (ROOT / "ch07_sglang_radix/parallelism/README.md").read_text(encoding="utf-8")
FILES = {"one card": "", "tp = 2": "_tp2", "pp = 2": "_pp2", "dp = 2": "_dp2"}
SEVEN = "Qwen2.5-7B"
LAYOUTS = {
    "one card": Layout(), "tp = 2": Layout(2), "pp = 2": Layout(1, 2), "dp = 2": Layout(1, 1, 2), "cp = 2": Layout(2, cp=2),
}  # fmt: skip
LOADS = {
    "D": (384, 1),
    "A64": (850, 64),
    "C": (2304, 256),
    "32k": (32_000, 1),
}  # context, requests: the planner's picture of each workload


def measured(row: str) -> list[str]:
    """ms a token of D, tokens/s of A64 and of C cold, s to the first token of 32k: the best that the file has of each."""
    with (ROOT / f"figures/layouts_gpu{FILES[row]}.csv").open(encoding="utf-8") as file:
        rows = [(one["workload"], float(one["value"])) for one in csv.DictReader(file) if one["metric"] != "hit rate"]
    of = {name: [value for workload, value in rows if workload.startswith(name)] for name in ("D", "C cold", "32k")}
    a64 = [value for workload, value in rows if workload == "A64"]
    return [f"{of['D'][0]:.2f}", f"{max(a64):,.0f}", f"{of['C cold'][0]:,.0f}", f"{min(of['32k']):.2f}"]


def long_prompt() -> str:
    """s to the first token over two parts of a context: the best that the file has."""
    with (ROOT / "figures/bench_long_prompt.csv").open(encoding="utf-8") as file:
        return f"{min(float(one['best_s']) for one in csv.DictReader(file) if one['cp'] == '2'):.2f}"


def bounds(row: str) -> list[str]:
    machine, config, layout = Machine.of_gpus("H100"), model_shape("Qwen2.5-7B"), LAYOUTS[row]
    hardware = Hardware("cuda", machine.capability)

    def of(context: int, batch: int) -> Bound:
        load = Load(context, batch, torch.bfloat16, torch.bfloat16, 16, 8192, hardware)
        return bound(config, Way(layout), load, machine, room_of(machine, layout.world, None, 0.9))

    d, a64, c, long = (of(*load) for load in LOADS.values())
    return [f"{1e3 * d.seconds:.2f}", f"{a64.tokens_per_s:,.0f}", f"{c.tokens_per_s:,.0f}", f"{long.first_token_s:.2f}"]


def table_under(heading: str) -> dict[str, list[str]]:
    """The first table of this part of the README, by row: its cells."""
    part = TEXT.partition(f"## {heading}")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([a-z0-9 =,]+) \|(.*)\|$", part, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def refuse_another_winner(told: dict[str, list[str]], column: int, best) -> None:
    """What is printed bold has won."""
    numbers = {name: float(cells[column].strip("*").replace(",", "")) for name, cells in told.items() if cells[column]}
    bold = [name for name, cells in told.items() if "*" in cells[column]]
    assert {numbers[name] for name in bold} == {best(numbers.values())}


def test_the_table_of_two_cards_is_the_files_and_the_planner_s():
    told = table_under("Measured on two cards")
    assert set(told) == set(LAYOUTS)
    for name in LAYOUTS:
        cells = [cell.strip("*") for cell in told[name]]
        assert cells[1::2] == bounds(name), name
        assert cells[::2] == (measured(name) if name in FILES else ["", "", "", long_prompt()]), name
    for column, best in ((0, min), (2, max), (4, max), (6, min)):
        refuse_another_winner(told, column, best)


def on_four(model: str = "") -> list[dict[str, str]]:
    """Rows of four cards, of one model or of all others."""
    with (ROOT / "figures/bench_layouts.csv").open(encoding="utf-8") as file:
        rows = [one for one in csv.DictReader(file) if one["gpus"] == "4"]
    return [one for one in rows if (one["model"] == SEVEN) == (model == SEVEN)]


def test_the_table_of_four_cards_is_the_file_s():
    rows = [one for one in on_four(SEVEN) if "H200" in one["device"]]
    of = {(one["layout"], one["workload"]): float(one["value"]) for one in rows}
    told = {
        name: cells for name, cells in table_under("Measured on four cards").items() if not name.startswith("the same")
    }
    assert {name.replace(" = ", "") for name in told} == {layout for layout, _ in of}
    for name, cells in told.items():
        layout = name.replace(" = ", "")
        d, a64, c, first = (of[layout, workload] for workload in ("D", "A64", "C warm", "32k"))
        assert [cell.strip("*") for cell in cells] == [f"{d:.2f}", f"{a64:,.0f}", f"{c:,.0f}", f"{first:.2f}"], name
    for column, best in enumerate((min, max, max, min)):
        refuse_another_winner(told, column, best)


def test_what_a_copy_more_brings_is_what_was_measured():
    a64 = {
        one["layout"]: float(one["value"])
        for one in on_four(SEVEN)
        if "H200" in one["device"] and one["workload"] == "A64"
    }
    with (ROOT / "figures/bench_gpu_large.csv").open(encoding="utf-8") as file:
        one_card = [one for one in csv.DictReader(file) if one["ranks"] == "1"]
    assert {one["device"] for one in one_card} == {"NVIDIA H200"}
    alone = max(float(one["value"]) for one in one_card if one["workload"] == "A64")
    assert f"make {a64['dp4'] / alone:.2f} times the tokens of one" in TEXT


MODELS = {
    "Qwen2.5-32B, tp = 4": ("Qwen2.5-32B", "tp4"),
    "Qwen2.5-32B, tp = 2 x pp = 2": ("Qwen2.5-32B", "tp2 x pp2"),
    "Qwen2.5-32B, tp = 2 x dp = 2": ("Qwen2.5-32B", "tp2 x dp2"),
    "Qwen2.5-32B, dp = 4": ("Qwen2.5-32B", "dp4"),
    "Qwen2.5-32B, tp = 4, cp = 4": ("Qwen2.5-32B", "tp4, cp4"),
    "Qwen3-30B-A3B, 24 layers, tp = 4": ("Qwen3-30B-A3B, 24 layers", "tp4"),
    "the same, ep = 4": ("Qwen3-30B-A3B, 24 layers", "tp4, ep4"),
    "the same, attention data parallel 4, ep = 4": ("Qwen3-30B-A3B, 24 layers", "tp4, attn-dp4, ep4"),
}  # the row -> model and layout


def test_the_table_of_a_large_model_and_of_one_with_experts_is_the_file_s():
    of = {
        (one["model"], one["layout"], one["workload"]): float(one["value"])
        for one in on_four()
        if "H200" in one["device"]
    }
    told = {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| (Qwen[^|]+, [^|]+|the same, [^|]+) \|(.*)\|$", TEXT, re.MULTILINE)
    }
    assert set(told) == set(MODELS)
    assert set(MODELS.values()) == {key[:2] for key in of}
    for name, cells in told.items():
        d, a64, c, first = (of[(*MODELS[name], workload)] for workload in ("D", "A64", "C warm", "32k"))
        want = [f"{d:.2f}", f"{a64:,.0f}", f"{c:,.0f}", f"{first:.2f}"]
        assert [cell.strip("*") for cell in cells] == want, name
    for model in {model for model, _ in MODELS.values()}:
        its = {name: cells for name, cells in told.items() if MODELS[name][0] == model}
        for column, best in enumerate((min, max, max, min)):
            refuse_another_winner(its, column, best)


def test_what_the_text_says_of_other_cards_is_the_file_s():
    with (ROOT / "figures/bench_layouts.csv").open(encoding="utf-8") as file:
        h100 = [one for one in csv.DictReader(file) if "H100" in one["device"]]
    of = {(one["model"], one["gpus"], one["layout"], one["workload"]): float(one["value"]) for one in h100}
    large, experts = ("Qwen2.5-32B", "4", "tp4"), ("Qwen3-30B-A3B, 24 layers", "2")
    assert f"D {of[(*large, 'D')]:.2f} ms and the long prompt in {of[(*large, '32k')]:.2f} s" in TEXT
    tp, ep = ([of[(*experts, layout, workload)] for workload in ("D", "A64", "32k")] for layout in ("tp2", "tp2, ep2"))
    assert f"D {tp[0]:.2f} ms under tp = 2 and {ep[0]:.2f} with ep = 2 (A64 {tp[1]:,.0f} and {ep[1]:,.0f}" in TEXT
    assert f"long prompt {tp[2]:.2f} s both" in TEXT
    assert f"{ep[2]:.2f}" == f"{tp[2]:.2f}"


def test_the_winners_that_the_planner_names_are_as_many_as_it_says(capsys):
    bench_layouts.planned(ROOT / "figures/bench_layouts.csv")
    right, rows, ties = re.search(
        r"names the winner in (\d+) of (\d+) rows, (\d+) ties?$", capsys.readouterr().out.strip()
    ).groups()
    assert f"it names the winner in {right} of {rows} rows, and {ties} are ties" in TEXT


def test_the_messages_of_one_request_are_the_planner_s():
    (row,) = (row for row in bench_layouts.ROWS if row.workload == "D")
    model = "Qwen3-30B-A3B, 24 layers"
    least = bench_layouts.bound_of(model, "tp4", row, "H200")
    messages, whole = (f"{1e3 * seconds:.2f}" for seconds in (least.parts["messages"], least.seconds))
    assert f"{messages} of {whole} ms are messages" in TEXT
