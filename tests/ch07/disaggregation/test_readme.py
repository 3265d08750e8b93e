"""The wing's README: its commands run and print what it shows, its links lead somewhere, its numbers are the CSV's."""

import csv
import re

import pytest

from ch07_sglang_radix.benchmarks.disaggregation_report import CSVS, readme_table
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


@pytest.mark.parametrize("name", CSVS)
def test_the_measured_tables_are_the_csv_s(name):
    with (ROOT / "figures" / name).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    part = next(one for one in re.findall(r"<!-- measured -->(.*?)<!-- /measured -->", TEXT, re.DOTALL) if name in one)
    assert f"<!-- {name} -->\n\n{readme_table(rows)}\n\n<!-- /{name} -->" in part
    assert all(row["date"] in part and row["device"].split()[-1] in part for row in rows)


def test_the_way_in_is_shown_from_above():
    for readme in ("README.md", "ch07_sglang_radix/README.md"):
        assert "disaggregation/README.md)" in (ROOT / readme).read_text(encoding="utf-8"), readme
