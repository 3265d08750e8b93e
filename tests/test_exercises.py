"""Every set of exercises: its solutions pass, its contracts look alike, and a fresh clone is green.

A chapter or wing has one as soon as it has exercises/check.py. Which wrong answers its checks find is tested beside the
tests of the chapter or wing, in a test_exercises.py there.
"""

import importlib

import pytest

from tests import anatomy

CHECKERS = {
    path.parents[1].relative_to(anatomy.ROOT): path for path in sorted(anatomy.ROOT.glob("ch*/**/exercises/check.py"))
}
SETS = {
    str(home): importlib.import_module(".".join([*home.parts, "exercises", "check"])).EXERCISES for home in CHECKERS
}
each_set = pytest.mark.parametrize("home", SETS)
each_exercise = pytest.mark.parametrize(("home", "number"), [(home, n) for home in SETS for n in SETS[home].numbers])


@each_exercise
def test_my_answer(home, number):
    """The reader's own: skipped until it is started."""
    said = SETS[home].outcome(number, SETS[home].module_of(number))
    if said == "not started":
        pytest.skip(said)
    assert said == "passed"


@each_exercise
def test_the_solution_passes(home, number):
    assert SETS[home].outcome(number, SETS[home].module_of(number, solutions=True)) == "passed"


@each_exercise
def test_the_anatomy_is_the_same_everywhere(home, number):
    anatomy.check_exercise(SETS[home], number, anatomy.ROOT / home)


@each_exercise
def test_who_returns_nothing_is_told_what_was_wanted(home, number):
    anatomy.check_nothing_returned(SETS[home], number)


@each_set
def test_the_table_of_the_exercises_is_what_the_files_say(home):
    anatomy.check_table(SETS[home])


@each_set
def test_the_steps_of_the_chapter_name_every_exercise(home):
    anatomy.check_steps(SETS[home], anatomy.ROOT / home)


@pytest.mark.parametrize(
    "folder", [*(f"{home}/exercises" for home in SETS), "ch06_tp_vllm/projects", "ch07_sglang_radix/projects"]
)
def test_every_link_of_exercises_and_projects_leads_somewhere(folder):
    anatomy.check_links(anatomy.ROOT / folder / "README.md")


@each_set
def test_every_assertion_of_a_check_says_what_was_got_and_what_was_wanted(home):
    anatomy.check_messages(SETS[home])


def test_every_chapter_and_wing_with_exercises_is_here():
    assert {"ch06_tp_vllm", "ch07_sglang_radix"} <= {home.split("/")[0] for home in SETS}
    assert len(SETS) >= 4
