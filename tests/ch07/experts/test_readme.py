"""The wing's README: its commands run and print what it shows, its links lead somewhere."""

import csv
import re

import pytest

from ch07_sglang_radix.experts import demo_8_cache_bytes
from tests import anatomy
from tests.readme import ROOT, blocks, demos_without_a_command, run, short_names

WING = "ch07_sglang_radix/experts"
TEXT = (ROOT / WING / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_a_command_for_every_demo():
    assert demos_without_a_command(WING) == []


@pytest.mark.parametrize(("command", "shown"), blocks(WING), ids=short_names(WING))
def test_the_command_prints_what_is_shown(command, shown):
    run(command, shown)


def test_every_step_opens_with_questions_and_ends_with_their_answers():
    steps = re.split(r"^## \d+\. ", TEXT, flags=re.MULTILINE)[1:]
    assert len(steps) == 8
    for step in filter(lambda step: "```bash" in step, steps):
        said = re.search(r"^You can say afterwards: (.*?)\n\n", step, re.DOTALL | re.MULTILINE)
        assert said, step[:40]
        assert 2 <= said.group(1).count("?") <= 4, step[:40]
        assert "<details><summary>Answers</summary>" in step, step[:40]


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "figures" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_tables_of_the_three_forms_are_what_was_measured():
    for row in rows_of("experts_forms"):
        if row["form"] == "loop":
            loop = row["ms"]
            continue
        cells = (
            row["tokens"],
            f"{float(row['experts read']):.0f}",
            f"{float(loop):.2f}",
            f"{float(row['ms']):.2f}",
            row["of loop"],
        )
        assert f"| {' | '.join(cells)} |" in TEXT
    for row in rows_of("experts_kernels"):
        loop, grouped, triton = (float(row[f"{form} us"]) for form in ("loop", "grouped", "triton"))
        times = f"{loop:,.0f}", f"{grouped:,.0f}", f"{triton:,.0f}", f"{loop / grouped:.0f}", f"{loop / triton:.0f}"
        cells = f"{int(row['tokens']):,}", row["experts read"], *times
        assert (f"| {' | '.join(cells)} |" in TEXT) == (row["layer"] == "Qwen3-30B-A3B")


def test_the_picture_of_hot_experts_is_of_the_table_that_is_shown():
    shown = re.findall(r"^ +(\d) +(\d) +((?:\d+ +){4})0\.\d\d +((?:\d+ +){4})0\.\d\d  +\[\[", TEXT, re.MULTILINE)
    assert len(shown) == 8
    told = {}
    for row in rows_of("hot_experts"):
        told.setdefault((row["copies"], row["layer"], row["placement"]), []).append(row["rows"])
    for copies, layer, plain, better in shown:
        assert told[copies, layer, "by number"] == plain.split()
        assert told[copies, layer, "by load"] == better.split()


def test_the_picture_of_bytes_is_of_the_pages_that_are_made():
    rows = demo_8_cache_bytes.rows_of(demo_8_cache_bytes.models())
    assert rows_of("cache_bytes") == [{key: str(value) for key, value in row.items()} for row in rows]


def test_links_lead_somewhere_and_to_headings_that_are_there():
    anatomy.check_links(ROOT / WING / "README.md")
