"""Every command of the chapter's READMEs runs, and prints what the README shows."""

import re

import pytest

from tests.readme import ROOT, blocks, demos_without_a_command, links, run, short_names

CHAPTER = "ch06_tp_vllm"


def test_the_readme_has_a_command_for_every_demo():
    assert demos_without_a_command(CHAPTER) == []


def test_the_readme_leads_to_exercises_and_projects():
    assert {"exercises/README.md", "projects/README.md"} <= links(CHAPTER)


@pytest.mark.parametrize(("command", "shown"), blocks(CHAPTER), ids=short_names(CHAPTER))
def test_the_command_prints_what_is_shown(command, shown):
    run(command, shown)


def test_the_python_of_the_readme_runs_on_two_ranks(tmp_path):
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / CHAPTER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    run(["torchrun", "--nproc_per_node=2", str(tmp_path / "snippet.py")], "")


@pytest.mark.parametrize(("at", "exercise"), [(0, "ex1_row_parallel_bias"), (1, "ex5_prefix_hash")])
def test_a_command_of_the_exercises_runs(at, exercise):
    text = (ROOT / CHAPTER / "exercises" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(python .+?)(?: +#.*)?$", text, re.MULTILINE)
    assert len(commands) == 2
    run(commands[at], exercise)
