"""Who gets into a prefill step, at the edges of the rules; no model."""

import pytest

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.prefill_adder import Answer, InBatchPrefix, PrefillAdder
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory
from common.sampling.params import SamplingParams


def memory(pages=100, page_size=1, rows=8):
    pool, table = TokenToKVPool(num_pages=pages, page_size=page_size), ReqToTokenPool(rows, 400)
    return RequestMemory(pool, table, RadixCache(pool, table))


def req(rid, prompt, new=1, **fields):
    return Req(rid, None, prompt, SamplingParams(max_new_tokens=new), 0, **fields)


@pytest.mark.parametrize(("shared", "enters"), [(31, True), (32, False)])
def test_32_tokens_that_this_step_computes_are_worth_a_step_s_wait(shared, enters):
    gate, head = InBatchPrefix(page_size=1, disable=False), list(range(shared))
    gate.computes(req(0, [*head, 900, 901]), shared + 2)
    assert gate(req(1, [*head, 902, 903]), matched=0) is enters
    assert gate(req(1, [*head, 902, 903]), matched=1), "what is in the tree already need not be waited for"
    assert gate(req(1, [*head, 902, 903], extra_key="adapter"), matched=0), "another namespace shares nothing"


def test_what_a_step_computes_in_part_is_shared_in_part():
    gate, head = InBatchPrefix(page_size=1, disable=False), list(range(60))
    gate.computes(req(0, head), 20)
    assert gate(req(1, [*head, 7]), matched=0)
    gate.computes(req(0, head), 33)
    assert not gate(req(1, [*head, 7]), matched=0)


@pytest.mark.parametrize(("pages", "answer"), [(15, Answer.FULL), (16, Answer.ADDED)])
def test_a_request_enters_if_its_whole_answer_fits_to_the_last_slot(pages, answer):
    adder = PrefillAdder(memory(pages), budget=100, promised=0, waiting=[])
    assert adder.add(req(0, [1] * 10, new=6)) is answer


def test_what_others_are_promised_is_not_there():
    assert PrefillAdder(memory(20), 100, promised=4, waiting=[]).add(req(0, [1] * 10, new=6)) is Answer.ADDED
    assert PrefillAdder(memory(20), 100, promised=5, waiting=[]).add(req(0, [1] * 10, new=6)) is Answer.FULL


def test_the_budget_of_a_step_is_used_to_the_last_token():
    adder = PrefillAdder(memory(), budget=12, promised=0, waiting=[])
    assert adder.add(req(0, [1] * 5)) is Answer.ADDED
    assert adder.add(req(1, [2] * 7)) is Answer.ADDED
    assert (adder.chunked, [n for _, n in adder.batch]) == (None, [5, 7])
    assert adder.add(req(2, [3])) is Answer.FULL


def test_one_prompt_at_most_is_in_parts():
    adder = PrefillAdder(memory(), budget=12, promised=0, waiting=[])
    long, longer, short = req(0, [1] * 8), req(1, [2] * 20), req(2, [3] * 9)
    assert [adder.add(one) for one in (long, longer, short)] == [Answer.ADDED, Answer.ADDED, Answer.FULL]
    assert adder.chunked is longer
    assert [n for _, n in adder.batch] == [8, 4]


def test_a_chunk_ends_at_a_page_s_end_and_keeps_to_its_limit():
    store = memory(page_size=4)
    adder = PrefillAdder(store, budget=10, promised=0, waiting=[])
    long = req(0, [1] * 40)
    adder.add(long)
    assert adder.batch == [(long, 8)]
    long.kv_len += 8
    adder = PrefillAdder(store, budget=20, promised=0, waiting=[])
    adder.add_chunk(long, limit=13)
    assert adder.batch == [(long, 12)]
    assert adder.budget == 8, "the rest of the step is for others"
    long.kv_len += 12
    adder = PrefillAdder(store, budget=20, promised=0, waiting=[])
    adder.add_chunk(long, limit=None)
    assert adder.batch == [(long, 20)]
    assert adder.chunked is None
