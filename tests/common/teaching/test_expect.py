"""One line that says what was got and what was wanted, whatever a reader's function does."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from common.teaching.expect import ask, expect, short


@pytest.mark.parametrize(
    ("got", "want"),
    [([1, 2], (1, 2)), (np.array([1, 2]), [1, 2]), (torch.tensor([[1.5]]), [[1.5]]), (range(2), [0, 1]), (np.int64(3), 3),
     ({np.int64(1): (2,)}, {1: [2]}), (np.True_, True), (None, None)],
)  # fmt: skip
def test_the_same_in_another_form_is_the_same(got, want):
    expect("it", got, want)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (None, []),
        ([1], [1, 2]),
        (0, False),
        (1, True),
        (True, 1),
        (12.0, 12),
        (np.float64(3), 3),
        ("1", 1),
        (np.zeros(2), 0),
        ([[]], []),
        (object(), 1),
    ],
)
def test_another_value_is_named_with_what_was_wanted(got, want):
    with pytest.raises(AssertionError, match=r"^it: got .+, wanted .+$"):
        expect("it", got, want)


def test_what_a_function_raises_comes_with_its_arguments_its_line_and_why_not():
    def divide(a, b):
        return a // b

    with pytest.raises(AssertionError) as caught:
        ask(divide, 7, 0, why="3 blocks: each rank holds one head at least")
    line = divide.__code__.co_firstlineno + 1
    assert str(caught.value) == (
        "wanted 3 blocks: each rank holds one head at least, "
        f"got ZeroDivisionError (integer division or modulo by zero) in line {line} from divide(7, 0)"
    )


class Tree:
    pass


@dataclass
class Request:
    rid: int
    prompt: list[int]


def test_an_argument_is_its_numbers_if_they_are_few_else_its_shape_and_a_request_is_its_id():
    def attend(*args):
        raise ValueError("shapes do not fit\n" + "9" * 5000)

    args = (np.zeros((8, 4, 2)), torch.zeros(2, 8), np.array([5, 2]), [Request(3, [1] * 900)] * 2, Tree(), lambda: 0)
    with pytest.raises(AssertionError) as caught:
        ask(attend, *args, why="six numbers")
    said = str(caught.value)
    assert said.startswith("wanted six numbers, got ValueError (shapes do not fit 9999")
    assert said.endswith(" from attend(array [8, 4, 2], array [2, 8], [5, 2], [req 3, req 3], Tree, <lambda>)")
    assert len(said) < 500


def test_whatever_the_arguments_are_the_line_is_bounded():
    def stub(*args):
        raise KeyError(0)

    with pytest.raises(AssertionError) as caught:
        ask(stub, *[[["x" * 90] * 14] * 14] * 20, why="a dict")
    assert str(caught.value).startswith("wanted a dict, got KeyError (0) in line ")
    assert len(str(caught.value)) < 500


def test_arguments_are_shown_as_they_were_before_the_call():
    def take(numbers):
        numbers.clear()
        return numbers[0]

    with pytest.raises(AssertionError, match=r"take\(\[1, 2\]\)"):
        ask(take, [1, 2])


def test_a_stub_stays_a_stub():
    def stub():
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        ask(stub)


def test_a_long_value_and_one_that_leads_back_to_itself_are_cut():
    node = {"children": {}}
    node["children"][1] = node
    assert len(short(list(range(1000)))) < 200
    assert len(short(node)) < 400
    assert short((1, np.array([2, 3]))) == "(1, [2, 3])"


@pytest.mark.parametrize("several", [True, 2])
def test_several_values_come_as_a_list_whatever_they_came_in(several):
    for given in ([4, 5], (4, 5), iter((4, 5)), np.array([4, 5])):
        assert ask(lambda one: one, given, several=several) == [4, 5]


@pytest.mark.parametrize(
    ("given", "several", "said"),
    [(None, True, "wanted several values, got None from"), (3, True, "wanted several values, got 3 from"),
     (None, 2, "wanted 2 values, got None from"), ([1, 2, 3], 2, "wanted 2 values, got [1, 2, 3] from")],
)  # fmt: skip
def test_what_is_not_several_values_is_named(given, several, said):
    with pytest.raises(AssertionError) as caught:
        ask(lambda one: one, given, several=several)
    assert str(caught.value).startswith(said)


def test_a_generator_fails_inside_the_call():
    def generator(n):
        yield 1 // n

    with pytest.raises(
        AssertionError, match=r"^wanted a number, got ZeroDivisionError .* in line \d+ from generator\(0\)$"
    ):
        ask(generator, 0, why="a number", several=True)
