from dataclasses import replace

import pytest
import torch

from common.sampling.logprobs import Logprobs, log_softmax
from common.sampling.params import SamplingParams
from common.sampling.sampler import Drawn, sample
from tests.common.sampling.rows import random_logits, row


def take(logits, rows):
    return Drawn(sample(logits, rows)).take()


def reference(logits, token, top, ids):
    """Of one row, from the definitions."""
    logprobs = logits.float().log_softmax(dim=-1).tolist()
    best_first = sorted(range(len(logprobs)), key=lambda t: (-logprobs[t], t))
    rank = 1 + sum(x > logprobs[token] for x in logprobs)
    best = [(t, logprobs[t]) for t in best_first[:top]]
    return logprobs[token], rank, best, [(t, logprobs[t]) for t in ids]


def assert_told(told, logits, top, ids):
    logprob, rank, best, wanted = reference(logits, told.token, top, ids)
    assert told.logprob == pytest.approx(logprob, abs=1e-5)
    assert told.rank == rank
    assert [t for t, _ in told.top] == [t for t, _ in best]
    assert [x for _, x in told.top] == pytest.approx([x for _, x in best], abs=1e-5)
    assert [t for t, _ in told.wanted] == [t for t, _ in wanted]
    assert [x for _, x in told.wanted] == pytest.approx([x for _, x in wanted], abs=1e-5)


@pytest.mark.parametrize("vocab", [1023, 1024, 1025, 1026])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_begins_at_a_multiple_of_16_bytes(vocab, dtype, monkeypatch):
    """By its place there a CUDA kernel chooses in which order it adds up; the numbers are those of the row alone."""
    logits = random_logits(3, vocab).to(dtype)
    logits[1, 5:-1] = -torch.inf
    plain, widths = torch.Tensor.log_softmax, []

    def spy(x, dim):
        widths.append((x.stride(0), x.dtype, x.data_ptr() % 16))
        return plain(x, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", spy)
    got = log_softmax(logits)
    assert widths == [(-(-vocab // 4) * 4, torch.float32, 0)]
    torch.testing.assert_close(got, plain(logits.float(), -1), atol=1e-6, rtol=1e-6)
    assert_told(take(logits, [row(SamplingParams(logprobs=True, top_logprobs=3))] * 3).logprobs[1], logits[1], 3, ())


def test_no_logprobs_unless_asked():
    rows = [row(SamplingParams()), row(SamplingParams(temperature=1.0))]
    assert sample(random_logits(2, 10), rows).logprobs is None
    assert take(random_logits(2, 10), rows).logprobs == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_gets_what_it_asks_for(dtype):
    asked = [(0, []), (5, []), None, (1, [3]), (0, [7, 7, 0]), None, (300, list(range(20)))]
    rows = [
        row(SamplingParams(temperature=1.5) if one is None else SamplingParams(
            temperature=1.5, logprobs=True, top_logprobs=one[0], token_ids_logprob=one[1]), seed)
        for seed, one in enumerate(asked)
    ]  # fmt: skip
    logits = random_logits(len(rows), 300).to(dtype)
    taken = take(logits, rows)
    for i, one in enumerate(asked):
        if one is None:
            assert taken.logprobs[i] is None
        else:
            assert taken.logprobs[i].token == taken.tokens[i]
            assert_told(taken.logprobs[i], logits[i], *one)


def test_logprobs_are_the_models_own():
    """Of the raw logits: temperature, cuts and edits choose the token but do not change its log-probability."""
    logits = random_logits(4, 10)
    asks = SamplingParams(logprobs=True, top_logprobs=10)
    rows = [
        row(asks),
        row(replace(asks, temperature=0.1, top_k=2)),
        row(replace(asks, repetition_penalty=2.0), output=[1]),
        row(replace(asks, logit_bias={4: 50})),
    ]
    taken = take(logits, rows)
    assert taken.tokens[3] == 4
    for told, own in zip(taken.logprobs, logits, strict=True):
        assert_told(told, own, 10, [])


def test_logprobs_do_not_change_the_token():
    rows = [row(SamplingParams(temperature=t), seed) for seed, t in enumerate([0, 0.5, 1, 2])]
    told = [replace(r, params=replace(r.params, logprobs=True, top_logprobs=2)) for r in rows]
    logits = random_logits(4, 1000)
    assert take(logits, rows).tokens == take(logits, told).tokens


def test_of_equal_tokens_the_lower_ids_are_told_first_and_share_a_rank():
    told = take(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), [row(SamplingParams(logprobs=True, top_logprobs=2))]).logprobs[0]
    assert told.rank == 1
    assert [token for token, _ in told.top] == [1, 2]
    tied = Logprobs(torch.tensor([[1.0, 2.0, 2.0, 2.0]] * 2), torch.tensor([3, 0]), [0, 0], [[], []])
    tied.download()
    assert [one.rank for one in tied.take()] == [1, 4]
