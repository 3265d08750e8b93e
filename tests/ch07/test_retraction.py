"""Who goes back to the queue when pages run out, and what is expected of those who stay."""

from types import SimpleNamespace

import pytest

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.retraction import Retraction
from common.sampling.params import SamplingParams


def req(rid, prompt, out):
    return Req(rid, None, [1] * prompt, SamplingParams(max_new_tokens=100), 0, output_ids=[2] * out)


def state(running, room_for, chunked=None, sessions=0):
    """Pages for one more token of `room_for` requests; the chunk of a prompt holds those of one, a session too."""
    released, kept = [], [None] * sessions
    memory = SimpleNamespace(
        obtainable_slots=lambda: 4 * room_for + 4 * released.count(chunked) + 4 * (sessions - len(kept)),
        slots_needed=lambda reqs, steps: 4 * len(reqs),
        release=released.append,
        sessions=SimpleNamespace(slots=kept, forget_oldest=lambda: bool(kept) and kept.pop() is None),
    )
    s = SimpleNamespace(
        memory=memory, page_size=4, running=running, waiting=[req(9, 1, 0)], chunked=chunked, retractions=0,
        new_token_ratio=0.7, batches=["old"], elsewhere=[],
    )  # fmt: skip
    s.forget_batches, s.front = s.batches.clear, s
    return s, released


def never():
    pytest.fail("nobody need look at the tokens that are on their way")


def test_where_there_is_room_nothing_happens():
    running = [req(0, 2, 1), req(1, 2, 1)]
    s, released = state(running, room_for=2)
    Retraction(s, settle=never).make_room()
    s.memory.obtainable_slots, s.memory.slots_needed = (
        lambda: 0,
        lambda reqs, steps: 0,
    )  # all have room in their last page
    Retraction(s, settle=never).make_room()
    assert (s.running, released, s.new_token_ratio, s.batches) == (running, [], 0.7, ["old"])


def test_the_fewest_tokens_go_back_first_and_of_equals_the_longest_prompt():
    """They wait in front of the others, in the order in which they came."""
    running = [req(0, 2, 3), req(1, 2, 1), req(2, 4, 1), req(3, 2, 5)]
    s, released = state(list(running), room_for=2)
    Retraction(s, settle=lambda: None).make_room()
    assert [r.rid for r in released] == [2, 1]
    assert [r.rid for r in s.running] == [0, 3]
    assert [r.rid for r in s.waiting] == [1, 2, 9]
    assert s.retractions == 2
    assert s.batches == [], "whoever comes back before its lane decodes again has another row"
    assert s.new_token_ratio == pytest.approx((3 + 5 + 20 * 2) / 200), "20 more steps of each are expected"


def test_what_idle_sessions_keep_is_taken_from_them_when_there_is_nobody_else_to_go_back():
    s, released = state([req(0, 2, 1), req(1, 2, 3)], room_for=0, sessions=2)
    Retraction(s, settle=lambda: None).make_room()
    assert [r.rid for r in released] == [0], "not yet: a request can go back"
    assert (len(s.running), len(s.memory.sessions.slots)) == (1, 1), "one was enough"


def test_the_last_one_stays():
    s, _ = state([req(0, 2, 1), req(1, 2, 3)], room_for=0)
    Retraction(s, settle=lambda: None).make_room()
    assert [r.rid for r in s.running] == [1]


def test_the_last_one_goes_too_if_requests_that_do_not_run_yet_hold_pages():
    s, released = state([req(0, 2, 1), req(1, 2, 3)], room_for=0)
    s.elsewhere = [req(5, 40, 0)]
    Retraction(s, settle=lambda: None).make_room()
    assert [r.rid for r in released] == [0, 1]
    assert (s.running, [r.rid for r in s.waiting], s.retractions) == ([], [0, 1, 9], 2)
    s, _ = state([req(0, 2, 1), req(1, 2, 3)], room_for=1)
    s.elsewhere = [req(5, 40, 0)]
    Retraction(s, settle=lambda: None).make_room()
    assert [r.rid for r in s.running] == [1], "it has room for its next token"


def test_a_prompt_that_is_computed_in_part_goes_before_anybody_who_decodes():
    chunked = req(7, 50, 0)
    s, released = state([req(0, 2, 1), req(1, 2, 3)], room_for=1, chunked=chunked)
    Retraction(s, settle=lambda: None).make_room()
    assert released == [chunked]
    assert (s.chunked, len(s.running), s.new_token_ratio) == (None, 2, 0.7)
    assert [r.rid for r in s.waiting] == [7, 9]
