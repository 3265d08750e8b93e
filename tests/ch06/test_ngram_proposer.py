"""speculative_config: n-gram guesses change how many steps it takes, and no token."""

import numpy as np
import pytest

from ch06_tp_vllm import LLM, SamplingParams
from ch06_tp_vllm.model_runner import StepMetadata, VerifyMetadata
from ch06_tp_vllm.ngram_proposer import SpeculativeConfig
from tests.oracle import greedy, some_prompts

NEW_TOKENS = 16
CONFIG = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
VARIANTS = [
    {"block_size": 1, "num_gpu_blocks_override": 200},
    {"block_size": 4, "num_gpu_blocks_override": 22},  # some are preempted
    {"block_size": 16, "max_num_batched_tokens": 26},  # prompts in chunks, and just enough for five with guesses
    {"block_size": 16, "enable_prefix_caching": False},
]


class Knowing:
    """Guesses what will be said, and is wrong now and then: text that repeats itself is not what random weights write."""

    num_speculative_tokens, nodes = 4, 5

    def __init__(self, texts):
        self.texts = texts

    def propose(self, requests):
        guesses = np.zeros((len(requests), 4), dtype=np.int64)
        for own, request in zip(guesses, requests, strict=True):
            ids = request.all_token_ids
            text = next(text for text in self.texts if text[: len(ids)] == ids)
            coming = text[len(ids) : len(ids) + 4]
            own[: len(coming)] = coming
            own[len(ids) % 5 :] += 1  # right for so many tokens
        return guesses % 1000


def serve(folder, prompts, expected):
    """On each rank, for each variant: the answers, twice, how many steps, preemptions, guesses that were right."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    told = []
    for variant in VARIANTS:
        llm = LLM(str(folder), device="cpu", check=True, speculative_config=CONFIG, **variant)
        engine = llm.llm_engine
        engine.speculative = Knowing([prompt + answer for prompt, answer in zip(prompts, expected, strict=True)])
        rounds = [[one.outputs[0].token_ids for one in llm.generate(prompts, params)] for _ in range(2)]
        told.append((rounds, engine.scheduler.num_preemptions, engine.speculative_stats))
    return told


@pytest.mark.parametrize("size", [1, 2])
def test_greedy_tokens_equal_transformers_whether_guesses_are_right_or_wrong(size, checkpoint, ranks):
    folder, prompts = checkpoint("qwen2"), some_prompts(1009, 5, shared=24, longest=16)
    expected = [greedy(folder, prompt, NEW_TOKENS) for prompt in prompts]
    answers = ranks(size).run(serve, folder, prompts, expected)
    for of_rank in answers:
        assert [rounds for rounds, *_ in of_rank] == [[expected, expected]] * len(VARIANTS)
    for _, _, stats in answers[0]:
        assert 15 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert answers[0][1][1] > 0, "the small pool preempts"


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0.8, "top_p": 0.9, "seed": 4, "logprobs": 2},
        {"temperature": 0.7, "seed": 5, "repetition_penalty": 1.3, "min_tokens": 5},
        {"temperature": 0.0, "stop": ["e"]},
    ],
    ids=str,
)
def test_what_is_drawn_with_a_seed_is_the_same_and_ends_where_it_did(asked):
    prompts = ["A page holds tokens. A page holds tokens. A page", "What is a radix cache?", "What is a page?"]
    params = SamplingParams(**asked, max_tokens=30)
    plain, guessed = (
        LLM(device="cpu", check=True, speculative_config=config).generate(prompts, params, use_tqdm=False)
        for config in (None, CONFIG)
    )
    for one, other in zip(plain, guessed, strict=True):
        (want,), (got,) = one.outputs, other.outputs
        assert got.token_ids == want.token_ids
        assert (got.text, got.finish_reason, got.stop_reason) == (want.text, want.finish_reason, want.stop_reason)
        if "logprobs" in asked:
            assert [list(told) for told in got.logprobs] == [list(told) for told in want.logprobs]
            assert got.cumulative_logprob == pytest.approx(want.cumulative_logprob, abs=1e-3)


def test_metrics_count_guesses_under_vllm_s_names():
    llm = LLM(device="cpu", speculative_config=CONFIG)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    llm.generate(["A page holds tokens. A page holds tokens. A page"], params, use_tqdm=False)
    told = {metric.name: metric.value for metric in llm.get_metrics()}
    assert told["vllm:spec_decode_num_draft_tokens"] == 4 * told["vllm:spec_decode_num_drafts"] > 0
    assert 0 <= told["vllm:spec_decode_num_accepted_tokens"] <= told["vllm:spec_decode_num_draft_tokens"]


def test_a_verify_step_is_read_as_it_was_written():
    step = VerifyMetadata([(3, 1, [7, 8])], np.array([3, 5]), np.array([17, 4]), np.array([[1, 2, 3], [4, 5, 6]]))
    back = VerifyMetadata.decode(step.encode())
    assert back.updates == step.updates
    for name in ("rows", "computed", "guesses"):
        assert np.array_equal(getattr(back, name), getattr(step, name)), name
    for words in (step.encode()[:-1], np.append(step.encode(), 0), np.array([2, 0]), np.array([1, 0, 0, 0])):
        with pytest.raises(ValueError, match="verify step"):
            VerifyMetadata.decode(words)
    with pytest.raises(ValueError, match="not a step"):
        StepMetadata.decode(step.encode())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ngram", "must be a dictionary with method, num_speculative_tokens"),
        ({"method": "eagle", "num_speculative_tokens": 3}, "method"),
        ({"num_speculative_tokens": 3}, "method"),
        ({"method": "ngram"}, "num_speculative_tokens is missing"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": 3, "model": "x"}, "'model' is unknown; use method, num_spec"),
        (CONFIG | {"prompt_lookup_min": 4}, "prompt_lookup_min=4 is more than prompt_lookup_max=3"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_one_line(given, said):
    with pytest.raises(ValueError, match=said) as error:
        LLM(device="cpu", speculative_config=given)
    assert "\n" not in str(error.value)


def test_guesses_and_a_step_ahead_exclude_each_other():
    with pytest.raises(
        ValueError, match="async_scheduling with speculative_config: guesses need the last step's tokens"
    ):
        LLM(device="cpu", speculative_config=CONFIG, async_scheduling=True)


def test_guesses_are_what_followed_the_longest_match():
    class Text:
        def __init__(self, ids):
            self.all_token_ids = ids

    config = SpeculativeConfig.of(CONFIG)
    texts = [Text([1, 2, 3, 4, 9, 2, 3]), Text([5, 5, 5]), Text([1, 2, 3])]
    assert config.propose(texts).tolist() == [[4, 9, 2, 3], [5, 0, 0, 0], [0, 0, 0, 0]]
    assert config.propose(texts[2:]) is None
