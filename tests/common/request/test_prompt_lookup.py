import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.request.prompt_lookup import continuation


@pytest.mark.parametrize(
    ("ids", "count", "longest", "found"),
    [
        ([1, 2, 3, 4, 9, 2, 3], 4, 3, [4, 9, 2, 3]),
        ([1, 2, 3, 4, 9, 2, 3], 2, 3, [4, 9]),
        ([7, 3, 5, 2, 3, 6, 1, 3], 1, 3, [6]),  # of two places the newest
        ([2, 3, 6, 9, 3, 8, 2, 3], 1, 3, [6]),  # but a longer match, if it lies further back
        ([2, 3, 6, 9, 3, 8, 2, 3], 1, 1, [8]),
        ([5, 5, 5], 4, 3, [5]),  # what follows the match may reach into the match itself, and ends with the text
        ([1, 2, 3], 4, 3, []),
        ([4], 4, 3, []),
    ],
)
def test_what_followed_the_last_tokens_when_they_last_occurred(ids, count, longest, found):
    assert continuation(np.array(ids), count, longest, 1).tolist() == found


def test_a_match_that_is_too_short_is_none():
    assert continuation(np.array([3, 8, 9, 3]), 2, 3, 2).tolist() == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
def test_it_is_what_a_search_from_the_back_finds(ids, count, longest, shortest):
    want = []
    for length in range(min(longest, len(ids) - 1), shortest - 1, -1):
        places = [i for i in range(len(ids) - length) if ids[i : i + length] == ids[-length:]]
        if places:
            want = ids[places[-1] + length :][:count]
            break
    assert continuation(np.array(ids), count, longest, shortest).tolist() == want
