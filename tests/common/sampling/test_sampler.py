import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from common.sampling.batch import SamplingRow, uniform
from common.sampling.params import SamplingParams
from common.sampling.sampler import sample
from tests.common.sampling.rows import draws, one, random_logits, row


def log(*probs):
    return [math.log(p) for p in probs]


def distribution(logits, params):
    """{token: probability}, from the definitions: temperature, top-k, top-p, min-p, one after the other."""
    weights = {t: math.exp(x / params.temperature) for t, x in enumerate(logits)}
    best_first = sorted(weights, key=lambda t: (-weights[t], t))
    if params.top_k > 0:
        best_first = best_first[: params.top_k]
    total = sum(weights[t] for t in best_first)
    kept, mass = [], 0.0
    for t in best_first:
        if mass >= params.top_p * total:
            break
        kept.append(t)
        mass += weights[t]
    kept = [t for t in kept if weights[t] >= params.min_p * weights[best_first[0]]]
    total = sum(weights[t] for t in kept)
    return {t: weights[t] / total for t in kept}


def assert_drawn_from(tokens, want):
    """Pearson's chi-square, at most 5 standard deviations above its mean; the seeds are fixed, so is the answer."""
    counts = Counter(tokens)
    assert counts.keys() == want.keys()
    chi_square = sum((counts[t] - len(tokens) * p) ** 2 / (len(tokens) * p) for t, p in want.items())
    freedom = len(want) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)


# --- greedy


def test_the_default_is_the_best_token():
    logits = random_logits(8, 50)
    tokens = sample(logits, [row(SamplingParams(), seed) for seed in range(8)]).tokens
    assert torch.equal(tokens, logits.argmax(dim=-1))
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=5.0, top_k=1), SamplingParams(temperature=0.0, top_p=0.1)]
)
def test_top_k_1_and_temperature_0_are_greedy(params):
    assert set(draws([0.1, 0.3, 0.2], params, 100)) == {1}


def test_of_equal_logits_the_first_wins_alone_and_beside_a_drawing_row():
    logits = [1.0, 3.0, 3.0, 3.0]
    assert one(logits, SamplingParams()) == 1
    rows = [row(SamplingParams()), row(SamplingParams(temperature=1.0))]
    assert sample(torch.tensor([logits, logits]), rows).tokens[0] == 1


def test_a_greedy_row_is_not_rounded_beside_a_drawing_row():
    """Two logits that differ, but whose probabilities are one float32."""
    logits = torch.tensor([[0.0, 1e-9], [0.0, 1.0]])
    greedy, drawing = row(SamplingParams()), row(SamplingParams(temperature=1.0))
    assert sample(logits[:1], [greedy]).tokens.item() == 1
    assert sample(logits, [greedy, drawing]).tokens[0] == 1


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-20, 1e-38, 1e-40, 1e-60])
def test_a_temperature_near_0_is_greedy(temperature):
    assert set(draws([1.0, 5.0, 2.0], SamplingParams(temperature=temperature), 20)) == {1}


def test_bfloat16_logits_are_taken():
    assert sample(torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.bfloat16), [row(SamplingParams())]).tokens.item() == 1


# --- what is drawn

LOGITS = [0.3, 2.0, -1.0, 1.4, 1.9, 0.0, -1.5, 1.0]
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 100},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 4, "top_p": 0.7},
    {"temperature": 1.5, "top_p": 0.95, "min_p": 0.5},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_distribution_of_the_parameters(setting):
    params = SamplingParams(**setting)
    assert_drawn_from(draws(LOGITS, params, 20_000), distribution(LOGITS, params))


def test_draws_of_one_request_follow_the_distribution_too():
    """One seed, 20 000 tokens: the numbers along a request are as good as those across requests."""
    params = SamplingParams(temperature=1.0)
    rows = [SamplingRow(params, 7, [0], range(n)) for n in range(20_000)]
    tokens = sample(torch.tensor(LOGITS).expand(len(rows), -1), rows).tokens.tolist()
    assert_drawn_from(tokens, distribution(LOGITS, params))


@pytest.mark.parametrize(("top_k", "kept"), [(1, {1}), (2, {1, 4}), (3, {1, 3, 4}), (-1, set(range(8)))])
def test_top_k_keeps_the_k_best(top_k, kept):
    assert set(draws(LOGITS, SamplingParams(temperature=1.0, top_k=top_k), 5000)) == kept


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-60, {2}), (0.01, {2}), (0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {2, 0, 1}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_token_that_crosses_p(top_p, kept):
    assert set(draws(log(0.3, 0.15, 0.5, 0.05), SamplingParams(temperature=1.0, top_p=top_p), 2000)) == kept


def test_top_p_counts_within_what_top_k_left():
    """Of 0.5, 0.3 and 0.15, 0.5 is 62.5 % of the best two."""
    logits = log(0.5, 0.3, 0.15, 0.05)
    assert set(draws(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.6), 2000)) == {0}
    assert set(draws(logits, SamplingParams(temperature=1.0, top_p=0.6), 2000)) == {0, 1}


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.0, {0, 1, 2, 3}), (0.2, {0, 1, 2}), (0.5, {0, 1}), (0.61, {0}), (1.0, {0})]
)
def test_min_p_is_relative_to_the_best(min_p, kept):
    assert set(draws(log(0.5, 0.3, 0.15, 0.05), SamplingParams(temperature=1.0, min_p=min_p), 2000)) == kept


def test_min_p_1_keeps_all_that_are_equally_good():
    assert set(draws([1.0, 2.0, 2.0, 0.0], SamplingParams(temperature=1.0, min_p=1.0), 2000)) == {1, 2}


def test_a_token_of_probability_0_is_never_drawn():
    assert set(draws([0.0, -math.inf, 0.0, -1e9], SamplingParams(temperature=10.0), 5000)) == {0, 2}


@pytest.mark.parametrize(("u", "token"), [(0.0, 0), (0.25, 1), (0.5, 2), (1 - 2**-24, 3)])
def test_a_number_on_a_border_belongs_to_the_next_token(u, token, monkeypatch):
    """Thus each token owns exactly its share of the numbers, and the last one still draws a kept token."""
    monkeypatch.setattr("common.sampling.batch.uniform", lambda seeds, counts: np.full(len(seeds), u))
    assert one([1.0, 1.0, 1.0, 1.0, 0.0], SamplingParams(temperature=1.0, top_k=4)) == token


def test_a_large_flat_vocabulary_is_drawn_from_end_to_end():
    vocab, count = 151_936, 64
    rows = [row(SamplingParams(temperature=1.0), seed) for seed in range(count)]
    tokens = sample(torch.zeros(1, vocab).expand(count, -1), rows).tokens.tolist()
    want = [math.floor(uniform(seed, 0) * vocab) for seed in range(count)]
    assert all(abs(t - w) <= 2 for t, w in zip(tokens, want, strict=True))


# --- the batch does not matter, the seed does


def mixed_rows():
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=10, top_p=0.9),
        SamplingParams(temperature=1.3, min_p=0.1, logprobs=True),
        SamplingParams(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(presence_penalty=1.0),
        SamplingParams(temperature=2.0, top_k=1),
    ]
    return [row(p, seed=100 + i, prompt=[1, 2, 3], output=[5] * i) for i, p in enumerate(params)]


def test_a_row_gets_the_same_token_in_every_batch():
    rows, logits = mixed_rows(), random_logits(7, 1000)
    alone = [sample(logits[i : i + 1], rows[i : i + 1]).tokens.item() for i in range(len(rows))]
    rng = random.Random(0)
    for _ in range(20):
        batch = rng.sample(range(len(rows)), rng.randint(1, len(rows)))
        tokens = sample(logits[batch], [rows[i] for i in batch]).tokens
        assert tokens.tolist() == [alone[i] for i in batch]


@pytest.mark.parametrize("u", [0.0, 1e-7, 0.5])
def test_a_row_that_is_not_truncated_keeps_its_rarest_tokens_beside_one_that_is(u, monkeypatch):
    """Their mass is lost in the sum of the others, and at u = 0 the first token is drawn, whatever its mass."""
    monkeypatch.setattr("common.sampling.batch.uniform", lambda seeds, counts: np.full(len(seeds), u))
    logits = torch.tensor([[-60.0, 0.0, 1.0, -45.0]])
    free = row(SamplingParams(temperature=1.0))
    others = [row(SamplingParams(temperature=1.0, **one)) for one in ({"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.1})]
    alone = sample(logits, [free]).tokens[0]
    assert alone == (0 if u == 0 else 1 if u < 0.2 else 2)
    for other in others:
        assert sample(logits.expand(2, -1), [free, other]).tokens[0] == alone


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    def text(seed):
        out = []
        for n in range(30):
            out.append(
                one(random_logits(1, 100, seed=n)[0].tolist(), SamplingParams(temperature=1.0), seed=seed, output=out)
            )
        return out

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_the_nth_token_depends_on_the_seed_and_n_alone():
    """A retracted request recomputes its output and goes on with the number it would have had."""
    params = SamplingParams(temperature=1.0)
    assert one(LOGITS, params, seed=3, output=[1, 2, 3]) == one(LOGITS, params, seed=3, output=[7, 7, 7], prompt=[4])
    assert len({one(LOGITS, params, seed=3, output=[0] * n) for n in range(30)}) > 1


# --- uniform

SEEDS = [0, 1, 2, 12345, -1, 2**31, 2**63, 2**64 + 5]


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_numbers_lie_in_0_to_1_and_are_exact_in_float32(seed):
    for n in range(1000):
        u = uniform(seed, n)
        assert 0 <= u < 1
        assert torch.tensor(u, dtype=torch.float32).item() == u


COUNT = 20_000
SEQUENCES = {
    "one seed": [uniform(0, n) for n in range(COUNT)],
    "another seed": [uniform(987_654_321, n) for n in range(COUNT)],
    "first numbers of all seeds": [uniform(seed, 0) for seed in range(COUNT)],
    "tenth numbers of all seeds": [uniform(seed, 9) for seed in range(COUNT)],
    "diagonal": [uniform(i, i) for i in range(COUNT)],
}

every_sequence = pytest.mark.parametrize("u", SEQUENCES.values(), ids=SEQUENCES.keys())


@every_sequence
def test_uniform_has_mean_a_half_and_variance_a_twelfth(u):
    mean = sum(u) / COUNT
    variance = sum((x - mean) ** 2 for x in u) / COUNT
    assert abs(mean - 1 / 2) < 5 * math.sqrt(1 / 12 / COUNT)
    assert abs(variance - 1 / 12) < 5 * math.sqrt(1 / 180 / COUNT)


@every_sequence
def test_uniform_fills_all_parts_of_0_to_1_equally(u):
    assert_drawn_from([math.floor(64 * x) for x in u], dict.fromkeys(range(64), 1 / 64))


@every_sequence
@pytest.mark.parametrize("lag", [1, 2, 7])
def test_uniform_numbers_do_not_follow_from_earlier_ones(u, lag):
    """Pairs fill an 8 by 8 board equally."""
    pairs = [(math.floor(8 * a), math.floor(8 * b)) for a, b in zip(u, u[lag:], strict=False)]
    assert_drawn_from(pairs, {(i, j): 1 / 64 for i in range(8) for j in range(8)})


@pytest.mark.parametrize("apart", [1, 2, 1 << 32])
def test_the_numbers_of_neighbouring_seeds_have_nothing_to_do_with_each_other(apart):
    pairs = [(math.floor(8 * uniform(5, n)), math.floor(8 * uniform(5 + apart, n))) for n in range(COUNT)]
    assert_drawn_from(pairs, {(i, j): 1 / 64 for i in range(8) for j in range(8)})


def test_seeds_are_not_one_sequence_shifted():
    """If seed s+1 began where seed s goes on, two requests could repeat each other's numbers."""
    seen = {}
    for seed in range(50):
        for n in range(200):
            seen.setdefault(tuple(uniform(seed, n + i) for i in range(3)), []).append((seed, n))
    assert max(map(len, seen.values())) == 1


def test_the_numbers_of_a_seed_stay_the_same():
    """Another constant would be as good, but every text that was drawn with a seed would be another one."""
    known = {
        (0, 0): 0.6770604252815247, (0, 1): 0.7411795854568481, (1, 0): 0.9557037949562073,
        (12345, 678): 0.007584273815155029, (2**64 - 1, 2**20): 0.9292557239532471,
    }  # fmt: skip
    assert {key: uniform(*key) for key in known} == known
    seeds, counts = (np.array(column, dtype=np.uint64) for column in zip(*known, strict=True))
    assert uniform(seeds, counts).tolist() == list(known.values())
