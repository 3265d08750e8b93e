"""Heads re-cut between any two numbers of ranks."""

from itertools import product

import pytest
import torch

from ch07_sglang_radix.disaggregation.head_slices import head_slices, latent_slices
from common.layers.heads import HeadLayout

RANKS = range(1, 9)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8])
def test_every_head_of_every_page_comes_from_a_rank_that_holds_it(kv_heads):
    """The pages are made of head numbers, cut as HeadLayout cuts them, sent by slices, and must be what the other side's cut is."""
    for prefill, decode in product(RANKS, RANKS):
        held = [torch.tensor(HeadLayout.of(kv_heads, kv_heads, i, prefill).kv_heads) for i in range(prefill)]
        for rank in range(decode):
            want = HeadLayout.of(kv_heads, kv_heads, rank, decode).kv_heads
            got = torch.full((len(want),), -1)
            filled = 0
            for source, heads, places in head_slices(kv_heads, prefill, rank, decode):
                payload = held[source][list(heads)]
                for there, here in places:
                    got[here] = payload[there]
                    filled += 1
            assert (tuple(got.tolist()), filled) == (want, len(want)), (prefill, decode, rank)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_no_head_travels_twice_to_one_rank(kv_heads):
    for prefill, decode in product(RANKS, RANKS):
        for rank in range(decode):
            slices = head_slices(kv_heads, prefill, rank, decode)
            sent = [HeadLayout.of(kv_heads, kv_heads, s.source, prefill).kv_heads[h] for s in slices for h in s.heads]
            assert len(sent) == len(set(sent))
            assert len({one.source for one in slices}) == len(slices)


def test_replicated_heads_are_not_all_fetched_from_the_first_who_holds_them():
    """2 KV heads on 4 prefill ranks, each held twice: decode ranks 0 and 1 both need head 0."""
    sources = [head_slices(2, 4, rank, 4)[0].source for rank in range(4)]
    assert sources == [0, 1, 2, 3]


def test_equal_cuts_need_no_cutting():
    assert head_slices(8, 2, 1, 2) == [(1, (0, 1, 2, 3), ((0, 0), (1, 1), (2, 2), (3, 3)))]


def test_a_head_that_a_padded_rank_holds_twice_travels_once():
    assert head_slices(2, 1, 0, 3) == [(0, (0,), ((0, 0), (0, 1)))]


def test_latent_pages_come_whole_from_one_rank_and_the_ranks_share_the_work():
    for prefill, decode in product(RANKS, RANKS):
        sources = [latent_slices(prefill, rank, decode)[0].source for rank in range(decode)]
        assert all(0 <= source < prefill for source in sources)
        assert max(map(sources.count, sources)) <= -(-decode // prefill)
