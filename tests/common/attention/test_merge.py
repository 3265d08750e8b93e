"""Attention in parts, merged, is attention over everything: against a dense softmax in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.attention.merge import attend, attend_to_each, merge, merge_two


def dense(q, k, v, causal=False):
    """The definition, with all scores in memory: o [n, Hq, d], lse [n, Hq]; k, v of -1 keys give zeros and -inf."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->nhm", q, k) / math.sqrt(q.shape[-1])
    if causal:
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + len(k) - len(q))
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return torch.einsum("nhm,mhd->nhd", scores.softmax(-1), v), scores.logsumexp(-1)


def some(n, m, hkv=2, group=3, d=16, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)  # noqa: E731
    return make(n, hkv * group, d), make(m, hkv, d), make(m, hkv, d)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(sum), st.integers(1, 4), st.integers(0, 99))
def test_any_number_of_parts_in_any_order_some_empty_is_the_whole(sizes, n, seed):
    q, k, v = some(n, sum(sizes), seed=seed)
    parts = [attend(q, *kv) for kv in zip(k.split(sizes), v.split(sizes), strict=True)]
    for order in (parts, parts[::-1]):
        for got, expected in zip(merge(order), dense(q, k, v), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_what_stands_in_an_empty_part_counts_for_nothing():
    q, k, v = some(3, 4)
    o, lse = attend(q, k, v)
    empty = torch.full_like(o, torch.nan), torch.full_like(lse, -torch.inf)
    for parts in ([(o, lse), empty], [empty, (o, lse)], [empty, (o, lse), empty]):
        merged, merged_lse = merge(parts)
        assert torch.equal(merged, o)
        assert torch.equal(merged_lse, lse)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_nothing_but_empty_parts_is_zero_and_minus_infinity(count):
    empty = torch.full((2, 4), torch.nan), torch.full((2,), -torch.inf)
    o, lse = merge([empty] * count)
    assert torch.equal(o, torch.zeros(2, 4))
    assert torch.equal(lse, torch.full((2,), -torch.inf))


def test_a_part_that_went_wrong_is_not_hidden():
    """NaN in a log-sum-exp means that the scores were NaN; only -inf means no keys."""
    good, bad = (torch.ones(1, 2), torch.zeros(1)), (torch.ones(1, 2), torch.full((1,), torch.nan))
    assert merge([good, bad])[0].isnan().all()


def test_scores_far_beyond_the_range_of_exp():
    q, k, v = some(2, 6)
    q = 500 * q  # exp(score) overflows in float64, log-sum-exp does not
    o, _ = merge([attend(q, k[:2], v[:2]), attend(q, k[2:], v[2:])])
    torch.testing.assert_close(o, dense(q, k, v)[0], rtol=1e-9, atol=1e-9)


def test_two_full_parts_have_a_shorter_way():
    q, k, v = some(5, 9)
    one, other = attend(q, k[:4], v[:4]), attend(q, k[4:], v[4:])
    torch.testing.assert_close(merge_two(one, other), merge([one, other])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_one_block(dtype, causal):
    q, k, v = some(7, 7, dtype=dtype)
    o, lse = attend(q, k, v, causal)
    expected, expected_lse = dense(*(x.double() for x in (q, k, v)), causal)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(o.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)


def test_no_query_or_no_key_is_an_empty_part():
    q, k, v = some(3, 4)
    o, lse = attend(q, k[:0], v[:0])
    assert o.shape == q.shape
    assert (lse == -torch.inf).all()
    assert attend(q[:0], k, v)[0].shape == (0, *q.shape[1:])


def test_one_query_a_sequence_behind_keys_of_unequal_number():
    lens = torch.tensor([3, 1, 6])
    q = torch.randn(3, 6, 16, dtype=torch.float64)
    k, v = torch.randn(2, 3, 6, 2, 16, dtype=torch.float64)
    o, lse = attend_to_each(q, k, v, lens)
    for b, n in enumerate(lens.tolist()):
        expected, expected_lse = dense(q[b : b + 1], k[b, :n], v[b, :n])
        torch.testing.assert_close(o[b : b + 1], expected)
        torch.testing.assert_close(lse[b : b + 1], expected_lse)
