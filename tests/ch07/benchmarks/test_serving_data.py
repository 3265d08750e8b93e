"""What the serving benchmark sends: exact lengths, exactly what is shared, and texts that survive the way through a tokenizer."""

import pytest

from ch07_sglang_radix.benchmarks.serving_data import Words, from_trace, multi_turn, plain_ids, shared_prefix, sizes
from ch07_sglang_radix.benchmarks.traces import TraceRequest
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH

VOCABULARY = range(100, 3000)


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_every_length_is_what_was_asked_for():
    made = multi_turn(Words(VOCABULARY, 1), 10, 3, 40, 7, 1.0)
    assert sizes(made) == (30, 1200, 210)
    assert all(len(turn.ids) == 40 and turn.output_len == 7 for one in made for turn in one.turns)


def test_a_range_ratio_spreads_the_lengths_up_to_the_one_asked_for():
    lengths = {len(turn.ids) for one in multi_turn(Words(VOCABULARY, 1), 400, 1, 40, 4, 0.5) for turn in one.turns}
    assert (min(lengths), max(lengths)) == (20, 40)
    assert len(lengths) == 21


def test_a_group_shares_its_system_prompt_and_nothing_more():
    made = shared_prefix(Words(VOCABULARY, 3), 4, 5, 64, 16, 8)
    prompts = [one.turns[0].ids for one in made]
    assert len(prompts) == 20
    assert {len(ids) for ids in prompts} == {80}
    groups = {}
    for ids in prompts:
        groups.setdefault(tuple(ids[:64]), []).append(ids)
    assert sorted(map(len, groups.values())) == [5] * 4
    shared = [common(a, b) for a in prompts for b in prompts if a is not b]
    assert max(shared) < 64 + 8
    assert sum(n >= 64 for n in shared) == 4 * 5 * 4
    order = [tuple(ids[:64]) for ids in prompts]
    assert order != sorted(order, key=list(groups).index), "the groups are mixed"


def test_equal_hash_ids_are_equal_tokens_and_others_are_not():
    trace = [
        TraceRequest(1000, 1400, 100, [1, 2, 3]), TraceRequest(1500, 1300, 10, [1, 2, 4]), TraceRequest(4000, 600, 1, [5, 2]),
    ]  # fmt: skip
    a, b, c = (one.turns[0].ids for one in from_trace(Words(VOCABULARY, 1), trace))
    assert (len(a), len(b), len(c)) == (1400, 1300, 600)
    assert common(a, b) == 1024
    assert common(a, c) == 0
    assert a[512:1024] != c[:512]
    assert c[512:600] == a[512:600], "block 2 is the same wherever it stands"


def test_a_trace_keeps_its_times_and_shrinks_with_its_blocks():
    trace = [TraceRequest(1000, 1400, 100, [1, 2, 3]), TraceRequest(1500, 1300, 1, [1, 2, 4])]
    first, second = from_trace(Words(VOCABULARY, 1), trace, block=32, slowdown=4.0)
    assert (first.at_s, second.at_s) == (0.0, 2.0)
    assert len(first.turns[0].ids) == round(1400 / 16)
    assert (first.turns[0].output_len, second.turns[0].output_len) == (6, 1)
    assert common(first.turns[0].ids, second.turns[0].ids) == 64


def test_a_prompt_longer_than_its_blocks_ends_with_tokens_of_its_own():
    trace = [TraceRequest(0, 40, 1, [1]), TraceRequest(0, 40, 1, [1])]
    a, b = (one.turns[0].ids for one in from_trace(Words(VOCABULARY, 1), trace, block=512 // 16))
    assert (len(a), len(b)) == (2, 2), "40 tokens of 512-token blocks, 16 times smaller"
    long = [TraceRequest(0, 1000, 1, [1]), TraceRequest(0, 1000, 1, [1])]
    a, b = (one.turns[0].ids for one in from_trace(Words(VOCABULARY, 1), long))
    assert (len(a), len(b), common(a, b)) == (1000, 1000, 512)


def test_the_same_seed_gives_the_same_and_another_shares_nothing():
    one, again, other = (multi_turn(Words(VOCABULARY, seed), 5, 1, 50, 4, 1.0) for seed in (1, 1, 2))
    assert one == again
    assert all(common(a.turns[0].ids, b.turns[0].ids) < 3 for a in one for b in other)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY_QWEN_PATH)


def test_plain_tokens_are_texts_by_themselves(tokenizer):
    ids = plain_ids(tokenizer)
    assert len(ids) > 1000
    for token in ids[::50]:
        text = tokenizer.token_text(token)
        assert text.strip()
        assert "\ufffd" not in text
        assert tokenizer.special_text(token) == ""
    eos = tokenizer.hf.eos_token_id
    assert eos not in ids
