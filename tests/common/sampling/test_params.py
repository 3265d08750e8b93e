import math
from collections import UserDict
from dataclasses import asdict, fields, replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sampling.params import MASK64, SamplingParams
from tests.common.sampling.rows import one

HUGE = 10**400
REFUSED = [
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 1"),
    ({"max_new_tokens": 2.0}, "max_new_tokens=2.0 must be a whole number"),
    ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number"),
    ({"max_new_tokens": 2**31}, "max_new_tokens=2147483648 must be at most 2147483647"),
    ({"temperature": -0.1}, "temperature=-0.1 must be in [0, 1000]; 0 is greedy"),
    ({"temperature": math.inf}, "temperature=inf must be in [0, 1000]; 0 is greedy"),
    ({"temperature": math.nan}, "temperature=nan must be in [0, 1000]; 0 is greedy"),
    ({"temperature": HUGE}, f"temperature=1{59 * '0'}... (401 characters) must be in [0, 1000]; 0 is greedy"),
    ({"temperature": "1"}, "temperature='1' must be a number; 0 is greedy"),
    ({"temperature": None}, "temperature=None must be a number; 0 is greedy"),
    ({"temperature": False}, "temperature=False must be a number; 0 is greedy"),
    ({"temperature": np.bool_(True)}, "temperature=np.True_ must be a number; 0 is greedy"),
    ({"temperature": 1j}, "temperature=1j must be a number; 0 is greedy"),
    ({"temperature": np.array([0.5])}, "temperature=array([0.5]) must be a number; 0 is greedy"),
    ({"top_k": 0}, "top_k=0 must be at least 1, or -1 for no limit"),
    ({"top_k": -2}, "top_k=-2 must be at least -1, or -1 for no limit"),
    ({"top_k": 2.0}, "top_k=2.0 must be a whole number, or -1 for no limit"),
    ({"top_p": 0.0}, "top_p=0.0 must be in (0, 1]; 1 keeps every token"),
    ({"top_p": 1.01}, "top_p=1.01 must be in (0, 1]; 1 keeps every token"),
    ({"top_p": math.nan}, "top_p=nan must be in (0, 1]; 1 keeps every token"),
    ({"min_p": -0.1}, "min_p=-0.1 must be in [0, 1]; 0 keeps every token"),
    ({"min_p": 1.5}, "min_p=1.5 must be in [0, 1]; 0 keeps every token"),
    ({"min_p": math.nan}, "min_p=nan must be in [0, 1]; 0 keeps every token"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be in [0.01, 100]; 1 is none"),
    ({"repetition_penalty": 1e-39}, "repetition_penalty=1e-39 must be in [0.01, 100]; 1 is none"),
    ({"repetition_penalty": -HUGE}, f"repetition_penalty=-1{58 * '0'}... (402 characters) must be in [0.01, 100]; 1 is none"),
    ({"repetition_penalty": math.nan}, "repetition_penalty=nan must be in [0.01, 100]; 1 is none"),
    ({"presence_penalty": 2.1}, "presence_penalty=2.1 must be in [-2, 2]; 0 is none"),
    ({"presence_penalty": Decimal("sNaN")}, "presence_penalty=Decimal('sNaN') must be in [-2, 2]; 0 is none"),
    ({"frequency_penalty": -2.1}, "frequency_penalty=-2.1 must be in [-2, 2]; 0 is none"),
    ({"frequency_penalty": math.nan}, "frequency_penalty=nan must be in [-2, 2]; 0 is none"),
    ({"seed": "x"}, "seed='x' must be a whole number"),
    ({"seed": 5.0}, "seed=5.0 must be a whole number"),
    ({"seed": True}, "seed=True must be a whole number"),
    ({"ignore_eos": 1}, "ignore_eos=1 must be True or False"),
    ({"logprobs": "no"}, "logprobs='no' must be True or False"),
    ({"stop_token_ids": 5}, "stop_token_ids=5 must be token ids, whole numbers from 0"),
    ({"stop_token_ids": "45"}, "stop_token_ids='45' must be token ids, whole numbers from 0"),
    ({"stop_token_ids": [4.7]}, "stop_token_ids=[4.7] must be token ids, whole numbers from 0"),
    ({"stop_token_ids": [True]}, "stop_token_ids=[True] must be token ids, whole numbers from 0"),
    ({"stop_token_ids": [3, -1]}, "stop_token_ids=[3, -1] must be token ids, whole numbers from 0; -1 is none"),
    ({"stop_token_ids": range(1 << 40)}, "stop_token_ids has 1099511627776 items, and may have 1048576"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 must be at most 8 (max_new_tokens=8)"),
    ({"min_new_tokens": -1}, "min_new_tokens=-1 must be at least 0 (max_new_tokens=128)"),
    ({"logit_bias": {1: 100.5}}, "logit_bias of token 1=100.5 must be in [-100, 100]"),
    ({"logit_bias": {"x": 1}}, "logit_bias=['x'] must be token ids, whole numbers from 0"),
    ({"logit_bias": {"5": 1, 5: 2}}, "logit_bias={'5': 1, 5: 2} names a token twice"),
    ({"logit_bias": [1, 2]}, "logit_bias=[1, 2] must be {token id: a number}"),
    ({"allowed_token_ids": []}, "allowed_token_ids is empty: no token could be drawn; leave it out to allow all"),
    ({"bad_words_ids": [[1], []]}, "bad_words_ids=[[1], []]: an empty sequence forbids nothing; leave it out"),
    ({"bad_words_ids": [1, 2]}, "bad_words_ids=1 must be token ids, whole numbers from 0"),
    ({"bad_words_ids": 7}, "bad_words_ids=7 must be sequences of token ids"),
    ({"top_logprobs": 3}, "top_logprobs=3 needs logprobs=True"),
    ({"token_ids_logprob": (3,)}, "token_ids_logprob=(3,) needs logprobs=True"),
    ({"top_logprobs": -1, "logprobs": True}, "top_logprobs=-1 must be at least 0"),
    ({"prompt_logprobs": -1}, "prompt_logprobs=-1 must be at least 0"),
    ({"logprob_start": -1}, "logprob_start=-1 must be at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_value_of_a_wrong_kind_or_outside_its_range_is_refused_in_one_line(values, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the whole message is compared
        SamplingParams(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "values",
    [{"max_new_tokens": 1}, {"temperature": 0.0}, {"temperature": 1000}, {"top_k": 1}, {"top_k": -1}, {"top_p": 1.0},
     {"min_p": 0.0}, {"min_p": 1.0}, {"presence_penalty": -2.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0},
     {"repetition_penalty": 0.01}, {"repetition_penalty": 100}, {"min_new_tokens": 128}, {"logit_bias": {0: -100, 1: 100}},
     {"prompt_logprobs": 0}],
    ids=str,
)  # fmt: skip
def test_the_ends_of_a_range_belong_to_it(values):
    params = SamplingParams(**values)
    for name, value in values.items():
        assert getattr(params, name) == (tuple(value.items()) if name == "logit_bias" else value)


def test_the_defaults_are_a_plain_greedy_request():
    assert SamplingParams() == SamplingParams(
        max_new_tokens=128, temperature=0, top_k=-1, top_p=1, min_p=0, repetition_penalty=1, presence_penalty=0,
        frequency_penalty=0, seed=None, stop_token_ids=(), ignore_eos=False, min_new_tokens=0, logit_bias=(),
        allowed_token_ids=None, bad_words_ids=(), logprobs=False, top_logprobs=0, token_ids_logprob=(),
        prompt_logprobs=None, logprob_start=0,
    )  # fmt: skip
    assert SamplingParams().edits == ()


def test_numbers_of_other_libraries_become_plain_ones():
    params = SamplingParams(
        max_new_tokens=np.int64(5), temperature=Fraction(1, 2), top_k=torch.tensor(3), top_p=Decimal("0.5"),
        min_p=np.float32(0.25), presence_penalty=torch.tensor(0.5), seed=np.uint8(7), ignore_eos=np.bool_(True),
        stop_token_ids=np.array([1, 2]), allowed_token_ids=torch.tensor([3, 1]), bad_words_ids=[range(2), {4}],
        logit_bias=UserDict({np.int32(9): 1, "8": Fraction(3, 2)}),
    )  # fmt: skip
    plain = SamplingParams(
        max_new_tokens=5, temperature=0.5, top_k=3, top_p=0.5, min_p=0.25, presence_penalty=0.5, seed=7, ignore_eos=True,
        stop_token_ids=(1, 2), allowed_token_ids=(3, 1), bad_words_ids=((0, 1), (4,)), logit_bias=((9, 1.0), (8, 1.5)),
    )  # fmt: skip
    assert params == plain
    assert hash(params) == hash(plain)
    assert_plain(params)


@pytest.mark.parametrize(
    "seed", [-1, 1 << 64, 10**400, -(10**400), 10**5000], ids=["-1", "2^64", "large", "-large", "no text"]
)
def test_of_a_seed_the_lowest_64_bits_count(seed):
    assert SamplingParams(seed=seed).seed == seed & MASK64


def test_a_top_k_larger_than_any_vocabulary_is_no_limit():
    """SGLang writes 1 << 30 for it."""
    for top_k in (8, 1000, 1 << 24, 1 << 30, (1 << 31) - 1):
        limited = [one([0.3, 2.0, -1.0, 1.4], SamplingParams(temperature=1.0, top_k=top_k), seed=s) for s in range(50)]
        assert limited == [one([0.3, 2.0, -1.0, 1.4], SamplingParams(temperature=1.0), seed=s) for s in range(50)]


def test_replacing_a_field_keeps_the_others():
    params = SamplingParams(logit_bias={5: 1.5}, bad_words_ids=[[1, 2]], allowed_token_ids=[5, 6], seed=-3)
    assert replace(params, temperature=1.0) == SamplingParams(**{**asdict(params), "temperature": 1.0})


@pytest.mark.parametrize(
    "values",
    [{"stop_token_ids": [10]}, {"logit_bias": {10: 1.0}}, {"allowed_token_ids": [2, 10]}, {"bad_words_ids": [[1], [10, 1]]},
     {"token_ids_logprob": [10], "logprobs": True}],
    ids=str,
)  # fmt: skip
def test_ids_outside_the_vocabulary_are_named(values):
    params, name = SamplingParams(**values), next(iter(values))
    params.check_vocabulary(11)
    with pytest.raises(ValueError, match=rf"^{name}: token id 10 is outside the vocabulary 0\.\.9$"):
        params.check_vocabulary(10)


@pytest.mark.parametrize("name", ["top_logprobs", "prompt_logprobs"])
def test_more_best_tokens_than_there_are_are_refused(name):
    params = SamplingParams(**{name: 10}, logprobs=True)
    params.check_vocabulary(10)
    with pytest.raises(ValueError, match=f"^{name}=10, but the vocabulary has 9 tokens$"):
        params.check_vocabulary(9)


@pytest.mark.parametrize(
    ("values", "needs"),
    [
        ({}, False),
        ({"temperature": 1.0, "top_k": 5, "logprobs": True}, False),
        ({"logit_bias": {1: 1}, "allowed_token_ids": [1], "min_new_tokens": 5, "bad_words_ids": [[3], [4]]}, False),
        ({"bad_words_ids": [[3], [4, 5]]}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
    ],
    ids=str,
)
def test_only_what_reads_the_tokens_themselves_needs_the_last_one(values, needs):
    assert SamplingParams(**values).needs_last_token is needs


# --- any value whatsoever


NASTY = "stands for Nasty(), which hypothesis could not print"


class Nasty:
    """Nothing about it works."""

    def __repr__(self):
        raise RuntimeError("no text")

    def __len__(self):
        raise RuntimeError("no length")

    def __iter__(self):
        raise RuntimeError("no values")

    def __index__(self):
        raise RuntimeError("no number")

    def __float__(self):
        raise RuntimeError("no number")


numbers = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.fractions(), st.decimals(), st.complex_numbers(),
    st.sampled_from([HUGE, -HUGE, 10**5000, Fraction(HUGE), 1e-39, 5e-324, -0.0, np.int64(5), np.uint64(2**64 - 1),
                     np.float16(0.5), np.float64("nan"), np.array(3), np.array([3]), torch.tensor(2), torch.tensor(0.5),
                     torch.tensor(True), np.datetime64(3, "s"), np.str_("0.5")]),
)  # fmt: skip
scalars = st.one_of(numbers, st.none(), st.text(max_size=5), st.binary(max_size=3), st.just(NASTY), st.just(int))
collections = st.one_of(
    st.lists(numbers, max_size=4), st.tuples(scalars, scalars), st.sets(st.integers(0, 9)), st.just(range(1 << 70)),
    st.dictionaries(st.one_of(st.integers(-1, 99), st.text(max_size=3)), numbers, max_size=4),
    st.lists(st.lists(st.integers(-1, 99), max_size=3), max_size=3), st.just(np.zeros((2, 2))), st.just(np.arange(5)),
    st.just(torch.arange(5)), st.builds(iter, st.lists(st.integers(), max_size=3)), st.just("\n" * 500),
)  # fmt: skip
plausible = st.one_of(st.integers(0, 9), st.floats(0, 1), st.lists(st.integers(0, 9), min_size=1, max_size=3))
names = st.sampled_from([field.name for field in fields(SamplingParams)])


def assert_plain(params):
    """Python's own ints, floats, bools and tuples, however deep."""

    def plain(value):
        return type(value) in (int, float, bool, type(None)) or (type(value) is tuple and all(map(plain, value)))

    for name, value in asdict(params).items():
        assert plain(value), f"{name}={value!r}"


@settings(max_examples=2000, deadline=None)
@given(st.dictionaries(names, st.one_of(plausible, scalars, collections), min_size=1, max_size=3))
def test_any_value_is_taken_or_refused_in_one_line(values):
    try:
        params = SamplingParams(
            **{name: Nasty() if isinstance(value, str) and value == NASTY else value for name, value in values.items()}
        )
    except ValueError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 250
        assert any(name in message for name in values), message
        return
    assert_plain(params)
    assert isinstance(repr(params), str)
    token = one([0.3, 2.0, -1.0, 1.4, 1.9, 0.0, -1.5, 1.0, 0.5, 0.1] + [-1.0] * 90, replace(params, logit_bias=()))
    assert 0 <= token < 100
