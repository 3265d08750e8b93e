"""A batch that changes by rows is the batch that would be made anew."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sampling.batch import SamplingBatch
from common.sampling.params import SamplingParams
from common.sampling.sampler import sample
from tests.common.sampling.rows import random_logits, row

VOCABULARY = 20
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.9),
    SamplingParams(temperature=1.0, min_p=0.1, logprobs=True, top_logprobs=2),
    SamplingParams(logit_bias=((3, 5.0),)),
    SamplingParams(temperature=1.0, min_new_tokens=4, allowed_token_ids=(1, 2, 3)),
    SamplingParams(temperature=1.0, presence_penalty=1.5),
]


class Asker:
    """A request: its tokens grow, some of them drawn and not looked at yet."""

    def __init__(self, params, seed, output, ahead):
        self.params, self.seed, self.output, self.ahead = params, seed, output, ahead

    def row(self):
        return row(self.params, self.seed, prompt=(4, 5), output=self.output, ahead=self.ahead, end_ids=[2])


def assert_same(batch, askers):
    anew = SamplingBatch([asker.row() for asker in askers])
    device = torch.device("cpu")
    for told in (batch.uniforms(device), anew.uniforms(device)), (batch.columns(device), anew.columns(device)):
        assert torch.equal(*told)
    numbers = batch.numbers(device).clone()
    numbers[1] += batch.advanced
    assert torch.equal(numbers, anew.numbers(device))
    for name in ("all_greedy", "truncated", "most_kept", "largest_top_k", "widest_top_p", "asked", "needs_last_token"):
        assert getattr(batch, name) == getattr(anew, name), name
    assert [one.params for one in batch.rows] == [asker.params for asker in askers]
    logits = random_logits(len(askers), VOCABULARY)
    assert torch.equal(batch.edited(logits), anew.edited(logits))
    got, want = sample(logits, batch), sample(logits, anew)
    assert torch.equal(got.drawn, want.drawn)
    assert (got.logprobs and got.logprobs.take()) == (want.logprobs and want.logprobs.take())


def askers(params):
    one = st.builds(
        Asker, st.sampled_from(params), st.integers(-5, 5), st.lists(st.integers(0, 19), max_size=3), st.just(0)
    )
    return st.lists(one, max_size=4)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_rows_leave_join_and_move_on_as_if_the_batch_were_made_anew(data):
    """Between two steps some tokens are looked at (they stand in `output`) and some are not (they count as `ahead`)."""
    there = data.draw(askers(PARAMS[:-1]))
    batch = SamplingBatch([one.row() for one in there])
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            batch.advance()
            for one in there:
                if data.draw(st.booleans()):
                    one.output.append(7)
                else:
                    one.ahead += 1
        order = data.draw(st.permutations(range(len(there))))
        keep = np.array(order[: data.draw(st.integers(0, len(there)))], dtype=np.int64)
        batch.filter_batch(keep)
        joining = data.draw(askers(PARAMS))
        batch.merge_batch([one.row() for one in joining])
        there = [there[i] for i in keep] + joining
        if there:
            assert_same(batch, there)
        if batch.needs_last_token:
            return  # who draws from it makes it anew each time: its rows must know what was drawn
    assert len(batch) == len(there)


def test_who_stays_is_not_looked_at_again():
    """A batch of 256 from which one leaves and which one joins asks nobody but the one that joins."""

    class Watched(SamplingParams):
        looks = 0

        def __getattribute__(self, name):
            Watched.looks += 1
            return super().__getattribute__(name)

    watched = Watched(temperature=1.0, top_p=0.9)
    batch = SamplingBatch([row(watched, seed) for seed in range(256)])
    Watched.looks = 0
    batch.filter_batch(np.delete(np.arange(256), 100))
    batch.merge_batch([row(SamplingParams(temperature=0.5), 1000)])
    assert (Watched.looks, len(batch)) == (0, 256)
    assert batch.columns(torch.device("cpu"))[0].tolist() == [1.0] * 255 + [0.5]
