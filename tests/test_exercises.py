"""Every set of exercises: its solutions pass, its contracts look alike, and a fresh clone is green.

A chapter or wing has one as soon as it has exercises/check.py. Which wrong answers its checks find is told beside the tests of
the chapter or wing: in wrong_answers/, a file an exercise, or by a test_exercises.py of its own.
"""

import importlib
from types import SimpleNamespace

import pytest

from tests import anatomy

CHECKERS = {
    path.parents[1].relative_to(anatomy.ROOT): path for path in sorted(anatomy.ROOT.glob("ch*/**/exercises/check.py"))
}
SETS = {
    str(home): importlib.import_module(".".join([*home.parts, "exercises", "check"])).EXERCISES for home in CHECKERS
}
PLACES = {home: "tests." + home.replace("ch07_sglang_radix/", "ch07.") + ".wrong_answers" for home in SETS}
WRONG = {
    home: {
        number: importlib.import_module(f"{place}.{SETS[home].name_of(number)}").WRONG for number in SETS[home].numbers
    }
    for home, place in PLACES.items()
    if anatomy.ROOT.joinpath(*place.split(".")).is_dir()
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


@pytest.mark.parametrize(
    ("home", "number", "instead", "words"),
    [(home, number, *one) for home, of in WRONG.items() for number, some in of.items() for one in some],
)
def test_a_plausible_wrong_answer_is_caught(home, number, instead, words):
    right = vars(SETS[home].module_of(number, solutions=True))
    answer = {name: of for name, of in right.items() if callable(of)} | instead
    said = SETS[home].outcome(number, SimpleNamespace(**answer))
    assert said.startswith("not yet: ")
    assert words in said
    assert "wanted " in said
    assert "got " in said
    assert "\n" not in said


@pytest.mark.parametrize("home", WRONG)
def test_every_exercise_has_wrong_answers_that_are_caught(home):
    assert all(len(some) >= 5 for some in WRONG[home].values())


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
    wings = {path.parent.name for path in anatomy.ROOT.glob("tests/ch07/*/wrong_answers")}
    assert wings == {home.split("/")[1] for home in WRONG}
