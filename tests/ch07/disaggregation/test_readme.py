"""The wing's README: its commands run and print what it shows, its links lead somewhere, its numbers are the CSV's."""

import csv
import re

import pytest

from tests import anatomy
from tests.readme import ROOT, blocks, demos_without_a_command, run, short_names

WING = "ch07_sglang_radix/disaggregation"
TEXT = (ROOT / WING / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_a_command_for_every_demo():
    assert demos_without_a_command(WING) == []


@pytest.mark.parametrize(("command", "shown"), blocks(WING), ids=short_names(WING))
def test_the_command_prints_what_is_shown(command, shown):
    run(command, shown)


def test_every_step_opens_with_questions_and_ends_with_their_answers():
    steps = re.split(r"^## \d+\. ", TEXT, flags=re.MULTILINE)[1:]
    assert len(steps) == 7
    for step in steps:
        questions = re.search(r"^> (.*?)\n\n", step, re.DOTALL | re.MULTILINE).group(1)
        assert 2 <= questions.count("?") <= 4, step[:40]
        assert "<details><summary>Answers</summary>" in step, step[:40]


def test_links_lead_somewhere_and_to_headings_that_are_there():
    anatomy.check_links(ROOT / WING / "README.md")


@pytest.mark.parametrize(
    ("number", "csv_file", "digits", "last"),
    [(0, "disaggregation.csv", 1, ()), (1, "disaggregation_gpu.csv", 2, ("ttft_p99_ms",))],
)
def test_the_measured_tables_are_the_csv_s(number, csv_file, digits, last):
    with (ROOT / "figures" / csv_file).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    part = re.findall(r"<!-- measured -->(.*?)<!-- /measured -->", TEXT, re.DOTALL)[number]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")]
    names = ("contender", "prompt_tokens", "itl_median_ms", "itl_p99_ms", "itl_longest_ms", "ttft_median_ms", *last)
    wanted = [
        [row[name] if i < 2 else f"{float(row[name]):.{digits}f}" for i, name in enumerate(names)] for row in rows
    ]
    assert [
        [cells[0], cells[1].replace(",", ""), cells[2], cells[3].split()[0], *cells[4:]] for cells in shown[1:]
    ] == wanted
    assert all(row["date"] in part and row["device"].split()[-1] in part for row in rows)


def test_the_way_in_is_shown_from_above():
    for readme in ("README.md", "ch07_sglang_radix/README.md"):
        assert "disaggregation/README.md)" in (ROOT / readme).read_text(encoding="utf-8"), readme
