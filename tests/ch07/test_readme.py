"""Every command of the chapter's README runs, and prints what the README shows."""

import pytest

from tests.readme import blocks, demos_without_a_command, links, run, short_names

CHAPTER = "ch07_sglang_radix"


def test_the_readme_has_a_command_for_every_demo():
    assert demos_without_a_command(CHAPTER) == []


def test_the_readme_leads_to_exercises_and_projects():
    assert {"exercises/README.md", "projects/README.md"} <= links(CHAPTER)


@pytest.mark.parametrize(("command", "shown"), blocks(CHAPTER), ids=short_names(CHAPTER))
def test_the_command_prints_what_is_shown(command, shown):
    run(command, shown)
