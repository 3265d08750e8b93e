"""Prompts that the decode engine computes itself: which ones, what the prefill engine makes of them, and that nothing is left."""

import pytest

from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy

LONG = list(range(5, 45))
SHORT = list(range(105, 113))
LIMIT = len(SHORT)


def right(prompt, n=6):
    return greedy(TINY_QWEN_PATH, prompt, n)


def took_over(both):
    return both.decode.side.counts()["deflected"]


@pytest.mark.parametrize(("limit", "deflected"), [(0, 0), (LIMIT - 1, 0), (LIMIT, 1)])
def test_a_prompt_is_deflected_up_to_the_limit_and_the_prefill_engine_does_nothing_for_it(pair, limit, deflected):
    both = pair(decode={"deflect": limit})
    asked = both.ask(SHORT)
    assert both.answer(asked).output_ids == right(SHORT)
    assert took_over(both) == deflected
    assert both.decode.scheduler.work["inputs"] == 5 + deflected * len(SHORT)
    assert both.prefill.scheduler.work["inputs"] == (not deflected) * len(SHORT)
    ended = both.ended(asked, "prefill")
    assert (len(ended.output_ids), ended.finish_reason["type"]) == (1 - deflected, "length")
    assert both.prefill.side.failed == both.decode.side.failed == 0
    assert both.at_rest()


def test_what_counts_is_what_the_decode_side_s_tree_lacks(pair):
    both = pair(decode={"deflect": LIMIT})
    assert both.answer(both.ask(LONG)).output_ids == right(LONG)
    longer = [*LONG, *SHORT[:6]]
    output = both.answer(both.ask(longer))
    assert (output.output_ids, took_over(both)) == (right(longer), 1)
    assert output.cached_tokens == len(LONG), "of its own tree"
    assert both.at_rest()


def test_what_must_be_computed_for_log_probabilities_counts_too(pair):
    both = pair(decode={"deflect": LIMIT})
    both.answer(both.ask(LONG))
    told = both.answer(both.ask(LONG, prompt_logprobs=0))
    assert (told.output_ids, took_over(both)) == (right(LONG), 0)
    assert len(told.prompt_logprobs) >= len(LONG) - 1
    assert both.at_rest()


def test_prefill_may_hear_of_it_before_the_request_comes(pair):
    both = pair(decode={"deflect": LIMIT})
    room, numbers = both.ask(SHORT, halves=("decode",))
    assert both.answer((room, numbers)).output_ids == right(SHORT)
    late = both.ask(SHORT, halves=("prefill",), room=room)
    both.until(lambda: late[1]["prefill"] in both.prefill.results)
    assert both.ended(late, "prefill").finish_reason["type"] == "length"
    assert both.at_rest()


def test_long_and_short_ones_in_turn_and_an_abort_in_the_queue(pair):
    """Chunks on both sides, few pages, more than there are rows: the order is the one in which they came."""
    both = pair(prefill={"chunked_prefill_size": 8}, decode={"deflect": LIMIT, "pool": 96, "chunked_prefill_size": 4})
    prompts = [[(100 * i + t) % 1000 for t in range(5, 5 + (8 if i % 2 else 30))] for i in range(8)]
    asked = [both.ask(prompt, max_new_tokens=9) for prompt in prompts]
    gone = both.ask(SHORT)
    both.until(lambda: took_over(both))
    assert both.decode.scheduler.abort(gone[1]["decode"]) == 1
    for prompt, one in zip(prompts, asked, strict=True):
        assert both.answer(one).output_ids == right(prompt, 9)
    assert took_over(both) == 4
    assert both.at_rest()


def test_who_lacks_a_grammar_is_not_put_in_front_of_others(pair):
    both = pair(decode={"deflect": LIMIT})
    both.decode.scheduler.admission.gates.append(lambda req, matched: req.params.grammar is None)
    ruled = both.ask(SHORT, grammar=("regex", "(yes|no), it is"), max_new_tokens=30)
    both.until(lambda: both.decode.stage(ruled[0]) == "arrived")
    assert took_over(both) == 0
    both.decode.scheduler.admission.gates.pop()
    assert both.answer(ruled).text in ("yes, it is", "no, it is")
    assert both.at_rest()
