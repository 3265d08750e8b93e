"""The checks of the wing's exercises: which wrong answers they find. Those of an exercise are in wrong_answers/, in a
file of its name.
"""

from importlib import import_module
from types import SimpleNamespace

import pytest

from ch07_sglang_radix.quantization.exercises.check import EXERCISES

module_of, outcome = EXERCISES.module_of, EXERCISES.outcome


def wrong_answers(number):
    return import_module(f"tests.ch07.quantization.wrong_answers.{EXERCISES.name_of(number)}").WRONG


WRONG = [(number, instead, words) for number in EXERCISES.numbers for instead, words in wrong_answers(number)]


@pytest.mark.parametrize(("number", "instead", "words"), WRONG)
def test_a_plausible_wrong_answer_is_caught(number, instead, words):
    right = vars(module_of(number, solutions=True))
    said = outcome(number, SimpleNamespace(**{name: of for name, of in right.items() if callable(of)} | instead))
    assert said.startswith("not yet: ")
    assert words in said
    assert "wanted " in said
    assert "got " in said
    assert "\n" not in said


def test_every_exercise_has_wrong_answers_that_are_caught():
    assert all(len(wrong_answers(n)) >= 5 for n in EXERCISES.numbers)
