"""Requests that come, are held up and are aborted on either side at any moment: answers are right, and nothing is left."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.disaggregation.local_pair import Pair
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy

NEW = 6
PROMPTS = [list(range(5, 5 + n)) for n in (3, 16, 30, 41)] + [[*range(5, 25), 300, 301], [900]]

ask = st.tuples(st.just("ask"), st.integers(0, len(PROMPTS) - 1))
abort = st.tuples(st.sampled_from(["abort prefill", "abort decode"]), st.integers(0, 7))
step = st.tuples(st.sampled_from(["step prefill", "step decode"]), st.integers(1, 4))
gate = st.tuples(st.sampled_from(["hold", "let go"]), st.just(0))


@pytest.fixture(scope="module")
def both():
    pair = Pair(prefill={"chunked_prefill_size": 8, "pool": 160}, decode={"pool": 160, "reserved": 4})
    yield pair
    pair.close()


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(ask, step, step, abort, gate), min_size=3, max_size=25))
def test_whatever_happens_each_request_ends_and_every_page_comes_back(both, events):
    asked, aborted = [], set()
    for what, value in events:
        if what == "ask":
            asked.append((both.ask(PROMPTS[value], max_new_tokens=NEW), PROMPTS[value]))
        elif what.startswith("abort") and value < len(asked):
            half = what.split()[1]
            (_, numbers), _ = asked[value]
            if both.halves[half].scheduler.abort(numbers[half]):
                aborted.add(value)
        elif what.startswith("step"):
            for _ in range(value):
                both.halves[what.split()[1]].step()
        elif what == "hold":
            both.gate.clear()
        elif what == "let go":
            both.gate.set()
    both.gate.set()
    assert both.at_rest()
    both.step()  # results of aborts that came last
    for i, (one, prompt) in enumerate(asked):
        output = both.ended(one, "decode")
        whole = greedy(TINY_QWEN_PATH, prompt, NEW)
        assert output.output_ids == whole[: len(output.output_ids)]
        if i not in aborted:
            assert output.output_ids == whole
