import math
import random
from dataclasses import dataclass, replace

import pytest
import torch

from common.sampling.batch import SamplingBatch
from common.sampling.edits import BUILT_IN
from common.sampling.params import SamplingParams
from common.sampling.sampler import sample
from tests.common.sampling.rows import draws, one, random_logits, row

LOGITS = [0.3, 2.0, -1.0, 1.4, 1.9, 0.0, -1.5, 1.0]


def edited(logits, params, prompt, output, ends=()):
    """From the definitions, token by token, in vLLM's order."""
    out = []
    for t, x in enumerate(logits):
        if params.allowed_token_ids is not None and t not in params.allowed_token_ids:
            x = -math.inf  # noqa: PLW2901
        for *beginning, last in params.bad_words_ids:
            if t == last and output[len(output) - len(beginning) :] == beginning and len(beginning) <= len(output):
                x = -math.inf  # noqa: PLW2901
        if t in ends and len(output) < params.min_new_tokens:
            x = -math.inf  # noqa: PLW2901
        x += dict(params.logit_bias).get(t, 0)  # noqa: PLW2901
        if t in output or t in prompt:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty  # noqa: PLW2901
        if t in output:
            x = x - params.presence_penalty - params.frequency_penalty * output.count(t)  # noqa: PLW2901
        out.append(x)
    return out


def after_edits(logits, *rows):
    return SamplingBatch(list(rows)).edited(torch.tensor(logits)).tolist()


# --- penalties

PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.4},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize(("prompt", "output"), [([1, 2], []), ([1, 2], [4, 4, 4, 3]), ([6], [6, 6, 1])])
def test_edits_come_before_temperature_and_cuts(penalty, prompt, output):
    plain = SamplingParams(temperature=0.7, top_k=6)
    params = replace(plain, **penalty)
    with_penalty = draws(LOGITS, params, 3000, prompt, output)
    assert with_penalty == draws(edited(LOGITS, params, prompt, output), plain, 3000, prompt, output)


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_greedy_is_penalized_too(penalty):
    prompt, output = [1, 2], [4, 4, 3]
    params = SamplingParams(**penalty)
    want = edited(LOGITS, params, prompt, output)
    assert one(LOGITS, params, prompt=prompt, output=output) == want.index(max(want))


def test_presence_and_frequency_leave_the_prompt_alone():
    assert one([0.0, 1.0], SamplingParams(presence_penalty=2.0, frequency_penalty=2.0), prompt=[1, 1, 1]) == 1


def test_a_request_without_prompt_and_output_has_nothing_to_penalize():
    assert (
        after_edits([LOGITS], row(SamplingParams(repetition_penalty=1.5), prompt=[])) == torch.tensor([LOGITS]).tolist()
    )


# --- the others


def test_only_allowed_tokens_are_drawn():
    assert set(draws(LOGITS, SamplingParams(temperature=5.0, allowed_token_ids=[6, 2, 6]), 200)) == {2, 6}
    assert one(LOGITS, SamplingParams(allowed_token_ids=[6, 2])) == 2


def test_a_bias_is_added_to_the_logit():
    got = after_edits([LOGITS], row(SamplingParams(logit_bias={0: 2.5, 7: -100, 3: 0})))[0]
    torch.testing.assert_close(got, [2.8, *LOGITS[1:7], -99.0])


@pytest.mark.parametrize(
    ("output", "forbidden"),
    [
        ([], {7}),  # a single token is never drawn
        ([1], {7, 4}),  # 1 4
        ([2, 1], {7, 4}),
        ([1, 2], {7, 0}),  # 1 2 0, 2 0
        ([3, 2], {7, 0}),  # 2 0
        ([1, 3], {7}),
        ([0, 1, 2, 5], {7}),
    ],
)
def test_the_token_that_would_complete_a_bad_word_is_not_drawn(output, forbidden):
    params = SamplingParams(bad_words_ids=[[7], [1, 4], [1, 2, 0], [2, 0]])
    got = after_edits([LOGITS], row(params, prompt=[1, 2], output=output))[0]
    assert {t for t, x in enumerate(got) if x == -math.inf} == forbidden


def test_the_prompt_is_no_part_of_a_bad_word():
    assert after_edits([LOGITS], row(SamplingParams(bad_words_ids=[[1, 4]]), prompt=[1]))[0][4] == pytest.approx(1.9)


def test_no_end_token_is_drawn_before_enough_tokens_are_out():
    params = SamplingParams(min_new_tokens=3)
    for out in range(6):
        assert (one(LOGITS, params, output=[0] * out, end_ids={1, 4}) in (1, 4)) == (out >= 3)


def test_tokens_that_are_on_their_way_count_as_out():
    """min_new_tokens needs their number only, so that steps may run ahead."""
    params = SamplingParams(min_new_tokens=3)
    assert not params.needs_last_token
    assert [one(LOGITS, params, output=[0], ahead=ahead, end_ids=[1]) for ahead in (0, 1, 2)] == [4, 4, 1]


# --- together


def random_params(rng, vocab):
    def ids(n):
        return [rng.randrange(vocab) for _ in range(n)]

    chosen = {
        "allowed_token_ids": ids(rng.randint(3, 12)),
        "bad_words_ids": [ids(rng.randint(1, 3)) for _ in range(rng.randint(1, 6))],
        "min_new_tokens": rng.randint(1, 5),
        "logit_bias": {t: rng.uniform(-3, 3) for t in set(ids(4))},
        "repetition_penalty": rng.choice([0.7, 1.4]),
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
    }
    return SamplingParams(**{name: value for name, value in chosen.items() if rng.random() < 0.4})


@pytest.mark.parametrize("seed", range(30))
def test_any_mix_of_edits_is_that_of_the_rows_one_by_one_while_the_batch_goes_on(seed):
    """The batch is made once; outputs grow, as in a decode batch that stays the same."""
    rng, vocab = random.Random(seed), 14
    outputs = [[rng.randrange(vocab) for _ in range(rng.randint(0, 4))] for _ in range(rng.randint(1, 6))]
    rows = [
        replace(
            row(random_params(rng, vocab), prompt=[rng.randrange(vocab) for _ in range(3)], end_ids={2, 5}),
            output_ids=o,
        )
        for o in outputs
    ]
    batch = SamplingBatch(rows)
    for step in range(5):
        logits = random_logits(len(rows), vocab, seed=step)
        got = batch.edited(logits)
        want = [edited(logits[i].tolist(), r.params, r.prompt_ids, r.output_ids, {2, 5}) for i, r in enumerate(rows)]
        torch.testing.assert_close(got, torch.tensor(want))
        batch.advance()
        for output in outputs:
            output.append(rng.randrange(vocab))


def test_an_edit_of_one_row_leaves_the_others_alone():
    logits, everything = random_logits(3, 8), SamplingParams(
        allowed_token_ids=[1, 2], bad_words_ids=[[1]], min_new_tokens=2, logit_bias={3: 5}, repetition_penalty=2.0
    )  # fmt: skip
    got = SamplingBatch([row(SamplingParams()), row(everything, end_ids=[2]), row(SamplingParams())]).edited(logits)
    assert torch.equal(got[[0, 2]], logits[[0, 2]])
    assert not torch.equal(got[1], logits[1])


def test_a_batch_without_edits_reads_the_logits_where_they_are():
    logits = random_logits(3, 8).to(torch.bfloat16)
    assert SamplingBatch([row(SamplingParams(temperature=1.0, logprobs=True))] * 3).edited(logits) is logits


def test_logits_are_not_written_to():
    logits = torch.tensor([LOGITS])
    params = SamplingParams(temperature=0.5, repetition_penalty=1.5, logit_bias={1: 5}, allowed_token_ids=[1, 2])
    sample(logits, [row(params, output=[1])])
    assert torch.equal(logits, torch.tensor([LOGITS]))


def test_the_order_of_the_kinds_is_the_same_in_batch_and_request():
    params = SamplingParams(
        frequency_penalty=1, logit_bias={1: 1}, min_new_tokens=1, bad_words_ids=[[1]], allowed_token_ids=[1]
    )
    assert tuple(type(edit) for edit in params.edits) == BUILT_IN


# --- a capability's own


@dataclass(frozen=True)
class OnlyAfterItself:
    """A mask as a grammar's: from token t only t + 1 may follow."""

    needs_last_token = True

    @classmethod
    def together(cls, members):
        return cls.Applied(members)

    class Applied:
        def __init__(self, members):
            self.members = members

        def apply(self, logits, advanced):
            for i, _, history in self.members:
                keep = logits[i, history.output_ids[-1] + 1].clone()
                logits[i] = -torch.inf
                logits[i, history.output_ids[-1] + 1] = keep


def test_a_capability_adds_an_edit_of_its_own():
    rows = [
        row(SamplingParams(temperature=1.0), output=[3], edits=[OnlyAfterItself()]),
        row(SamplingParams(), output=[3]),
        row(SamplingParams(logit_bias={6: 100}), output=[5], edits=[OnlyAfterItself()]),
    ]
    batch = SamplingBatch(rows)
    assert batch.needs_last_token
    assert sample(torch.tensor([LOGITS] * 3), batch).tokens.tolist() == [4, 1, 6]


def test_a_bias_does_not_bring_back_what_a_capability_forbids():
    params = SamplingParams(logit_bias={0: 100})
    assert one(LOGITS, params, output=[3], edits=[OnlyAfterItself()]) == 4
