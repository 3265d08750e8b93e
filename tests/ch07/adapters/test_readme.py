"""The wing's README: its commands run and print what it shows, its links lead somewhere."""

import csv
import re

import pytest

from tests import anatomy
from tests.readme import ROOT, blocks, demos_without_a_command, run, short_names

WING = "ch07_sglang_radix/adapters"
TEXT = (ROOT / WING / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_a_command_for_every_demo():
    assert demos_without_a_command(WING) == []


@pytest.mark.parametrize(("command", "shown"), blocks(WING), ids=short_names(WING))
def test_the_command_prints_what_is_shown(command, shown):
    run(command, shown)


def test_every_step_opens_with_questions_and_ends_with_their_answers():
    steps = re.split(r"^## \d+\. ", TEXT, flags=re.MULTILINE)[1:]
    assert len(steps) == 5
    for step in filter(lambda step: "```bash" in step, steps):
        said = re.search(r"^You can say afterwards: (.*?)\n\n", step, re.DOTALL | re.MULTILINE)
        assert said, step[:40]
        assert 2 <= said.group(1).count("?") <= 4, step[:40]
        assert "<details><summary>Answers</summary>" in step, step[:40]


def test_links_lead_somewhere_and_to_headings_that_are_there():
    anatomy.check_links(ROOT / WING / "README.md")


def test_what_adapters_cost_is_what_was_measured():
    with (ROOT / "figures" / "lora_steps_cpu.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ["no slots", "nobody", "one", "mixed", "half"]
    assert {row["model"] for row in rows} == {"Qwen2.5-0.5B"}
    for sequences in ("1", "8", "64"):
        of = {row["adapters"]: row for row in rows if row["sequences"] == sequences}
        cells = [f"{of[name]['tokens_per_s']} ({100 * float(of[name]['share_of_no_slots']):.0f} %)" for name in names]
        cells[0] = of["no slots"]["tokens_per_s"]
        assert f"| {sequences} | {' | '.join(cells)} |" in TEXT
    assert all(f"torch {row['torch'].split('+')[0]}, {row['date']}" in TEXT for row in rows)
