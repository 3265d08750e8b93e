"""Tokens drawn by the kernels: those of the plain sampler, whatever the logits look like, and in any company.

With small parts a small vocabulary has more of them than the shortlist takes, so that all ways of drawing are walked
without a GPU, too; there a few of the cases, as the interpreter takes seconds for a row whose tokens are not all in the
shortlist. test_kernels.py draws from large vocabularies.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sampling.batch import SamplingBatch
from common.sampling.params import SamplingParams
from common.sampling.sampler import _sample, probabilities
from tests.common.kernels.where import DEVICE, GPU, kernel
from tests.common.sampling.rows import row

pytestmark = kernel
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = {"CHUNK": 256, "PART": 8, "KEEP": 4}  # the shortlist has 32 tokens and holds the best 4
V = 300  # two chunks, the last not full


@pytest.fixture
def small(monkeypatch):
    from common.kernels import sampling  # noqa: PLC0415

    for name, size in SIZES.items():
        monkeypatch.setattr(sampling, name, size)


# no top-p by which a round number of equal tokens is a round number: float32 and float64 may differ by one there
WAYS = {
    "greedy": {}, "plain": {"temperature": 1.0}, "k = 1": {"temperature": 1.0, "top_k": 1},
    "k = 2": {"temperature": 1.0, "top_k": 2}, "k = 4, all that are short-listed": {"temperature": 1.5, "top_k": 4},
    "k = 5, one more": {"temperature": 1.5, "top_k": 5}, "k = 40, p": {"temperature": 0.7, "top_k": 40, "top_p": 0.8137},
    "k = V - 1": {"temperature": 2.0, "top_k": V - 1}, "k = V": {"temperature": 2.0, "top_k": V},
    "k > V, p": {"temperature": 2.0, "top_k": V + 1, "top_p": 0.7137}, "k, p": {"temperature": 1.0, "top_k": 3, "top_p": 0.6137},
    "p, narrow": {"temperature": 0.4, "top_p": 0.5137}, "p, wide": {"temperature": 3.0, "top_p": 0.9137},
    "p, nearly 1": {"temperature": 1.0, "top_p": 0.999}, "min-p, narrow": {"temperature": 1.0, "min_p": 0.5},
    "min-p, wide": {"temperature": 3.0, "min_p": 0.05}, "p, min-p": {"temperature": 2.0, "top_p": 0.9137, "min_p": 0.1},
    "k, p, min-p": {"temperature": 2.0, "top_k": 30, "top_p": 0.9137, "min_p": 0.3},
    "hot, k, min-p": {"temperature": 50.0, "top_k": 100, "min_p": 0.99},
}  # fmt: skip


def random(vocab: int) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 3


def in_steps(vocab: int) -> torch.Tensor:
    """A dozen values, so that there are ties at every border, in all chunks."""
    return random(vocab).round()


def only(*allowed: int):
    def masked(vocab: int) -> torch.Tensor:
        logits = torch.full((vocab,), -torch.inf)
        at = [i for i in allowed if i < vocab]
        logits[at] = random(vocab)[at]
        return logits

    return masked


LOGITS = {
    "random": random, "in steps": in_steps, "all equal": lambda vocab: torch.full((vocab,), -2.5),
    "large": lambda vocab: random(vocab) * 1e3, "tiny": lambda vocab: random(vocab) * 1e-6,
    "around 0": lambda vocab: random(vocab).sign() * 0.0, "one is allowed": only(3),
    "a few are": only(0, 2, 130, 255, 256, 290, 299),
    "in order": lambda vocab: torch.arange(vocab) / 16, "backwards": lambda vocab: -torch.arange(vocab) / 16,
}  # fmt: skip
BAD = {
    "NaN": (math.nan, 7, -1), "infinity": (math.inf, V - 1, -1), "nothing is allowed": (-math.inf, slice(None), -2)
}  # fmt: skip


def assert_as_plain(logits: torch.Tensor, batch: SamplingBatch) -> None:
    """Each token is one that may be drawn, and the one that the random number falls on; the border is 1e-5 wide. A row
    that the shortlist does not settle keeps the very tokens that the plain sampler keeps."""
    from common.kernels import sampling  # noqa: PLC0415

    searched, truncate = [], sampling._truncate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_truncate", lambda *args: searched.append(truncate(*args)) or searched[0])
        tokens, drawn = (each.cpu() for each in sampling.sample(logits.to(DEVICE), batch))
    here = SamplingBatch(batch.rows)
    want, _ = _sample(logits.float(), here)
    assert torch.equal(tokens, drawn)
    p = probabilities(logits.float(), want, here).double()
    to, own = p.cumsum(1).gather(1, tokens.unsqueeze(1)), p.gather(1, tokens.unsqueeze(1))
    u = here.uniforms(p.device).double().unsqueeze(1)
    greedy = torch.tensor([one.params.greedy for one in batch.rows])
    fits = (own > 0) & (to - own - 1e-5 <= u) & (u <= to + 1e-5)
    right = torch.where(greedy, tokens == want, fits.squeeze(1))
    assert right.all(), [(batch.rows[i].params, tokens[i], want[i]) for i in (~right).nonzero().flatten().tolist()]
    for limit, quota in searched:
        for i, (t, left, one) in enumerate(zip(limit.tolist(), quota.tolist(), batch.rows, strict=True)):
            if not one.params.greedy and one.params.truncated and left:
                x = logits[i].float()
                kept = (x > t) | ((x == t) & ((x == t).cumsum(0) <= left))
                heavy = ((x - x.max()) / one.params.temperature).exp() > 1e-30  # a p of 0 says something there only
                assert torch.equal(kept[heavy], p[i][heavy] > 0), one.params


def of_ways(*names: str) -> SamplingBatch:
    return SamplingBatch([row(SamplingParams(**WAYS[name]), seed, [1]) for seed, name in enumerate(names or WAYS)])


WITHOUT_A_GPU = [
    ("in steps", torch.bfloat16, tuple(WAYS)), ("random", torch.float32, ("k = 40, p", "k = 4, all that are short-listed")),
    ("all equal", torch.float16, ("k, p", "p, wide")), ("a few are", torch.float32, ("k = 5, one more", "p, narrow")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype", "ways"),
    [(kind, dtype, tuple(WAYS)) for kind in LOGITS for dtype in DTYPES] if GPU else WITHOUT_A_GPU,
)
def test_ways_to_draw_in_one_batch(small, kind, dtype, ways):
    batch = of_ways(*ways)
    assert_as_plain(LOGITS[kind](V).to(dtype).expand(len(batch), V).contiguous(), batch)


@pytest.mark.parametrize("vocab", [2, 31, 256, 257])
def test_vocabularies_of_other_sizes(small, vocab):
    """Fewer tokens than k, fewer parts than the shortlist takes, one chunk that is full, a chunk of one token."""
    batch = of_ways() if GPU else of_ways("plain", "k = 2", "k > V, p")
    assert_as_plain(torch.stack([in_steps(vocab) + i % 2 for i in range(len(batch))]).bfloat16(), batch)


def test_as_many_parts_as_on_a_gpu():
    """The sizes that are used, and a vocabulary with two more parts than the shortlist takes."""
    ways = [
        {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 200},
    ]
    batch = SamplingBatch([row(SamplingParams(**way), seed) for seed, way in enumerate(ways)])
    assert_as_plain(torch.stack([random(8200 + i)[:8200] for i in range(len(batch))]).bfloat16(), batch)


def test_rows_without_a_token_cost_the_others_nothing(small):
    from common.kernels import sampling  # noqa: PLC0415

    names = tuple(WAYS) if GPU else ("greedy", "k = 2", "p, wide")
    each = [(name, bad) for name in names for bad in (*BAD, None)]
    batch = of_ways(*(name for name, _ in each))
    logits = torch.stack([random(V)] * len(batch)).bfloat16()
    for i, (_, bad) in enumerate(each):
        if bad:
            number, at, _ = BAD[bad]
            logits[i, at] = number
    tokens, drawn = (one.tolist() for one in sampling.sample(logits.to(DEVICE), batch))
    good = [i for i, (_, bad) in enumerate(each) if not bad]
    assert_as_plain(logits[good], SamplingBatch([batch.rows[i] for i in good]))
    alone = sampling.sample(logits[good].to(DEVICE), SamplingBatch([batch.rows[i] for i in good]))[0].tolist()
    assert [tokens[i] for i in good] == [drawn[i] for i in good] == alone
    assert [drawn[i] for i, (_, bad) in enumerate(each) if bad] == [BAD[bad][2] for _, bad in each if bad]
    assert not any(tokens[i] for i, (_, bad) in enumerate(each) if bad)


def test_a_row_draws_what_it_draws_alone(small):
    from common.kernels import sampling  # noqa: PLC0415

    batch = of_ways() if GPU else of_ways("plain", "greedy", "k = 2", "p, narrow", "k = 5, one more")
    for dtype in (torch.float32, torch.bfloat16) if GPU else (torch.bfloat16,):
        logits = torch.stack([random(V + i)[:V] for i in range(len(batch))]).to(DEVICE, dtype)
        together = sampling.sample(logits, batch)[0]
        for i, own in enumerate(batch.rows):
            assert sampling.sample(logits[i : i + 1], SamplingBatch([own]))[0] == together[i], own.params


@settings(deadline=None, max_examples=200 if GPU else 5)
@given(st.data())
def test_any_logits_any_way(data):
    from common.kernels import sampling  # noqa: PLC0415

    number = st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.5, 1.0, 1.5]) | st.floats(-20, 20, width=16)
    logits = data.draw(st.lists(number, min_size=2, max_size=100).filter(lambda those: max(those) > -math.inf))
    params = data.draw(
        st.builds(
            SamplingParams, temperature=st.sampled_from([0.3, 1.0, 4.0]), top_k=st.integers(2, 20) | st.integers(21, 160),
            top_p=st.sampled_from([0.0537, 0.3737, 0.8337, 1.0]), min_p=st.sampled_from([0.0, 0.03, 0.6]),
        )
    )  # fmt: skip
    dtype = data.draw(st.sampled_from(DTYPES))
    logits = torch.tensor([[-math.inf] * (V - 100) + logits + [-math.inf] * (100 - len(logits))])  # in both chunks
    with pytest.MonkeyPatch.context() as patch:
        for name, size in SIZES.items():
            patch.setattr(sampling, name, size)
        assert_as_plain(logits.to(dtype), SamplingBatch([row(params, data.draw(st.integers(0, 99)))]))
