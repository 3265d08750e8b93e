"""The wing's README: its commands run and print what it shows, its links lead somewhere."""

import re

import pytest

from tests import anatomy
from tests.readme import ROOT, blocks, demos_without_a_command, run, short_names

WING = "ch07_sglang_radix/images"
TEXT = (ROOT / WING / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_a_command_for_every_demo():
    assert demos_without_a_command(WING) == []


@pytest.mark.parametrize(("command", "shown"), blocks(WING), ids=short_names(WING))
def test_the_command_prints_what_is_shown(command, shown):
    run(command, shown)


def test_every_step_opens_with_questions_and_ends_with_their_answers():
    steps = re.split(r"^## \d+\. ", TEXT, flags=re.MULTILINE)[1:]
    assert len(steps) == 4
    for step in filter(lambda step: "```bash" in step, steps):
        said = re.search(r"^You can say afterwards: (.*?)\n\n", step, re.DOTALL | re.MULTILINE)
        assert said, step[:40]
        assert 2 <= said.group(1).count("?") <= 4, step[:40]
        assert "<details><summary>Answers</summary>" in step, step[:40]


def test_links_lead_somewhere_and_to_headings_that_are_there():
    anatomy.check_links(ROOT / WING / "README.md")
