"""Timelines of stages: what the demo computes about them is right."""

import itertools

import pytest

from ch07_sglang_radix.parallelism.demo_3_pipeline_timeline import Span, bubble, gpipe, interleaved, overlap


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("m", [4, 8])
def test_the_computed_bubbles_are_the_formulas(stages, m):
    assert bubble(gpipe(stages, m)) == pytest.approx((stages - 1) / (m + stages - 1))
    for pieces in (1, 2, 4):
        assert bubble(interleaved(stages, m, pieces)) == pytest.approx((stages - 1) / (pieces * m + stages - 1))


@pytest.mark.parametrize("schedule", [gpipe(3, 5), interleaved(2, 4), interleaved(3, 6)])
def test_in_a_computed_schedule_a_stage_does_one_thing_at_a_time_and_nothing_before_its_input(schedule):
    for _, mine in itertools.groupby(sorted(schedule), key=lambda span: span.stage):
        spans = sorted(mine, key=lambda span: span.start)
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(spans))
    for micro_batch in {span.micro_batch for span in schedule}:
        passes = sorted((span for span in schedule if span.micro_batch == micro_batch), key=lambda span: span.start)
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(passes))


def test_a_bubble_is_what_no_stage_computes_in():
    assert bubble([Span(0, 0, 0, 1), Span(1, 0, 1, 2)]) == 0.5
    assert bubble([Span(0, 0, 3, 4), Span(1, 0, 3, 4)]) == 0


def test_stages_overlap_where_any_micro_batch_meets_the_one_before_it():
    assert not overlap([Span(0, 0, 0, 1), Span(1, 0, 1, 2)]), "one alone"
    in_turns = [Span(0, 0, 0, 1), Span(0, 1, 2, 3), Span(1, 0, 1, 2), Span(1, 1, 3, 4)]
    assert not overlap(in_turns)
    assert overlap([*in_turns, Span(0, 2, 3.5, 5), Span(1, 2, 5, 6)])
    assert overlap([span for span in gpipe(2, 2) if span.what == "forward"])
