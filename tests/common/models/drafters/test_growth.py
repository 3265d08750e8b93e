"""EAGLE-2's growing of trees against an exhaustive search, and what it does with ties and too few candidates."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models.drafters.growth import Growth


def grown(next_logprobs, batch, steps, k, nodes, vocab):
    """next_logprobs(b, path) -> [V]. Also the paths of what ran, by what `window` and `parents` say."""
    growth = Growth()
    best = torch.stack([next_logprobs(b, ()) for b in range(batch)]).topk(k)
    growth.start(best.values, best.indices)
    paths = [[() for _ in range(k)] for _ in range(batch)]
    ran = [[] for _ in range(batch)]
    for _ in range(steps - 1):
        above = [[paths[b][p] for p in growth.parents[b].tolist()] for b in range(batch)]
        paths = [[(*a, t) for a, t in zip(above[b], growth.tokens[b].tolist(), strict=True)] for b in range(batch)]
        for b in range(batch):
            ran[b] += paths[b]
            for path, seen in zip(paths[b], growth.window[b].tolist(), strict=True):
                visible = [ran[b][i] for i in range(len(ran[b])) if seen[i]]
                assert sorted(visible, key=len) == [path[: n + 1] for n in range(len(path))]
        best = torch.stack([torch.stack([next_logprobs(b, path) for path in paths[b]]) for b in range(batch)]).topk(k)
        growth.grow(best.values, best.indices)
    return growth.tree(torch.full((batch,), 99), nodes)


@settings(deadline=None, max_examples=settings().max_examples)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(2, 9), st.integers(0, 99))
def test_the_best_of_all_candidates_stay_and_are_a_tree(batch, steps, k, nodes, seed):
    vocab = 5

    def next_logprobs(b, path):
        torch.manual_seed(hash((seed, b, path)) % 2**31)
        return torch.randn(vocab).log_softmax(-1)

    tree = grown(next_logprobs, batch, steps, k, nodes, vocab)
    assert (tree.parents[:, 0] == -1).all()
    assert (tree.tokens[:, 0] == 99).all()
    assert (tree.parents[:, 1:] < torch.arange(1, nodes)).all()
    assert (tree.parents[:, 1:] >= 0).all()
    for b in range(batch):
        candidates, frontier = {}, {(): 0.0}
        for _ in range(steps):
            children = {
                (*path, t): score + s
                for path, score in frontier.items()
                for s, t in zip(*(x.tolist() for x in next_logprobs(b, path).topk(k)), strict=True)
            }
            candidates |= children
            frontier = dict(sorted(children.items(), key=lambda item: -item[1])[:k])
        wanted = sorted(candidates, key=lambda path: -candidates[path])[: nodes - 1]
        paths = [()]
        for token, parent in zip(tree.tokens[b, 1:].tolist(), tree.parents[b, 1:].tolist(), strict=True):
            paths.append((*paths[parent], token))
        missing = nodes - 1 - len(wanted)
        assert sorted(paths[1:]) == sorted([*wanted, *[(0,)] * missing])


def test_of_equals_the_first_found_stays_and_a_parent_before_its_child():
    tree = grown(lambda b, path: torch.zeros(4), 1, 3, 2, 4, 4)  # probability 1 everywhere: all scores are equal
    assert tree.parents.tolist() == [[-1, 0, 0, 1]]


def test_a_log_probability_above_zero_does_not_lift_a_child_above_its_parent():
    values = {(): torch.tensor([-0.5, -3.0]), (0,): torch.tensor([1e-6, -9.0])}
    tree = grown(lambda b, path: values.get(path, torch.tensor([-1.0, -1.5])), 1, 2, 1, 2, 2)
    assert tree.tokens.tolist() == [[99, 0]]
    assert tree.parents.tolist() == [[-1, 0]]
