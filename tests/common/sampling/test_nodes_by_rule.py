"""Verify steps decided by a rule, through the sampler: its path comes out of the walk, and p is what the sampler draws from."""

import pytest
import torch

from common.draft_tree import DraftTree, walk
from common.sampling.acceptance import with_thresholds, zero_and_renormalise
from common.sampling.batch import SamplingRow
from common.sampling.nodes import node_batch
from common.sampling.params import SamplingParams
from common.sampling.sampler import ALL_FORBIDDEN, NOT_FINITE, probabilities, sample
from tests.common.sampling.test_acceptance import LIMIT, chi_square

ROWS = 8_000
LOGITS = torch.tensor([[1.0, 2.0, 0.5, -1.0, 1.5], [0.0, 1.0, 2.0, 0.0, -1.0]]).log_softmax(dim=-1)
PARENTS = [-1, 0, 0, 1]
TOKENS = [0, 4, 2, 1]  # 4 and 2 are guessed, and 1 behind 4
EXACT = {"zero and renormalise": zero_and_renormalise, "thresholds of 1": with_thresholds(1.0, 1.0)}
SETTINGS = {
    "plain": {},
    "hot, the best three": {"temperature": 1.7, "top_k": 3},
    "top-p": {"temperature": 0.8, "top_p": 0.8},
    "min-p": {"min_p": 0.3},
    "a bias": {"logit_bias": {"2": 1.5}},
}


def drawn_by(rule, settings, count=ROWS, logits=LOGITS):
    """Of `count` requests that differ in their seeds: the root's row is logits[0], every other node's logits[1]."""
    params = SamplingParams(**{"temperature": 1.0, **settings})
    rows = [SamplingRow(params, seed, [], []) for seed in range(count)]
    tree = DraftTree(torch.tensor(TOKENS).expand(count, -1), torch.tensor(PARENTS).expand(count, -1))
    batch = node_batch(rows, tree, rule)
    sampled = sample(logits[torch.tensor([0, 1, 1, 1])].repeat(count, 1), batch)
    return sampled, walk(tree, sampled.tokens.view(count, -1)), rows


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("rule", EXACT.values(), ids=EXACT.keys())
def test_an_exact_rule_draws_what_the_sampler_would_have_drawn_from(rule, settings):
    count = 3000 if "logit_bias" in settings else ROWS  # every node then has a row of its own
    _, accepted, rows = drawn_by(rule, settings, count)
    plain = node_batch(rows[:1], DraftTree(torch.tensor([[0]]), torch.tensor([[-1]])))
    p = probabilities(plain.edited(LOGITS[:1]).float(), torch.zeros(1, dtype=torch.int64), plain)[0].double()
    assert chi_square(accepted.tokens[:, 0], p) < LIMIT
    kept = (accepted.counts > 1).double().mean()
    assert abs(kept - p[[4, 2]].sum()) < 0.05


def test_thresholds_below_1_keep_more():
    means = []
    for threshold in (1.0, 0.5, 0.0):
        _, accepted, _ = drawn_by(with_thresholds(1.0, threshold), {}, 2000)
        means.append(accepted.counts.double().mean())
    assert means[0] < means[1] < means[2]
    assert (accepted.nodes[:, 1] == 1).all(), "anything is kept, and the first child is tried first"


@pytest.mark.parametrize("rule", [*EXACT.values(), with_thresholds(0.1, 0.1)])
def test_greedy_rows_are_as_greedy_as_ever(rule):
    logits = torch.tensor([[0.0, 1.0, 1.5, 1.0, 2.0], [0.0, 5.0, 2.0, 1.0, 0.0]])  # 4, and behind it 1
    _, accepted, _ = drawn_by(rule, {"temperature": 0.0}, 3, logits)
    assert accepted.nodes.tolist() == [[0, 1, 3, -1]] * 3
    assert accepted.tokens.tolist() == [[4, 1, 1, -1]] * 3


def test_the_same_seed_decides_alike_whoever_is_beside_it():
    _, many, _ = drawn_by(zero_and_renormalise, {}, 40)
    _, few, _ = drawn_by(zero_and_renormalise, {}, 7)
    assert torch.equal(many.nodes[:7], few.nodes)
    assert torch.equal(many.tokens[:7], few.tokens)
    assert len(set(map(tuple, many.tokens.tolist()))) > 3


def test_a_row_without_a_token_says_why_and_takes_nobody_with_it():
    logits = LOGITS.clone()
    for value, why in ((torch.nan, NOT_FINITE), (-torch.inf, ALL_FORBIDDEN)):
        logits[0] = value
        sampled, accepted, _ = drawn_by(zero_and_renormalise, {}, 4, logits)
        assert sampled.drawn.view(4, -1)[:, 0].tolist() == [why] * 4
        assert (accepted.tokens[:, 0] == 0).all()
        assert (accepted.counts >= 1).all()


def test_log_probabilities_are_those_of_what_the_rule_gave():
    sampled, accepted, _ = drawn_by(zero_and_renormalise, {"logprobs": True}, 50)
    sampled.logprobs.download()
    told = sampled.logprobs.take()
    for b in range(50):
        for place, node in enumerate(accepted.nodes[b, : accepted.counts[b]].tolist()):
            want = LOGITS[min(node, 1), accepted.tokens[b, place]]
            assert told[4 * b + node].logprob == pytest.approx(float(want), abs=1e-5)
