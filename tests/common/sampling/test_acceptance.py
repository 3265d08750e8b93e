"""Every rule against the target's distribution, by drawing and counting: 60,000 draws a case, and a chi-square test.

A true rule would go over the limit in two of a million runs at most; seeds are fixed, so that it never does.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.draft_tree import DraftTree, walk
from common.sampling.acceptance import (
    Choice,
    decide,
    draw,
    one_coin,
    rejection_sampling,
    residual,
    typical,
    without,
    zero_and_renormalise,
)

DRAWS = 60_000
P = torch.tensor([0.35, 0.05, 0.2, 0.0, 0.25, 0.15], dtype=torch.float64)
Q = torch.tensor([0.10, 0.30, 0.2, 0.2, 0.15, 0.05], dtype=torch.float64)
CHILDREN = {"one": [4], "three": [1, 0, 4], "one that cannot be": [3, 0], "none": [-1], "all": [0, 1, 2, 3, 4, 5]}


def chi_square(tokens: torch.Tensor, p: torch.Tensor) -> float:
    """How far the counts are from p: (sum of (seen - expected)^2 / expected), in standard deviations above its mean."""
    seen, possible = torch.bincount(tokens, minlength=len(p)).double(), p > 0
    if seen[~possible].any():
        return math.inf
    expected = p[possible] * len(tokens)
    freedom = int(possible.sum()) - 1
    return float((((seen[possible] - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


LIMIT = 12.0  # with 2 to 8 degrees of freedom


def uniforms(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_children(rule, children, p=P, one=False):
    """`rule` at DRAWS nodes alike."""
    columns = torch.tensor(children).expand(DRAWS, -1)
    return rule(
        p.expand(DRAWS, -1), columns, uniforms(DRAWS, *(() if one else (len(children),))), uniforms(DRAWS, seed=1)
    )


@pytest.mark.parametrize("children", CHILDREN.values(), ids=CHILDREN.keys())
def test_zero_and_renormalise_draws_from_the_target(children):
    assert chi_square(with_children(zero_and_renormalise, children).token, P) < LIMIT


@pytest.mark.parametrize("children", CHILDREN.values(), ids=CHILDREN.keys())
def test_one_coin_for_all_siblings_draws_from_the_target(children):
    assert chi_square(with_children(one_coin, children, one=True).token, P) < LIMIT


@pytest.mark.parametrize("q", [Q, P, torch.eye(6, dtype=torch.float64)[1]], ids=["another", "the same", "certain"])
@pytest.mark.parametrize("guesses", [1, 3])
def test_rejection_sampling_draws_from_the_target_whatever_the_guesses_are_drawn_from(guesses, q):
    rows = q.expand(DRAWS * guesses, -1)
    children = draw(rows, uniforms(DRAWS * guesses, seed=2)).view(DRAWS, guesses)
    choice = rejection_sampling(
        P.expand(DRAWS, -1), q.expand(DRAWS, -1), children, uniforms(DRAWS, guesses), uniforms(DRAWS, seed=1)
    )
    assert chi_square(choice.token, P) < LIMIT
    if q is P:
        assert (choice.child == 0).all(), "a guess from the target itself is always kept"
    if q is Q and guesses == 1:  # Leviathan et al. 2023, theorem 3.5: kept with the sum of min(p, q)
        assert abs((choice.child == 0).double().mean() - torch.minimum(P, Q).sum()) < 0.01


@pytest.mark.parametrize("children", [[4], [1, 0, 4]])
def test_a_draw_at_the_node_itself_keeps_a_child_as_often_as_zero_and_renormalise(children):
    """What the engine does: draw from p, and follow the child that carries the token."""
    tokens = draw(P.expand(DRAWS, -1), uniforms(DRAWS, seed=3))
    kept = (tokens.unsqueeze(1) == torch.tensor(children)).any(dim=1).double().mean()
    assert abs(kept - P[children].sum()) < 0.01
    for rule, one in ((zero_and_renormalise, False), (one_coin, True)):
        choice = with_children(rule, children, one=one)
        assert abs((choice.child >= 0).double().mean() - kept) < 0.01
        for number, child in enumerate(children):
            assert abs((choice.child == number).double().mean() - P[child]) < 0.01


# --- wrong rules, which the same test must find


def keeps_the_target_after_a_refusal(p, children, coins, last):
    """No residual: what was refused may be drawn again."""
    kept = torch.where(coins[:, 0] < p.gather(1, children[:, :1]).squeeze(1), 0, -1)
    return Choice(kept, children[:, 0].where(kept >= 0, draw(p, last)))


def forgets_to_renormalise(p, children, coins, last):
    """The second sibling is tried with p(x), not with p(x) / (1 - what was refused)."""
    kept = torch.full_like(children[:, 0], -1)
    left = p
    for i in range(children.shape[1]):
        takes = (kept < 0) & (coins[:, i] < p.gather(1, children[:, i : i + 1]).squeeze(1))
        kept = kept.masked_fill(takes, i)
        left = torch.where((kept < 0).unsqueeze(1), without(left, children[:, i]), left)
    token = children.gather(1, kept.clamp(min=0).unsqueeze(1)).squeeze(1)
    return Choice(kept, token.where(kept >= 0, draw(left, last)))


def uses_the_coin_again(p, children, coins, last):
    """One coin for all siblings without the running sum."""
    return zero_and_renormalise(p, children, coins[:, :1].expand_as(coins), last)


def draws_the_last_token_with_the_coin(p, children, coins, last):
    return zero_and_renormalise(p, children, coins, coins[:, 0])


WRONG = [
    keeps_the_target_after_a_refusal, forgets_to_renormalise, uses_the_coin_again, draws_the_last_token_with_the_coin,
    lambda p, children, coins, last: one_coin(p, children, coins[:, 0], last, threshold_acc=0.8),
    lambda p, children, coins, last: one_coin(p, children, coins[:, 0], last, threshold_single=0.3),
    lambda p, children, coins, last: typical(p, children, last),
]  # fmt: skip


@pytest.mark.parametrize("rule", WRONG, ids=lambda rule: getattr(rule, "__name__", "?"))
def test_a_wrong_rule_is_found(rule):
    assert chi_square(with_children(rule, [4, 0]).token, P) > 5 * LIMIT


def test_dividing_by_q_the_wrong_way_is_found():
    children = draw(Q.expand(DRAWS, -1), uniforms(DRAWS, seed=2)).unsqueeze(1)
    p, q, coins, last = P.expand(DRAWS, -1), Q.expand(DRAWS, -1), uniforms(DRAWS, 1), uniforms(DRAWS, seed=1)
    kept = coins[:, 0] < p.gather(1, children).squeeze(1)  # as if the guess had been chosen, not drawn
    tokens = children[:, 0].where(kept, draw(residual(p, q), last))
    assert chi_square(tokens, P) > 5 * LIMIT
    swapped = children[:, 0].where(
        coins[:, 0] * p.gather(1, children)[:, 0] < q.gather(1, children)[:, 0], draw(residual(p, q), last)
    )
    assert chi_square(swapped, P) > 5 * LIMIT


# --- lossy rules keep more, and say by how much


def test_thresholds_keep_more_guesses_than_the_target_allows():
    for threshold in (0.9, 0.5):
        choice = with_children(partial(one_coin, threshold_acc=threshold), [4, 0], one=True)
        assert abs((choice.child >= 0).double().mean() - min(1, 0.6 / threshold)) < 0.01
    assert (with_children(partial(one_coin, threshold_single=0.25), [4, 0], one=True).child == 0).all()


def test_typical_acceptance_keeps_what_is_probable_enough_for_so_uncertain_a_model():
    p = torch.tensor([[0.97, 0.02, 0.01], [0.4, 0.35, 0.25]])
    limits = (0.3 * (-torch.special.entr(p).sum(-1)).exp()).clamp(max=0.09)
    assert limits.tolist() == pytest.approx([0.09, 0.09], abs=1e-6)
    kept = typical(p, torch.tensor([[1, 2], [2, 1]]), torch.zeros(2)).child
    assert kept.tolist() == [-1, 1]
    assert typical(p, torch.tensor([[1, 0], [2, -1]]), torch.zeros(2)).token.tolist() == [0, 2]
    flat = torch.full((1, 100), 0.01)  # H = log 100: the limit is 0.003, and every token is typical
    assert typical(flat, torch.tensor([[7]]), torch.zeros(1)).child.tolist() == [0]


# --- parts, and whole trees


def test_what_is_left():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.7, 0.1]])
    torch.testing.assert_close(residual(p, q), torch.tensor([[0.75, 0.0, 0.25]]))
    torch.testing.assert_close(residual(p, p), p)
    torch.testing.assert_close(without(p, torch.tensor([0])), torch.tensor([[0.0, 0.6, 0.4]]))
    torch.testing.assert_close(without(p, torch.tensor([-1])), p)
    certain = torch.tensor([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(without(certain, torch.tensor([1])), certain)


def test_no_token_of_probability_0_is_drawn():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    assert {int(draw(p, torch.tensor([u / 64]))) for u in range(64)} == {1, 3}


def as_rule(p, children, coins, last):
    return one_coin(p, children, coins[:, 0], last)


@pytest.mark.parametrize("rule", [zero_and_renormalise, as_rule])
def test_two_tokens_behind_a_tree_are_distributed_as_the_target_says(rule):
    """A model of three tokens that remembers one: pairs must come out as P(first) P(second | first)."""
    after = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]], dtype=torch.float64)
    parents, tokens = torch.tensor([-1, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 0, 2, 1, 0])
    tree = DraftTree(tokens.expand(DRAWS, -1), parents.expand(DRAWS, -1))
    p = after[tree.tokens]  # [B, N, V]
    drawn = decide(tree, p, uniforms(DRAWS, 6), uniforms(DRAWS, seed=1), rule)
    accepted = walk(tree, drawn)
    assert (accepted.tokens.gather(1, accepted.counts[:, None] - 1) >= 0).all()
    first = accepted.tokens[:, 0]
    assert chi_square(first, after[0]) < LIMIT
    second = accepted.tokens[:, 1].where(accepted.counts > 1, draw(after[first], uniforms(DRAWS, seed=5)))
    assert chi_square(first * 3 + second, (after[0].unsqueeze(1) * after).flatten()) < LIMIT


def drawn_pairs(q, told):
    """Two tokens behind a chain of two guesses, drawn from q [3, 3] by the token before; `told` is what the rule hears of that."""
    after = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]], dtype=torch.float64)
    root = torch.zeros(DRAWS, dtype=torch.int64)
    one = draw(q[root], uniforms(DRAWS, seed=6))
    tokens = torch.stack((root, one, draw(q[one], uniforms(DRAWS, seed=7))), dim=1)
    tree = DraftTree.chain(tokens, told[tokens])
    drawn = decide(tree, after[tokens], uniforms(DRAWS, 3), uniforms(DRAWS, seed=1), zero_and_renormalise)
    accepted = walk(tree, drawn)
    first = accepted.tokens[:, 0]
    second = accepted.tokens[:, 1].where(accepted.counts > 1, draw(after[first], uniforms(DRAWS, seed=5)))
    return chi_square(first * 3 + second, (after[0].unsqueeze(1) * after).flatten()), accepted.counts.double().mean()


def test_a_chain_of_guesses_that_were_drawn_is_distributed_as_the_target_says():
    q = torch.tensor([[0.3, 0.4, 0.3], [0.5, 0.1, 0.4], [0.3, 0.5, 0.2]], dtype=torch.float64)
    off, tokens = drawn_pairs(q, q)
    assert off < LIMIT
    # min(p, q) of the root is 0.7, and then 0.7, 0.7 or 0.7 of the next: 1 + 0.7 + 0.49
    assert abs(tokens - 2.18) < 0.03
    for wrong in (q.roll(1, 0), torch.full_like(q, 1 / 3)):  # of another node; of another temperature
        assert drawn_pairs(q, wrong)[0] > 5 * LIMIT


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(0, 1000))
def test_what_decide_writes_makes_the_walk_give_the_rule_s_path(n, seed):
    rng = torch.Generator().manual_seed(seed)
    parents = torch.tensor([-1] + [int(torch.randint(0, i, (1,), generator=rng)) for i in range(1, n)]).expand(3, n)
    tree = DraftTree(torch.randint(0, 4, (3, n), generator=rng), parents)
    p = torch.rand(3, n, 4, generator=rng).softmax(dim=-1)
    drawn = decide(tree, p, torch.rand(3, n, generator=rng), torch.rand(3, generator=rng), zero_and_renormalise)
    accepted = walk(tree, drawn)
    for b in range(3):
        decided = (drawn[b] >= 0).nonzero().flatten().tolist()
        assert accepted.nodes[b, : accepted.counts[b]].tolist() == decided
