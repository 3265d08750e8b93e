"""Logits that name no next token: they cost their own request its answer, and nobody else anything."""

import math

import pytest
import torch

from common.layers.vocab import first_best
from common.sampling.params import SamplingParams
from common.sampling.sampler import ALL_FORBIDDEN, NOT_FINITE, Drawn, problem, sample
from tests.common.sampling.rows import random_logits, row

V = 50
MINUS_NAN = (
    torch.tensor(0xFFC00000 - (1 << 32), dtype=torch.int32).view(torch.float32).item()
)  # what inf - inf gives on x86
GOOD = [1.0, 5.0, *[0.0] * (V - 2)]
BAD = {
    "one NaN": ([math.nan, *GOOD[1:]], NOT_FINITE),
    "last is NaN": ([*GOOD[:-1], math.nan], NOT_FINITE),
    "a negative NaN": ([*GOOD[:-1], MINUS_NAN], NOT_FINITE),
    "all NaN": ([math.nan] * V, NOT_FINITE),
    "one infinity": ([*GOOD[:-1], math.inf], NOT_FINITE),
    "all infinite": ([math.inf] * V, NOT_FINITE),
    "NaN and infinity": ([math.inf, math.nan, *GOOD[2:]], NOT_FINITE),
    "nothing left": ([-math.inf] * V, ALL_FORBIDDEN),
}
WAYS = {
    "greedy": {},
    "drawn": {"temperature": 1.0},
    "top-k": {"temperature": 0.7, "top_k": 5},
    "top-p and min-p": {"temperature": 2.0, "top_p": 0.9, "min_p": 0.01},
    "penalized": {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    "penalized, greedy": {"presence_penalty": 0.5},
    "biased": {"logit_bias": {0: 3.0}},
    "with log-probabilities": {"temperature": 1.0, "logprobs": True, "top_logprobs": 3, "token_ids_logprob": [1, 2]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_marked_and_its_token_is_valid_for_every_rank(kind, way):
    logits, mark = BAD[kind]
    sampled = sample(torch.tensor([logits]), [row(SamplingParams(**WAYS[way]), output=[1, 3])])
    assert Drawn(sampled).take().tokens == [mark]
    assert 0 <= sampled.tokens.item() < V
    assert problem(mark)


@pytest.mark.parametrize("way", WAYS)
def test_the_other_rows_draw_what_they_draw_alone(way):
    params = SamplingParams(**WAYS[way])
    rows = [row(params, seed, output=[1, 3]) for seed in range(2 * len(BAD))]
    logits = random_logits(len(rows), V)
    logits[::2] = torch.tensor([bad for bad, _ in BAD.values()])
    tokens = Drawn(sample(logits, rows)).take().tokens
    assert tokens[::2] == [mark for _, mark in BAD.values()]
    for i in range(1, len(rows), 2):
        assert tokens[i] == sample(logits[i : i + 1], rows[i : i + 1]).tokens.item()
        assert problem(tokens[i]) is None


def test_a_token_has_no_problem():
    for token in (0, 1, V - 1):
        assert problem(token) is None


@pytest.mark.parametrize(
    "values",
    [
        {"allowed_token_ids": [1], "bad_words_ids": [[1]]},
        {"allowed_token_ids": [2], "min_new_tokens": 5},
        {"allowed_token_ids": [4], "bad_words_ids": [[3, 4]]},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_request_that_forbids_every_token_is_told_so(values, temperature):
    params = SamplingParams(temperature=temperature, **values)
    rows = [row(params, output=[3], end_ids=[2]), row(SamplingParams())]
    tokens = Drawn(sample(torch.tensor([GOOD, GOOD]), rows)).take().tokens
    assert tokens == [ALL_FORBIDDEN, 1]
    assert "allowed_token_ids" in problem(tokens[0])


def test_what_is_forbidden_may_be_nan():
    """The row is judged by what may be drawn."""
    assert sample(torch.tensor([BAD["one NaN"][0]]), [row(SamplingParams(allowed_token_ids=[1, 2]))]).tokens.item() == 1


@pytest.mark.parametrize("logit", [3e38, -3e38, 1e-40])
@pytest.mark.parametrize("temperature", [0.0, 1e-4, 0.5, 1000.0])
def test_large_logits_are_logits(logit, temperature):
    sampled = sample(torch.tensor([[-3.4e38, logit]]), [row(SamplingParams(temperature=temperature))])
    assert Drawn(sampled).take().tokens == [1]


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("kind", BAD)
def test_the_best_of_a_bad_row_are_a_bad_row(kind, k):
    """What a rank sends to rank 0 when it sends its best only (gather_best_logits)."""
    logits, mark = BAD[kind]
    values, _ = first_best(torch.tensor([logits]), k)
    assert Drawn(sample(values, [row(SamplingParams())])).take().tokens == [mark]
