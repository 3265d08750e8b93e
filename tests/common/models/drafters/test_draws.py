"""Guesses that are drawn are distributed as q, follow from seed and place alone, and are told in the target's tokens."""

import numpy as np
import pytest
import torch

from common.models.drafters.draws import DrawnRows, Draws
from common.parallel_state import TPGroup
from tests.common.sampling.test_acceptance import LIMIT, chi_square

ROWS = 20_000
LOGITS = torch.tensor([0.3, 1.2, -0.5, 0.0, 2.0])
ONE = TPGroup(device=torch.device("cpu"))


def draws(temperature, count=ROWS, position=7, seeds=None, vocab_size=5):
    rows = DrawnRows(np.full(count, temperature), np.arange(count, dtype=np.uint64) if seeds is None else seeds)
    return Draws(rows, np.full(count, position), vocab_size, ONE.device)


def guess(one, logits=LOGITS, ids=None):
    return one.guess(logits.expand(len(one.temperatures), -1), len(LOGITS), ids, ONE)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_guess_is_drawn_from_the_draft_at_the_request_s_temperature(temperature):
    one = draws(temperature)
    first, second = guess(one), guess(one, LOGITS.flip(0))
    want = (LOGITS / temperature).softmax(0)
    assert chi_square(first, want.double()) < LIMIT
    assert chi_square(second, want.flip(0).double()) < LIMIT
    torch.testing.assert_close(one.q(3)[:2], torch.stack((want, want.flip(0), torch.eye(5)[0])).expand(2, -1, -1))
    pairs = first * len(want) + second  # of one seed: the second does not follow from the first
    assert chi_square(pairs, (want.unsqueeze(1) * want.flip(0)).flatten().double()) < LIMIT


def test_a_greedy_row_is_certain_of_its_best_token():
    rows = DrawnRows(np.array([0.0, 1.0]), np.array([1, 1], dtype=np.uint64))
    one = Draws(rows, np.array([3, 3]), len(LOGITS), ONE.device)
    assert guess(one)[0] == 4
    assert one.q(2)[0, 0].tolist() == [0, 0, 0, 0, 1]
    assert one.q(2)[1, 0].max() < 1


def test_the_number_is_the_seed_s_and_the_place_s():
    """Not the step's: a guess for the same place is the same one, with whoever is beside it."""
    a, b = draws(1.0, 50, position=7), draws(1.0, 50, position=8)
    guess(a)
    assert torch.equal(guess(a), guess(b)), "the second guess of one is the first of the other"
    some = np.array([3, 40], dtype=np.uint64)
    assert torch.equal(guess(draws(1.0, 2, seeds=some)), guess(draws(1.0, 50))[[3, 40]])


def test_a_reduced_vocabulary_is_told_in_the_target_s_ids():
    ids = torch.tensor([0, 2, 3, 4, 5])
    one = draws(1.0, 500, vocab_size=6)
    tokens = guess(one, ids=ids)
    assert (tokens != 1).all()
    q = one.q(2)[0, 0]
    assert q.shape == (6,)
    assert q[1] == 0
    torch.testing.assert_close(q[ids], LOGITS.softmax(0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_draft_that_has_gone_bad_guesses_some_token(bad):
    tokens = guess(draws(1.0, 8), LOGITS.where(LOGITS < 2, bad))
    assert ((tokens >= 0) & (tokens < len(LOGITS))).all()


def test_what_fills_a_chain_up_is_token_0_for_certain_and_other_ranks_keep_nothing():
    one = draws(1.0, 3)
    guess(one)
    assert one.q(4)[:, 1:].argmax(-1).eq(0).all()
    assert draws(1.0, 3).q(4) is None
