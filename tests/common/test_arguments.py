"""Names that are not here: what asks for nothing passes, everything else gets one line with a way out."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from common.arguments import refuse_unknown, says_names, without_idle

ELSEWHERE = {"pipes": "there are none; leave it out", "wings": "walk"}
IDLE = {"pipes": 1, "wings": None}


@says_names("argument", ELSEWHERE, IDLE)
@dataclass(frozen=True)
class Args:
    legs: int = 2
    length: int = 0

    @says_names("argument", ELSEWHERE, IDLE)
    def walk(self, steps: int, *, fast: bool = False) -> int:
        """So many."""
        return steps * (1 + fast)


def test_unknown_names_are_shown_short():
    with pytest.raises(ValueError, match=r"^unknown key 'kkkk.*; known: a, b$") as caught:
        refuse_unknown("key", ["k" * 5000], ["a", "b"])
    assert len(str(caught.value)) < 200


def test_of_many_names_those_that_are_like_it_are_told_and_else_where_they_are():
    many = [f"name_{i}" for i in range(30)] + ["temperature"]
    with pytest.raises(ValueError, match=r"^unknown key temperture; did you mean temperature\?$"):
        refuse_unknown("key", ["temperture"], many, where="help(Keys) has them all")
    with pytest.raises(ValueError, match=r"^unknown key zzz; help\(Keys\) has them all$"):
        refuse_unknown("key", ["zzz"], many, where="help(Keys) has them all")
    with pytest.raises(ValueError, match=r"^unknown key zzz; there are 31, and none is like it$"):
        refuse_unknown("key", ["zzz"], many)


def test_a_name_that_is_known_to_be_elsewhere_is_not_called_unknown_and_lends_its_hint_to_nobody():
    with pytest.raises(ValueError, match=r"^key wings is not here: walk$"):
        refuse_unknown("key", ["wings"], ["a"], ELSEWHERE)
    with pytest.raises(ValueError, match=r"^key wings is not here: walk; unknown key aaa; known: a$"):
        refuse_unknown("key", ["wings", "aaa", "a"], ["a"], ELSEWHERE)
    with pytest.raises(ValueError, match=r"^key pipes is not here: there .* out; key wings is not here: walk$"):
        refuse_unknown("key", ["wings", "pipes"], ["a"], ELSEWHERE)


@pytest.mark.parametrize("given", [{"pipes": 1}, {"pipes": None}, {"wings": None}, {"pipes": 1.0, "wings": None}])
def test_what_asks_for_nothing_is_left_out(given):
    assert without_idle(given | {"legs": 4}, IDLE) == {"legs": 4}
    assert Args(legs=4, **given) == Args(4)
    assert Args().walk(3, fast=True, **given) == 6


@pytest.mark.parametrize("value", [2, True, "1", math.nan, np.array([1, 1]), [1], 0])
def test_whatever_asks_for_something_is_refused(value):
    assert list(without_idle({"pipes": value}, IDLE)) == ["pipes"]
    for call in (Args, lambda **given: Args().walk(1, **given)):
        with pytest.raises(ValueError, match=r"^argument pipes is not here: there are none; leave it out$"):
            call(pipes=value)


def test_a_constructor_and_a_method_keep_their_names_and_refuse_others():
    assert Args.__init__.__wrapped__
    assert Args.walk.__doc__ == "So many."
    with pytest.raises(ValueError, match=r"^unknown argument lenght; known: legs, length$"):
        Args(lenght=3)
    with pytest.raises(ValueError, match=r"^unknown argument step; known: fast, steps$"):
        Args().walk(1, step=1)
    with pytest.raises(TypeError, match="steps"):  # who forgets one hears Python's own words
        Args().walk()
