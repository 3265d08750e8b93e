"""Which guess is kept: the rules of the literature, as pure functions of one node's probabilities.

    p [n, V]          what the target would draw from, after temperature, top-k, penalties, masks: n nodes, each for itself
    children [n, c]   the guesses below a node, in the order in which they are tried; -1: no more of them
    coins [n, c]      numbers in [0, 1), one a guess (one_coin: [n], one for all)
    last [n]          one more, for what is drawn where no guess is kept

A rule keeps one child, or none and draws another token from what is left: either way one token comes out (`Choice`). It is exact if
that token is distributed as p, whatever was guessed; tests draw and count.

    rejection_sampling      guesses drawn from q; keep x with min(1, p/q), else go on with norm(max(p - q, 0))       exact
                            Leviathan et al. 2023, Chen et al. 2023; several draws a node: SpecInfer (Miao et al. 2024)
    zero_and_renormalise    guesses chosen, not drawn; keep x with p(x), else p(x) = 0, renormalise, next sibling    exact
                            what EAGLE (Li et al. 2024) and EAGLE-2 do with the best k tokens of a draft
    one_coin                the same with a single coin and a running sum of p                                       exact,
                            SGLang 0.5.23, sgl-kernel csrc/speculative/speculative_sampling.cuh; with thresholds     or lossy
    typical                 keep what is not too improbable for so uncertain a model                                 lossy
                            Medusa (Cai et al. 2024), section 2.3.1, and its medusa_generate's defaults

The engine needs none of them to be exact: it draws a token at every node, as a plain decode would, and follows the child that
carries it (common/draft_tree.py). For chosen guesses that keeps x with p(x), too, and the text is that of a plain decode, token for
token. `decide` is for those who ask for another rule, or whose guesses are drawn (drafters/draws.py): what it writes at the nodes
makes the same walk give the rule's path.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from common.draft_tree import DraftTree


class Choice(NamedTuple):
    """child [n]: which of the children was kept, -1 for none. token [n]: its token, or the one that was drawn instead."""

    child: torch.Tensor
    token: torch.Tensor


def draw(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """p [n, V], not necessarily of sum 1, u [n] in [0, 1) -> tokens [n], by the inverse of the distribution function."""
    cdf = p.double().cumsum(dim=-1)
    return torch.searchsorted(cdf, (u.double() * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """norm(max(p - q, 0)) [n, V]: what is drawn from after a guess drawn from q was refused; p itself where nothing is left."""
    left = (p - q).clamp(min=0)
    total = left.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, left / total.masked_fill(total == 0, 1), p)


def without(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """p [n, V] with the probability of tokens [n] gone, and sum 1 again; -1: nothing goes. p itself where nothing is left."""
    gone = torch.arange(p.shape[-1], device=p.device) == tokens.unsqueeze(-1)
    left = p.masked_fill(gone, 0)
    total = left.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, left / total.masked_fill(total == 0, 1), p)


def rejection_sampling(
    p: torch.Tensor, q: torch.Tensor, children: torch.Tensor, coins: torch.Tensor, last: torch.Tensor
) -> Choice:
    """children [n, c]: each drawn from q [n, V], independently of the others."""
    kept = torch.full_like(children[:, 0], -1)
    for i in range(children.shape[1]):
        own, asked = _of(p, children[:, i]), _of(q, children[:, i])
        refused = (kept < 0) & (children[:, i] >= 0)
        takes = refused & (coins[:, i] * asked < own)  # coin < p/q; nothing is divided by 0
        kept = kept.masked_fill(takes, i)
        p = torch.where((refused & ~takes).unsqueeze(1), residual(p, q), p)
    return _choice(kept, children, p, last)


def zero_and_renormalise(p: torch.Tensor, children: torch.Tensor, coins: torch.Tensor, last: torch.Tensor) -> Choice:
    """children [n, c]: chosen in any way that does not look at the coins."""
    kept = torch.full_like(children[:, 0], -1)
    for i in range(children.shape[1]):
        refused = (kept < 0) & (children[:, i] >= 0)
        takes = refused & (coins[:, i] < _of(p, children[:, i]))
        kept = kept.masked_fill(takes, i)
        p = without(p, children[:, i].masked_fill(~refused | takes, -1))
    return _choice(kept, children, p, last)


def one_coin(
    p: torch.Tensor, children: torch.Tensor, coin: torch.Tensor, last: torch.Tensor, threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
) -> Choice:  # fmt: skip
    """coin [n]. Thresholds below 1 are lossy: a child is kept, too, where p(x) >= threshold_single, or where
    coin < (sum of p over it and the siblings before it) / threshold_acc; never where p(x) is 0, as at every other token of a
    greedy row."""
    kept = torch.full_like(children[:, 0], -1)
    total = torch.zeros_like(p[:, 0])
    for i in range(children.shape[1]):
        own = _of(p, children[:, i])
        refused = (kept < 0) & (children[:, i] >= 0)
        total = total + own * refused
        takes = refused & ((coin * threshold_acc < total) | (own >= threshold_single)) & (own > 0)
        kept = kept.masked_fill(takes, i)
        # a sibling with the same token as one before it has nothing left, and the sum does not count it twice
        p = p.masked_fill(
            (torch.arange(p.shape[1], device=p.device) == children[:, i, None]) & (refused & ~takes)[:, None], 0
        )
    return _choice(kept, children, p, last)


def typical(
    p: torch.Tensor, children: torch.Tensor, last: torch.Tensor, epsilon: float = 0.09, delta: float = 0.3
) -> Choice:
    """The most probable child with p(x) > min(epsilon, delta exp(-H(p))); a token drawn from p where there is none."""
    entropy = torch.special.entr(p).sum(dim=-1)
    own = torch.stack([_of(p, column) for column in children.unbind(1)], dim=1)  # [n, c]
    enough = (children >= 0) & (own > (delta * (-entropy).exp()).clamp(max=epsilon).unsqueeze(1))
    best = own.masked_fill(~enough, -1).argmax(dim=1)
    return _choice(best.masked_fill(~enough.any(dim=1), -1), children, p, last)


def _of(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """p of tokens [n]; 0 for -1."""
    return p.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1) * (tokens >= 0)


def _choice(kept: torch.Tensor, children: torch.Tensor, p: torch.Tensor, last: torch.Tensor) -> Choice:
    token = children.gather(1, kept.clamp(min=0).unsqueeze(1)).squeeze(1)
    return Choice(kept, token.where(kept >= 0, draw(p, last)))


Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Choice]  # p, children, coins [n, c], last [n]


def by_typicality(p: torch.Tensor, children: torch.Tensor, _: torch.Tensor, last: torch.Tensor) -> Choice:
    """`typical` as a Rule: it throws no coin."""
    return typical(p, children, last)


def with_thresholds(single: float, acc: float) -> Rule:
    """`one_coin` with SGLang's two thresholds: the first child's coin is the one."""

    def rule(p: torch.Tensor, children: torch.Tensor, coins: torch.Tensor, last: torch.Tensor) -> Choice:
        return one_coin(p, children, coins[:, 0], last, single, acc)

    return rule


def decide(tree: DraftTree, p: torch.Tensor, coins: torch.Tensor, last: torch.Tensor, rule: Rule) -> torch.Tensor:
    """A rule's decisions down each tree, from the root as far as a child is kept -> drawn [B, N] for `draft_tree.walk`.

    The rule is for guesses that were chosen; where the tree says what they were drawn from, it is `rejection_sampling`.
    p [B, N, V] at all nodes; coins [B, N]: the n-th is that of node n as a guess; last [B]. Nodes off the path get -1: no child
    carries it.
    """
    batch, n = tree.tokens.shape
    everybody = torch.arange(batch, device=p.device)
    drawn = torch.full_like(tree.tokens, -1)
    at, alive = torch.zeros_like(everybody), torch.ones_like(everybody, dtype=torch.bool)
    below = tree.parents.unsqueeze(1) == torch.arange(n, device=p.device).unsqueeze(1)  # [B, N, N]: j is a child of i
    # a sibling with the same token as an earlier one is the same text: the earlier one stands for both
    alike = (tree.parents.unsqueeze(2) == tree.parents.unsqueeze(1)) & (
        tree.tokens.unsqueeze(2) == tree.tokens.unsqueeze(1)
    )
    below &= ~alike.tril(-1).any(dim=2).unsqueeze(1)
    most = int(below.sum(dim=2).max()) if n > 1 else 0
    for _ in range(n):
        mine = below[everybody, at]  # [B, N]
        numbers = (
            torch.arange(n, device=p.device).where(mine, n).sort(dim=1).values[:, : max(most, 1)]
        )  # of the children
        there = numbers < n
        numbers = numbers.clamp(max=n - 1)
        children = tree.tokens.gather(1, numbers).masked_fill(~there, -1)
        own, own_coins = p[everybody, at], coins.gather(1, numbers)
        if tree.q is None:
            choice = rule(own, children, own_coins, last)
        else:
            choice = rejection_sampling(own, tree.q[everybody, at], children, own_coins, last)
        drawn[everybody[alive], at[alive]] = choice.token[alive]
        alive = alive & (choice.child >= 0)
        if not bool(alive.any()):
            break
        at = numbers.gather(1, choice.child.clamp(min=0).unsqueeze(1)).squeeze(1).where(alive, at)
    return drawn
