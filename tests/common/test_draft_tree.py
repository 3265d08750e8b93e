"""The walk over a tree of guesses, against the one that is written as it is said: step by step, one sequence."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.draft_tree import DraftTree, walk

VOCAB = 4


def a_tree(parents, tokens):
    return DraftTree(torch.tensor([tokens]), torch.tensor([parents]))


@st.composite
def trees(draw, most=9):
    """Several trees of N nodes, and what was drawn at each node; no siblings with the same token, unless `VOCAB` is too small."""
    n = draw(st.integers(1, most))
    parents, tokens, drawn = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        parents.append([-1] + [draw(st.integers(0, i - 1)) for i in range(1, n)])
        tokens.append([draw(st.integers(0, VOCAB - 1)) for _ in range(n)])
        drawn.append([draw(st.integers(0, VOCAB - 1)) for _ in range(n)])
    return DraftTree(torch.tensor(tokens), torch.tensor(parents)), torch.tensor(drawn)


def text_of(parents, tokens, node):
    return () if node == 0 else (*text_of(parents, tokens, parents[node]), tokens[node])


def alike_where_the_text_is(tree, drawn):
    """The same token at nodes with the same text before them: they have the same logits and the same random number."""
    for tokens, parents, row in zip(tree.tokens.tolist(), tree.parents.tolist(), drawn, strict=True):
        first = {}
        for node in range(len(tokens)):
            row[node] = first.setdefault(text_of(parents, tokens, node), int(row[node]))
    return drawn


@settings(max_examples=200, deadline=None)
@given(trees())
def test_what_comes_out_is_what_a_plain_decode_draws_as_long_as_the_guesses_hold(case):
    tree, drawn = case[0], alike_where_the_text_is(*case)
    accepted = walk(tree, drawn)
    for b, (tokens, parents, row) in enumerate(
        zip(tree.tokens.tolist(), tree.parents.tolist(), drawn.tolist(), strict=True)
    ):
        drawn_after = {text_of(parents, tokens, node): row[node] for node in range(len(row))}
        text = ()
        while text in drawn_after:
            text += (drawn_after[text],)
        count = int(accepted.counts[b])
        assert tuple(accepted.tokens[b, :count].tolist()) == text
        assert int(accepted.last_tokens[b]) == text[-1]
        nodes = accepted.nodes[b, :count].tolist()
        assert nodes[0] == 0
        assert all(parents[child] == node for node, child in pairwise(nodes))
        assert [tokens[node] for node in nodes[1:]] == list(text[:-1])
        assert (accepted.nodes[b, count:] == -1).all()
        assert (accepted.tokens[b, count:] == -1).all()


@settings(max_examples=200, deadline=None)
@given(trees())
def test_of_what_was_drawn_at_each_node_the_walk_follows_a_path_that_ends_where_no_child_carries_it(case):
    """Whatever was drawn, as by a rule that decides in another way."""
    tree, drawn = case
    accepted = walk(tree, drawn)
    for b, count in enumerate(accepted.counts.tolist()):
        nodes = accepted.nodes[b, :count].tolist()
        for node, child in pairwise(nodes):
            assert tree.parents[b, child] == node
            assert tree.tokens[b, child] == drawn[b, node]
        children = [i for i in range(drawn.shape[1]) if tree.parents[b, i] == nodes[-1]]
        assert all(tree.tokens[b, i] != drawn[b, nodes[-1]] for i in children)


@settings(max_examples=100, deadline=None)
@given(trees(17))
def test_ancestors_are_the_path_from_the_root_and_depth_its_length(case):
    tree, _ = case
    for b, parents in enumerate(tree.parents.tolist()):
        for node in range(len(parents)):
            path, at = set(), node
            while at != -1:
                path.add(at)
                at = parents[at]
            assert set(tree.ancestors[b, node].nonzero().flatten().tolist()) == path
            assert tree.depth[b, node] == len(path) - 1


def test_in_a_chain_each_node_sees_those_before_it():
    tree = DraftTree.chain(torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]))
    assert tree.parents.tolist() == [[-1, 0, 1, 2]] * 2
    assert torch.equal(tree.ancestors, torch.ones(2, 4, 4, dtype=torch.bool).tril())
    assert walk(tree, torch.tensor([[6, 7, 9, 9], [9, 3, 4, 5]])).counts.tolist() == [3, 1]


@given(st.integers(1, 3), st.integers(1, 6), st.randoms(use_true_random=False))
def test_what_is_known_of_a_chain_is_what_a_search_finds(batch, n, rng):
    tokens, drawn = (torch.tensor([[rng.randint(0, 1) for _ in range(n)] for _ in range(batch)]) for _ in range(2))
    chain = DraftTree.chain(tokens)
    tree = DraftTree(tokens, chain.parents)
    assert torch.equal(chain.ancestors, tree.ancestors)
    assert torch.equal(chain.depth, tree.depth)
    for one, other in zip(walk(chain, drawn), walk(tree, drawn), strict=True):
        assert torch.equal(one, other)


def test_the_tree_of_the_docstring():
    the, sun, sky, was, red, hot = range(6)
    accepted = walk(a_tree([-1, 0, 0, 1, 1], [the, sun, sky, 9, was]), torch.tensor([[sun, was, 9, hot, red]]))
    assert accepted.nodes.tolist() == [[0, 1, 4, -1, -1]]
    assert accepted.tokens.tolist() == [[sun, was, red, -1, -1]]


def test_of_two_children_with_the_same_token_the_one_counts_that_leads_further():
    """As where a place is filled with token 0, and 0 is also a guess with children of its own."""
    accepted = walk(a_tree([-1, 0, 0, 2], [5, 0, 0, 7]), torch.tensor([[0, 7, 7, 8]]))
    assert accepted.nodes.tolist() == [[0, 2, 3, -1]]
    assert walk(a_tree([-1, 0, 0], [5, 0, 0]), torch.tensor([[0, 7, 7]])).nodes.tolist() == [[0, 1, -1]]


def test_a_path_moves_into_the_first_slots_and_what_stands_behind_it_stays():
    tree = a_tree([-1, 0, 0, 2, 3], [1, 2, 3, 4, 5])
    sources, targets = walk(tree, torch.tensor([[3, 0, 4, 9, 0]])).moves(torch.tensor([[70, 71, 72, 30, 31]]))
    assert sources.tolist() == [72, 30, 30, 31]
    assert targets.tolist() == [71, 72, 30, 31]
