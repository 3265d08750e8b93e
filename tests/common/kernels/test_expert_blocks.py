"""Pairs sorted by expert and padded to blocks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from common.kernels.expert_blocks import expert_blocks, most_blocks


def test_eight_tokens_by_hand():
    experts = torch.tensor([[2, 0], [2, 1], [0, 2], [-1, 2], [2, -1]])  # T = 5, k = 2
    blocks = expert_blocks(experts, 4, 4)
    assert blocks.experts.tolist() == [0, 1, 2, 2]
    assert blocks.pairs.view(-1, 4).tolist() == [[1, 4, 10, 10], [3, 10, 10, 10], [0, 2, 5, 7], [8, 10, 10, 10]]
    assert blocks.count.tolist() == [4]


@given(st.lists(st.integers(-1, 6), max_size=60), st.integers(1, 9), st.integers(1, 3))
def test_every_pair_that_is_here_stands_in_a_block_of_its_expert_once(ids, block, top):
    ids = ids[: len(ids) // top * top]
    experts = torch.tensor(ids, dtype=torch.int64).view(-1, top)
    blocks = expert_blocks(experts, 7, block)
    assert len(blocks.pairs) == block * len(blocks.experts) == block * int(blocks.count)
    assert int(blocks.count) <= most_blocks(len(ids), 7, block)
    seen = []
    for expert, pairs in zip(blocks.experts.tolist(), blocks.pairs.view(-1, block).tolist(), strict=True):
        real = [pair for pair in pairs if pair < len(ids)]
        assert real  # no block of padding alone
        assert pairs == real + [len(ids)] * (block - len(real))
        assert all(ids[pair] == expert for pair in real)
        seen += real
    assert seen == sorted((i for i, e in enumerate(ids) if e >= 0), key=lambda i: ids[i])  # stable


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 9))
def test_the_most_blocks_can_be_needed(pairs, num_experts, block):
    """One choice of each expert, and all the others of the first: nothing smaller would hold every router's choice."""
    ids = torch.tensor([e if e < num_experts else 0 for e in range(pairs)]).view(-1, 1)
    assert int(expert_blocks(ids, num_experts, block).count) == most_blocks(pairs, num_experts, block)
