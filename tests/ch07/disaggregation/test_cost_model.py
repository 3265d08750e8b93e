"""The model of when two engines pay: its two sides, its wire, and prompts that wait for each other."""

from math import inf

import pytest

from ch07_sglang_radix.disaggregation.cost_model import Arrivals, Times

TIMES = Times(chunk=100, chunk_s=0.5, step_s=0.1, token_bytes=10)


def test_one_engine_a_step_behind_each_chunk():
    one = TIMES.together(201)
    assert (one.chunks, one.gap_s, one.step_s) == (3, 0.6, 0.1)
    assert one.first_s == pytest.approx(3 * 0.5 + 2 * 0.1)
    assert one.busy_s == pytest.approx(3 * 0.6)


@pytest.mark.parametrize(
    ("wire", "first", "busy"),
    [
        (inf, 1.5, 1.5),
        (2000, 3 * 0.5 + 0.5, 1.5),  # as fast as the computing: the last chunk's pages alone
        (10_000, 3 * 0.5 + 0.1, 1.5),
        (1000, 0.5 + 3 * 1.0, 3.0),  # slower: all of them, behind the first chunk
    ],
)
def test_two_engines_the_last_chunk_s_pages_or_all_of_them_in_line(wire, first, busy):
    assert TIMES.even_wire == 2000
    two = TIMES.apart(300, wire)
    assert two.gap_s == two.step_s == 0.1
    assert (two.first_s, two.busy_s) == pytest.approx((first, busy))


@pytest.mark.parametrize(
    ("prompt", "wire", "least"),
    [
        (100, inf, 0.0),
        (300, inf, 2 * 0.1),  # the two steps between its chunks
        (300, 10_000, 2 * 0.1 - 0.1),  # but the last chunk's pages need not travel
        (300, 2000, 0.0),
    ],
)
def test_a_deflected_prompt_is_later_by_the_steps_between_its_chunks_alone(prompt, wire, least):
    assert TIMES.least_backlog(prompt, wire) == pytest.approx(least)


def test_a_gap_has_a_chunk_in_it_as_often_as_the_rate_says():
    one = TIMES.together(100)
    often, seldom = Arrivals(every_s=10, count=3), Arrivals(every_s=11, count=3)
    assert often.gap_s(one) == 0.6, "1 of 1 + (10 - 0.6) / 0.1 = 95 gaps"
    assert seldom.gap_s(one) == 0.1, "1 of 105"
    assert seldom.gap_s(one, share=0.995) == 0.6
    assert Arrivals(every_s=0.2, count=3).gap_s(one) == 0.6, "no time is left for a step without one"
    assert often.gap_s(TIMES.apart(100)) == 0.1


def test_prompts_that_come_faster_than_they_go_wait_for_each_other():
    one = TIMES.together(300)
    assert Arrivals(every_s=1.8, count=5).first_s(one) == pytest.approx(one.first_s)
    assert Arrivals(every_s=1.0, count=5).first_s(one) == pytest.approx(one.first_s + 2 * 0.8), "the third of five"
    slow = TIMES.apart(300, wire=1000)
    assert Arrivals(every_s=2.0, count=3).first_s(slow) == pytest.approx(slow.first_s + 1.0), (
        "it is the wire that is busy"
    )
