"""Names of pages."""

import numpy as np

from common.storage.page_keys import as_words, chain, first_key, from_words


def test_a_page_is_named_by_all_that_comes_before_it():
    one, other = chain(first_key("a"), np.array([[1, 2], [3, 4]])), chain(first_key("a"), np.array([[9, 2], [3, 4]]))
    assert len({*one, *other}) == 4
    assert chain(one[0], np.array([[3, 4]])) == one[1:]
    assert chain(first_key("b"), np.array([[1, 2]])) != one[:1]
    assert chain(first_key("a"), np.array([[1, 2, 3, 4]]))[0] not in one, "another page size"


def test_names_are_the_same_on_every_machine():
    big = chain(first_key("base"), np.array([[1, 2]], dtype=">i8"))
    assert big == chain(first_key("base"), np.array([[1, 2]], dtype="<i8"))


def test_names_travel_as_words():
    keys = chain(first_key("a"), np.arange(10).reshape(5, 2))
    words = as_words(keys)
    assert len(words) == 20
    assert from_words(words) == keys
