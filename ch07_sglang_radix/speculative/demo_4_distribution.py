"""The same distribution: 20,000 draws by each rule that keeps or refuses guesses, counted against the target's.

    python ch07_sglang_radix/speculative/demo_4_distribution.py

A target says p over six words, and a draft says q, which is quite another thing. Every rule is asked 20,000 times for one word, and
what came out is counted. How far counts may be from p by chance alone is known (chi-square, which for n possible words is n - 1 on
average): exact rules are as near as draws from p itself, and rules that are nearly right are not. Then two words in a row, behind a
tree; and at last what this engine does, which is to draw the very tokens that it would have drawn without any guess.
"""

from collections.abc import Sequence

import torch

from common.distributed.launch import run_main
from common.draft_tree import DraftTree, walk
from common.sampling.acceptance import (
    Choice,
    decide,
    draw,
    one_coin,
    rejection_sampling,
    residual,
    typical,
    zero_and_renormalise,
)
from common.sampling.batch import SamplingRow
from common.sampling.nodes import node_batch
from common.sampling.params import SamplingParams
from common.sampling.sampler import sample
from common.teaching.show import check, heading, table

DRAWS = 20_000
WORDS = ("sun", "moon", "sea", "sand", "wind")
P = torch.tensor([0.35, 0.10, 0.20, 0.25, 0.10], dtype=torch.float64)
Q = torch.tensor([0.10, 0.40, 0.20, 0.25, 0.05], dtype=torch.float64)
CHOSEN = (1, 3)  # the draft's best two
BY_CHANCE = 30.0  # a chi-square with 4 degrees of freedom is above it in one of 200,000 runs
# a target of three tokens that remembers one: P(second | first), and P(first) behind token 0
AFTER = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]], dtype=torch.float64)
TREE = DraftTree(torch.tensor([[0, 1, 0, 2, 1, 0]]), torch.tensor([[-1, 0, 0, 1, 1, 2]]))


def main() -> None:
    one_word()
    two_words()
    this_engine()


def coins(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chi_square(tokens: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * len(tokens)
    return float(((torch.bincount(tokens, minlength=len(p)) - expected) ** 2 / expected).sum())


def one_word() -> None:
    heading(f"One word, {DRAWS:,} draws a rule: how often each comes out, in percent")
    p, q = P.expand(DRAWS, -1), Q.expand(DRAWS, -1)
    drawn = draw(Q.expand(3 * DRAWS, -1), coins(3 * DRAWS, seed=1)).view(DRAWS, 3)
    chosen = torch.tensor(CHOSEN).expand(DRAWS, -1)
    three, one, last = coins(DRAWS, 3, seed=2), coins(DRAWS, seed=3), coins(DRAWS, seed=4)
    print("  p " + "  ".join(f"{word} {share:.2f}" for word, share in zip(WORDS, P.tolist(), strict=True)))
    print("  q " + "  ".join(f"{word} {share:.2f}" for word, share in zip(WORDS, Q.tolist(), strict=True)))
    exact = [
        ("draws from p, nobody guesses", Choice(torch.full_like(last, -1), draw(p, last))),
        ("a guess from q: rejection sampling", rejection_sampling(p, q, drawn[:, :1], three, last)),
        ("three guesses from q: the same", rejection_sampling(p, q, drawn, three, last)),
        ("q's best two: zero and renormalise", zero_and_renormalise(p, chosen, three, last)),
        ("q's best two: one coin", one_coin(p, chosen, one, last)),
        ("q's best two: drawn, and followed", followed(p, chosen, last)),
    ]
    off = [
        ("one coin, threshold_acc 0.5", one_coin(p, chosen, one, last, threshold_acc=0.5)),
        ("one coin, threshold_single 0.25", one_coin(p, chosen, one, last, threshold_single=0.25)),
        ("typical acceptance", typical(p, chosen, last)),
        ("refused, and drawn from p again", p_again(p, q, drawn[:, 0], one, last)),
        ("drawn from q, kept with p(x)", as_if_chosen(p, q, drawn[:, 0], one, last)),
        ("siblings, not renormalised", not_renormalised(p, chosen, three, last)),
    ]
    table(("exact", "kept", *WORDS, "chi-square"), [row(name, choice) for name, choice in exact])
    check(
        "all of them are as near to p as chance allows",
        all(chi_square(choice.token, P) < BY_CHANCE for _, choice in exact),
    )
    table(("lossy, and wrong", "kept", *WORDS, "chi-square"), [row(name, choice) for name, choice in off])
    check("none of these is", all(chi_square(choice.token, P) > BY_CHANCE for _, choice in off))
    kept = float((exact[1][1].child >= 0).double().mean())
    print(
        f"  a guess from q is kept with the sum of min(p, q) = {float(torch.minimum(P, Q).sum()):.2f}; here {kept:.2f}"
    )


def row(name: str, choice: Choice) -> Sequence:
    shares = torch.bincount(choice.token, minlength=len(P)).double() / DRAWS
    kept = float((choice.child >= 0).double().mean())
    return (
        name,
        f"{100 * kept:.0f} %",
        *(f"{100 * share:.1f}" for share in shares.tolist()),
        chi_square(choice.token, P),
    )


def followed(p: torch.Tensor, children: torch.Tensor, last: torch.Tensor) -> Choice:
    """Draw from p as if nobody had guessed, and see whether a child carries it."""
    token = draw(p, last)
    carries = children == token.unsqueeze(1)
    return Choice(carries.int().argmax(dim=1).where(carries.any(dim=1), -1), token)


def p_again(p, q, guess, coin, last) -> Choice:
    kept = coin * q.gather(1, guess[:, None])[:, 0] < p.gather(1, guess[:, None])[:, 0]
    return Choice(kept.int() - 1, guess.where(kept, draw(p, last)))


def as_if_chosen(p, q, guess, coin, last) -> Choice:
    kept = coin < p.gather(1, guess[:, None])[:, 0]
    return Choice(kept.int() - 1, guess.where(kept, draw(residual(p, q), last)))


def not_renormalised(p, children, three, last) -> Choice:
    own = p.gather(1, children)  # p(x) as it stood at first
    first, second = three[:, 0] < own[:, 0], three[:, 1] < own[:, 1]
    rest = p.scatter(1, children, 0.0)
    token = children[:, 0].where(first, children[:, 1].where(second, draw(rest, last)))
    return Choice((first | second).int() - 1, token)


def two_words() -> None:
    heading(f"Two tokens behind a tree, {DRAWS:,} times: chi-square of the nine pairs")
    tree = DraftTree(TREE.tokens.expand(DRAWS, -1), TREE.parents.expand(DRAWS, -1))
    p = AFTER[tree.tokens]  # [DRAWS, nodes, 3]
    pairs = (AFTER[0].unsqueeze(1) * AFTER).flatten()
    rows, values = [], []
    for name, rule in (
        ("zero and renormalise", zero_and_renormalise),
        ("one coin", lambda p, children, coin, last: one_coin(p, children, coin[:, 0], last)),
        (
            "one coin, threshold_acc 0.8",
            lambda p, children, coin, last: one_coin(p, children, coin[:, 0], last, 1.0, 0.8),
        ),
    ):
        accepted = walk(tree, decide(tree, p, coins(DRAWS, 6, seed=5), coins(DRAWS, seed=6), rule))
        first = accepted.tokens[:, 0]
        second = accepted.tokens[:, 1].where(accepted.counts > 1, draw(AFTER[first], coins(DRAWS, seed=7)))
        values.append(chi_square(3 * first + second, pairs))
        rows.append((name, float(accepted.counts.double().mean()), values[-1]))
    table(("rule", "tokens a step", "chi-square"), rows)
    check("the exact rules give pairs as P(first) P(second | first) says, the threshold does not",
          max(values[:2]) < 2 * BY_CHANCE < values[2])  # fmt: skip


def this_engine() -> None:
    heading(f"The engine draws at every node what it would draw without a tree: {DRAWS:,} seeds")
    params = SamplingParams(temperature=1.0)
    rows = [SamplingRow(params, seed, [], []) for seed in range(DRAWS)]
    tree = DraftTree(TREE.tokens.expand(DRAWS, -1), TREE.parents.expand(DRAWS, -1))
    logits = AFTER.log().float()
    accepted = walk(tree, sample(logits[tree.tokens].flatten(0, 1), node_batch(rows, tree)).tokens.view(DRAWS, -1))
    first = sample(logits[:1].expand(DRAWS, -1), rows).tokens
    second = sample(logits[first], [SamplingRow(params, row.seed, [], [], ahead=1) for row in rows]).tokens
    longer = accepted.counts > 1
    same = (accepted.tokens[:, 0] == first) & ((accepted.tokens[:, 1] == second) | ~longer)
    print(
        f"  tokens a step {float(accepted.counts.double().mean()):.2f}; a second token came with {int(longer.sum()):,} seeds"
    )
    check(f"the tokens are those of plain decoding with {int(same.sum()):,} seeds of {DRAWS:,}", bool(same.all()))


if __name__ == "__main__":
    run_main(main)
