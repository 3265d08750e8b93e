"""The wing's README: its commands run and print what it shows, its steps ask and answer, its links lead somewhere.

Every demo checks what it claims (`ok: ...`) and ends with an error where that does not hold.
"""

import os
import re
import sys

import pytest

from ch07_sglang_radix.parallelism import demo_1_world
from tests import anatomy, warm
from tests.readme import ROOT, blocks, demos_without_a_command, run, short_names

ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
WING = "ch07_sglang_radix/parallelism"
TEXT = (ROOT / WING / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_a_command_for_every_demo():
    assert demos_without_a_command(WING) == []


@pytest.mark.parametrize(("command", "shown"), blocks(WING), ids=short_names(WING))
def test_the_command_prints_what_is_shown(command, shown):
    run(command, shown)


@pytest.mark.parametrize("demo", ["demo_2_two_stages", "demo_3_pipeline_timeline", "demo_9_all_reduce_lab"])
def test_a_demo_of_several_ranks_says_how_it_is_started(demo):
    done = warm.run([f"{WING}/{demo}.py"], ROOT, env=ENV)
    assert done.returncode == 1
    assert re.fullmatch(r"error: [^\n]*torchrun --nproc_per_node=2[^\n]*\n", done.stderr)


def test_the_picture_of_the_groups_is_of_the_table_that_is_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo", "--csv", str(tmp_path / "rows.csv")])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    demo_1_world.main()
    assert (tmp_path / "rows.csv").read_text() == (ROOT / "figures" / "world.csv").read_text()


def test_every_step_opens_with_questions_and_ends_with_their_answers():
    steps = re.split(r"^## \d+\. ", TEXT.partition("\n## Combinations")[0], flags=re.MULTILINE)[1:]
    assert len(steps) == 10
    for step in steps:
        questions = re.search(r"^You can say afterwards: \*(.*?)\*\n\n", step, re.DOTALL | re.MULTILINE).group(1)
        assert 2 <= questions.count("?") <= 4, step[:40]
        assert "<details><summary>" in step, step[:40]


def test_links_lead_somewhere_and_to_headings_that_are_there():
    anatomy.check_links(ROOT / WING / "README.md")
