"""Chunks that take equally long: what the equation gives, and what it is good for."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ch07_sglang_radix.dynamic_chunk_sizer import LEAST, TILE, PrefillTime, next_chunk
from common.models.published_configs import model_shape

costs = st.builds(PrefillTime, st.floats(0.01, 100), st.floats(0, 0.1))
pages = st.sampled_from([1, 4, 16, 64, 128, 48])


def chunks(cost, base, tokens, page_size=16, dynamic=True):
    parts, done = [], 0
    while done < tokens:
        size = next_chunk(cost, base, done, page_size) if dynamic and done else base
        parts.append((min(size, tokens - done), done))
        done += parts[-1][0]
    return parts


@given(costs, st.integers(1, 64), st.integers(0, 10**6), pages)
def test_a_chunk_takes_as_long_as_the_first_but_for_a_tile(cost, tiles, prefix, page_size):
    step = -(-TILE // page_size) * page_size
    base = tiles * step
    n = next_chunk(cost, base, prefix, page_size)
    assert n % page_size == 0
    assert step <= n <= base
    assume(n > max(LEAST * base, step))  # the shortest that there is may take longer
    same = cost.seconds(base, 0)
    assert cost.seconds(n, prefix) <= same * (1 + 1e-9)
    assert n == base or cost.seconds(n + step, prefix) > same * (1 - 1e-9)


@given(costs, st.integers(1, 64), st.lists(st.integers(0, 10**6), min_size=2), pages)
def test_the_more_there_is_before_it_the_shorter_a_chunk_is(cost, tiles, prefixes, page_size):
    sizes = [next_chunk(cost, tiles * 128, prefix, page_size) for prefix in sorted(prefixes)]
    assert all(a >= b for a, b in pairwise(sizes))


def test_where_keys_cost_nothing_all_chunks_are_alike():
    assert {next_chunk(PrefillTime(1, 0), 1024, prefix, 16) for prefix in (0, 10**3, 10**6)} == {1024}
    assert next_chunk(PrefillTime(0, 0), 1024, 0, 16) == 1024


def test_a_base_below_a_tile_stays_as_it_is():
    assert next_chunk(PrefillTime(1, 1), 8, 1000, 4) == 8


@given(costs, st.integers(1, 8192), st.integers(1, 10**5))
def test_two_measurements_tell_both_costs(cost, tokens, prefix):
    found = PrefillTime.fit(tokens, prefix, cost.seconds(tokens, 0), cost.seconds(tokens, prefix))
    assert found.token == pytest.approx(cost.token, rel=1e-6, abs=1e-6 * cost.pair * (tokens + prefix))
    assert found.pair == pytest.approx(cost.pair, rel=1e-6, abs=1e-9 * cost.token / prefix)


def test_a_longer_prefix_that_took_no_longer_costs_nothing():
    """Small prompts, a busy machine: then chunks are of one length, as without the flag."""
    assert PrefillTime.fit(128, 1024, 2.0, 1.9).pair == 0


def test_a_32k_prompt_of_a_7b_model_is_through_two_stages_faster():
    """Operations alone, without what many small chunks cost on top: (all + the longest chunk) / 2, where a stage is half."""
    shape = model_shape("Qwen2.5-7B")
    weights = 7.07e9 - shape.vocab_size * shape.hidden_size
    cost = PrefillTime(2 * weights, 4 * shape.num_heads * shape.head_dim * shape.num_layers)

    def speedup(dynamic):
        took = [cost.seconds(*part) for part in chunks(cost, 4096, 32_767, dynamic=dynamic)]
        return sum(took) / ((sum(took) + max(took)) / 2)

    assert speedup(False) < 1.75
    assert speedup(True) > 1.8
