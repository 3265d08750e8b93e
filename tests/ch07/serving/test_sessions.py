"""A session is a tree of token ids."""

import pytest

from ch07_sglang_radix.serving.io_struct import RequestError, SessionParams
from ch07_sglang_radix.serving.sessions import Node, Sessions

BOS = 0


@pytest.fixture
def sessions():
    made = Sessions()
    made.open("s")
    return made


def ask(sessions, name, new_ids, *, answer=(), finished=True, **params):
    """A request of session "s"; returns its prompt and whom it ended."""
    found = sessions.continued(SessionParams("s", **params), list(new_ids), BOS)
    sessions.add(found, Node(name, found.prompt_ids, list(answer), finished))
    return found.prompt_ids, set(found.ended)


def test_a_request_goes_on_where_the_earlier_one_ended(sessions):
    ask(sessions, "a", [1, 2], answer=[3])
    assert ask(sessions, "b", [4], answer=[5], rid="a") == ([1, 2, 3, 4], set())
    assert ask(sessions, "c", [6], rid="b") == ([1, 2, 3, 4, 5, 6], set())
    assert ask(sessions, "d", [7], rid="a") == ([1, 2, 3, 7], set()), "a second branch"
    assert ask(sessions, "e", [8]) == ([8], set()), "without rid it begins anew"


def test_offset_and_drop_previous_output_cut_the_context(sessions):
    ask(sessions, "a", [1, 2], answer=[3, 4])
    assert ask(sessions, "b", [9], rid="a", offset=3)[0] == [1, 2, 3, 9]
    assert ask(sessions, "c", [9], rid="a", drop_previous_output=True)[0] == [1, 2, 9]
    assert ask(sessions, "d", [9], rid="a", offset=1, drop_previous_output=True)[0] == [1, 9]


def test_a_first_token_is_not_repeated_in_the_middle(sessions):
    ask(sessions, "a", [BOS, 1], answer=[2])
    assert ask(sessions, "b", [BOS, 3], rid="a")[0] == [BOS, 1, 2, 3]
    assert sessions.continued(SessionParams("s", rid="a"), [BOS, 3], None).prompt_ids == [BOS, 1, 2, BOS, 3]


def test_a_session_takes_as_many_tokens_as_it_was_opened_for(sessions):
    sessions.open("small", 4)
    small = lambda new_ids, **params: sessions.continued(SessionParams("small", **params), new_ids, BOS)  # noqa: E731
    with pytest.raises(RequestError, match=r"context 0 \+ 5 new tokens = 5, but .* capacity_of_str_len=4"):
        small([1, 2, 3, 4, 5])
    sessions.add(small([1, 2]), Node("a", [1, 2], [3], True))
    assert small([4], rid="a").prompt_ids == [1, 2, 3, 4]
    assert small([BOS, 4], rid="a").prompt_ids == [1, 2, 3, 4], "what is left out does not count"
    with pytest.raises(RequestError, match=r"context 3 \+ 2 new tokens = 5"):
        small([4, 5], rid="a")
    assert small([4, 5], rid="a", offset=2).prompt_ids == [1, 2, 4, 5], "the way out"


def test_replace_ends_what_continued_the_request(sessions):
    ask(sessions, "a", [1], answer=[2])
    ask(sessions, "b", [3], rid="a")
    ask(sessions, "c", [4], rid="b")
    ask(sessions, "other", [5])
    assert ask(sessions, "d", [6], rid="a", replace=True) == ([1, 2, 6], {"a", "b", "c"})
    for gone in "bc":
        with pytest.raises(RequestError, match="no request of this session"):
            ask(sessions, "x", [1], rid=gone)
    assert ask(sessions, "e", [7], rid="d")[0] == [1, 2, 6, 7]
    assert ask(sessions, "f", [8], replace=True) == ([8], {"a", "d", "e", "other"}), "no rid: all"


def test_what_runs_can_be_replaced_and_not_continued(sessions):
    ask(sessions, "a", [1], answer=[2], finished=False)
    with pytest.raises(RequestError, match="has not finished"):
        ask(sessions, "b", [3], rid="a")
    assert ask(sessions, "b", [3], rid="a", replace=True) == ([1, 2, 3], {"a"})


def test_a_refused_request_changes_nothing(sessions):
    ask(sessions, "a", [1], answer=[2])
    ask(sessions, "b", [3], rid="a")
    sessions.continued(SessionParams("s", rid="a", replace=True), [4], BOS)
    assert ask(sessions, "c", [5], rid="b")[0] == [1, 2, 3, 5]


def test_sessions_are_opened_once_and_closed_once(sessions):
    with pytest.raises(RequestError, match="open already"):
        sessions.open("s")
    assert len({sessions.open(), sessions.open(), "s"}) == 3
    sessions.close("s")
    for call in (lambda: sessions.close("s"), lambda: ask(sessions, "a", [1])):
        with pytest.raises(RequestError, match="is not open"):
            call()
