"""Other rules for what is kept, asked of an engine: greedy text is as ever, lossy ones keep more, a misfit is a line."""

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.server_args import ServerArgs

PROMPT = "A page holds tokens. A page holds tokens. A page holds"
GREEDY = {"max_new_tokens": 24, "temperature": 0.0, "ignore_eos": True}
SAMPLED = {"max_new_tokens": 40, "temperature": 1.2, "sampling_seed": 5, "ignore_eos": True}


def answers(**asked):
    """(greedy tokens, tokens a verify step of a sampled answer, its tokens), NGRAM guessing all the time."""
    with Engine(
        device="cpu", tp_size=1, speculative_algorithm="NGRAM", speculative_stand_down=False, **asked
    ) as engine:
        greedy, sampled = (engine.generate(PROMPT, params) for params in (GREEDY, SAMPLED))
    return greedy["output_ids"], sampled["meta_info"]["spec_accept_length"], sampled["output_ids"]


@pytest.fixture(scope="module")
def plain():
    return answers()


def test_rejection_sampling_leaves_greedy_text_alone_and_gives_the_asked_number_of_tokens(plain):
    greedy, _, sampled = answers(speculative_use_rejection_sampling=True)
    assert greedy == plain[0]
    assert len(sampled) == 40


def test_guesses_that_are_drawn_are_kept_more_often_where_nobody_is_certain_and_leave_greedy_text_alone(plain):
    params = [GREEDY, *({**SAMPLED, "temperature": 1.5, "sampling_seed": seed} for seed in range(15))]
    lengths, columns = [], []
    for drawn in (False, True):
        with Engine(
            device="cpu", speculative_algorithm="EAGLE", speculative_stand_down=False, check=True,
            speculative_use_rejection_sampling=drawn,
        ) as engine:  # fmt: skip
            out = engine.generate([PROMPT] * len(params), params)
            guesses = engine.scheduler.speculation
            lengths.append(guesses.tokens / guesses.sequences)
            columns.append(guesses.tree.q is not None)
        assert out[0]["output_ids"] == plain[0]
        assert {len(one["output_ids"]) for one in out[1:]} == {40}
    assert columns == [False, True]
    assert lengths[1] > lengths[0]


def test_thresholds_leave_greedy_text_alone_and_keep_more_of_what_is_guessed(plain):
    with pytest.warns(UserWarning, match="what is kept of guesses is lossy"):
        greedy, length, sampled = answers(speculative_accept_threshold_single=0.0)
    assert greedy == plain[0]
    assert len(sampled) == 40
    assert length > 1.5 * plain[1], "with a threshold of 0 every guess is good enough"


def test_typical_acceptance_leaves_greedy_text_alone_and_says_that_it_is_lossy(plain):
    with pytest.warns(UserWarning, match="what is kept of guesses is lossy"):
        greedy, length, sampled = answers(speculative_typical_acceptance=True)
    assert greedy == plain[0]
    assert len(sampled) == 40
    assert length >= 1


def test_two_rules_are_one_too_many():
    said = (
        "speculative_use_rejection_sampling with speculative_accept_threshold_acc=0.5: each is a rule for what is kept"
    )
    with pytest.raises(ValueError, match=said) as error:
        ServerArgs(
            speculative_algorithm="NGRAM",
            speculative_use_rejection_sampling=True,
            speculative_accept_threshold_acc=0.5,
        )
    assert "\n" not in str(error.value)
