"""A session is a tree of token ids, or, if it is a streaming one, a line."""

import asyncio

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


# --- streaming sessions


class Line:
    """The turns of a streaming session."""

    def __init__(self, capacity=0):
        self.closed = []
        self.sessions = Sessions(self.closed.append)
        self.sessions.open("line", capacity, streaming=True)

    def ask(self, name, new_ids, *, answer=(), end=True, **params):
        """A turn; returns its prompt. end: "gone" if its client has left, "abort" if it was aborted, False if it still runs."""
        found = self.sessions.continued(SessionParams("line", **params), list(new_ids), BOS)
        node = Node(name, found.prompt_ids, list(answer))
        self.sessions.add(found, node)
        if end:
            node.end(None if end == "gone" else {"type": "abort" if end == "abort" else "length"})
        self.last = node
        return found.prompt_ids


@pytest.fixture
def line():
    return Line()


def test_a_streaming_session_goes_on_without_a_name(line):
    assert line.ask("a", [BOS, 1], answer=[2]) == [BOS, 1]
    assert line.ask("b", [BOS, 3], answer=[4]) == [BOS, 1, 2, 3]
    assert line.ask("c", [5], rid="b") == [BOS, 1, 2, 3, 4, 5]
    assert line.sessions.continued(SessionParams("line"), [6], BOS).streaming


@pytest.mark.parametrize("end", ["gone", "abort"])
def test_a_turn_that_was_aborted_is_as_if_it_had_never_been(line, end):
    assert line.ask("a", [1], answer=[2], end=end) == [1]
    assert line.ask("a", [3], answer=[4]) == [3], "there is nothing to go on from"
    assert line.ask("a", [5], answer=[6], end=end) == [3, 4, 5], "names are used again"
    assert line.ask("b", [7], answer=[8], end=end) == [3, 4, 7]
    assert line.ask("c", [9], answer=[]) == [3, 4, 9]


def test_a_streaming_session_has_one_turn_at_a_time(line):
    line.ask("a", [1], answer=[2], end=False)
    with pytest.raises(RequestError, match="wait for the turn that runs"):
        line.ask("b", [3])
    line.last.end({"type": "length"})
    assert line.ask("b", [3]) == [1, 2, 3]


@pytest.mark.parametrize("given", [{"replace": True}, {"drop_previous_output": True}, {"offset": 3}])
def test_a_streaming_session_only_grows(line, given):
    line.ask("a", [1], answer=[2])
    with pytest.raises(RequestError, match=f"{next(iter(given))}: a streaming session only grows"):
        line.ask("b", [3], **given)


def test_a_streaming_session_has_no_branches(line):
    with pytest.raises(RequestError, match="Invalid request session id: 'a'; the streaming session has no turn yet"):
        line.ask("x", [1], rid="a")
    line.ask("a", [1], answer=[2])
    line.ask("b", [3], answer=[4])
    with pytest.raises(RequestError, match="Invalid request session id: 'a'; the streaming session goes on from 'b'"):
        line.ask("c", [5], rid="a")


def test_a_streaming_session_keeps_its_capacity_and_two_turns():
    line = Line(capacity=100)
    for i in range(24):
        line.ask(str(i), [i, i], answer=[i, i])
    assert len(line.sessions._open["line"].turns) == 2
    with pytest.raises(RequestError, match=r"context 96 \+ 5 new tokens = 101"):
        line.ask("x", [1] * 5)


def test_whoever_keeps_k_and_v_hears_that_a_streaming_session_is_closed(line):
    line.sessions.open("tree")
    line.sessions.close("tree")
    assert line.closed == []
    line.sessions.close("line")
    assert line.closed == ["line"]


# --- timeouts


@pytest.mark.parametrize("streaming", [False, True])
def test_a_session_is_closed_when_nothing_of_it_has_run_for_its_timeout(streaming):
    async def run():
        closed = []
        sessions = Sessions(closed.append)
        sessions.open("s", streaming=streaming, timeout=0.15)
        found = sessions.continued(SessionParams("s"), [1], BOS)
        node = Node("a", [1], [2])
        sessions.add(found, node)
        await asyncio.sleep(0.4)
        assert len(sessions) == 1, "it runs"
        node.end({"type": "length"})
        while len(sessions):
            await asyncio.sleep(0.01)
        return closed

    assert asyncio.run(asyncio.wait_for(run(), 100)) == (["s"] if streaming else [])


def test_a_name_that_is_used_again_has_a_timeout_of_its_own():
    async def run():
        sessions = Sessions()
        sessions.open("s", timeout=0.05)
        sessions.close("s")
        sessions.open("s", timeout=600)
        await asyncio.sleep(0.2)
        return len(sessions)

    assert asyncio.run(run()) == 1
