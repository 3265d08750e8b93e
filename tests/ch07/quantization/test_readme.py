"""The wing's README: its commands run and print what it shows, its links lead somewhere, its numbers are the CSVs'."""

import csv
import re

import pytest

from tests import anatomy
from tests.readme import ROOT, blocks, demos_without_a_command, run, short_names

WING = "ch07_sglang_radix/quantization"
TEXT = (ROOT / WING / "README.md").read_text(encoding="utf-8")


def rows_of(name):
    with (ROOT / "figures" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells_of(block):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().splitlines()[2:]]


def test_the_readme_has_a_command_for_every_demo():
    assert demos_without_a_command(WING) == []


@pytest.mark.timeout(500)  # demo 4 makes thirteen checkpoints and asks each of them
@pytest.mark.parametrize(("command", "shown"), blocks(WING), ids=short_names(WING))
def test_the_command_prints_what_is_shown(command, shown):
    run(command, shown)


def test_every_step_opens_with_questions_and_ends_with_their_answers():
    steps = re.split(r"^## \d+\. ", TEXT, flags=re.MULTILINE)[1:]
    assert len(steps) == 6
    for step in steps:
        said = re.search(r"^You can say afterwards: (.*?)\n\n", step, re.DOTALL | re.MULTILINE)
        assert said, step[:40]
        assert 2 <= said.group(1).count("?") <= 4, step[:40]
        assert "<details><summary>Answers</summary>" in step, step[:40]


def test_links_lead_somewhere_and_to_headings_that_are_there():
    anatomy.check_links(ROOT / WING / "README.md")


def test_what_weights_of_fewer_bytes_save_is_what_was_measured():
    rows = rows_of("bench_quantized_gpu.csv")
    plain, wanted = rows[0], []
    for row in rows:
        time, rate = float(row["D ms a token"]), float(row["A64 tokens/s"])
        shares = [f"{time / float(plain['D ms a token']):.2f}", f"{rate / float(plain['A64 tokens/s']):.2f}"]
        shares = ["", ""] if row is plain else shares
        bytes_of_it = [f"{float(row['MB a token']):,.0f}", f"{float(row['floor ms']):.2f}"]
        wanted.append([row["form"], *bytes_of_it, f"{time:.2f}", shares[0], f"{rate:,.0f}", shares[1]])
    shown = cells_of(re.search("<!-- weights -->(.*?)<!-- /weights -->", TEXT, re.DOTALL).group(1))
    assert [[*cells[:5], *cells[6:8]] for cells in shown] == wanted
    assert all(row["date"] in TEXT and row["device"] == "NVIDIA H200" for row in rows)
    for name, form in (("FP8", "fp8 channel"), ("AWQ", "awq"), ("GPTQ", "gptq")):
        (row,) = (row for row in rows if row["form"] == form)
        d = float(plain["D ms a token"]) / float(row["D ms a token"])
        a64 = float(row["A64 tokens/s"]) / float(plain["A64 tokens/s"])
        assert re.search(rf"^\| {name} \|.*D {d:.2f}x, A64 {a64:.2f}x \|$", TEXT, re.MULTILINE), name


def test_what_codes_are_worth_on_a_cpu_is_what_was_measured():
    rows = {(row["model"], row["form"]): row for row in rows_of("bench_quantized_cpu.csv")}
    shown = cells_of(re.search(r"<!-- on a CPU -->(.*?)<!-- /on a CPU -->", TEXT, re.DOTALL).group(1))
    assert len(rows) == 2 * len(shown)
    for form, *cells in shown:
        small, large = rows["bundled", form], rows["Qwen2.5-0.5B", form]
        assert cells == [
            f"{float(small['MB']):.1f}", f"{float(small['tokens/s of 1']):.0f}", f"{float(small['tokens/s of 8']):,.0f}",
            f"{float(large['MB']):,.0f}", f"{float(large['tokens/s of 1']):.1f}", f"{float(large['tokens/s of 8']):.1f}",
        ]  # fmt: skip


def test_what_pages_of_fewer_bytes_hold_is_what_was_measured():
    rows = rows_of("bench_gpu_kv.csv")
    of = {(row["kv_cache_dtype"], row["metric"]): float(row["value"]) for row in rows}
    best = {name: max(of[name, f"A tokens/s run {run}"] for run in (1, 2)) for name, _ in of}
    for name, rate in best.items():
        share = rate / best["bfloat16"]
        shown = "1" if name == "bfloat16" else f"{share:.2f}"
        line = f"| {name} | {of[name, 'tokens in the pool']:,.0f} | {rate:,.0f} | {shown} | {of[name, 'D ms per token']:.3f} |"
        assert line in TEXT, line


def test_what_a_tier_saves_is_what_was_measured():
    names = {"computed": "computed", "device": "from the device", "host": "from the host", "disk": "from files"}
    for row in rows_of("tiers_cuda.csv"):
        line = f"| {names[row['first token from']]} | {row['ms']} | {float(row['of computed']):.2f} |"
        assert line in TEXT, line


def test_what_a_load_costs_others_is_what_was_measured():
    names = {"nobody": "nobody comes", "from host": "from the host", "from files": "from files", "to files": "to files"}
    for row in rows_of("tiers_beside_cuda.csv"):
        cells = [
            names[row["beside"]],
            row["lasts ms"],
            row["ms a step"],
            f"{float(row['of nobody']):.2f}",
            row["longest ms"],
        ]
        assert f"| {' | '.join(cells)} |" in TEXT, cells


def test_the_way_in_is_shown_from_above():
    for readme in ("README.md", "ch07_sglang_radix/README.md"):
        assert "quantization/README.md)" in (ROOT / readme).read_text(encoding="utf-8"), readme
