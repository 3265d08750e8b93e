"""One line that says what was got and what was wanted, whatever a reader's function does."""

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
        f"got ZeroDivisionError (integer division or modulo by zero) from divide(7, 0) in line {line}, "
        "wanted 3 blocks: each rank holds one head at least"
    )


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
