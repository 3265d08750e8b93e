"""Where parameters are vLLM's to the letter, and where they are not: the table of differences in the chapter's README."""

import pytest

from ch06_tp_vllm import LLM, SamplingParams
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", num_gpu_blocks_override=256, check=True) as llm:
        yield llm


@pytest.mark.parametrize(
    ("word", "spellings"),
    [
        ("page", 2),  # " page" is one token too, and another one
        (" page", 2),
        ("array", 1),  # " array" is one token, "array" two
        ("a block", 2),
    ],
)
def test_a_bad_word_is_forbidden_behind_a_space_too_if_that_has_as_many_tokens(word, spellings):
    tokenizer = Tokenizer(TINY_QWEN_PATH)
    both = [tuple(tokenizer.encode_bare(text + word.lstrip())) for text in ("", " ")]
    assert SamplingParams(bad_words=[word]).row(1, tokenizer).bad_words_ids == tuple(both[:spellings])


def test_a_bad_word_without_tokens_is_refused(llm):
    with pytest.raises(ValueError, match=r"^bad_words: ' ' has no token that could be forbidden; leave it out$"):
        llm.generate([PROMPT], SamplingParams(bad_words=["  "]))


def test_seed_minus_one_is_none_as_in_vllm(llm):
    assert SamplingParams(seed=-1) == SamplingParams()
    drawn = llm.generate([PROMPT] * 4, SamplingParams(seed=-1, temperature=2.0, max_tokens=8), use_tqdm=False)
    assert len({tuple(output.outputs[0].token_ids) for output in drawn}) == 4, "each has a seed of its own"


def test_prompt_tokens_count_once_for_each_answer_as_in_vllm(llm):
    def counted():
        return {metric.name: metric.value for metric in llm.get_metrics()}["vllm:prompt_tokens"]

    before = counted()
    llm.generate([PROMPT], SamplingParams(n=3, max_tokens=1), use_tqdm=False)
    assert counted() - before == 9


def test_differences_from_vllm_are_as_the_readme_says(llm):
    with pytest.raises(ValueError, match="but the model ends at"):
        llm.generate([PROMPT], SamplingParams(max_tokens=100_000))
    (output,) = llm.generate([PROMPT], SamplingParams(temperature=0, n=2, max_tokens=3), use_tqdm=False)
    assert output.outputs[0].token_ids == output.outputs[1].token_ids
    assert SamplingParams(temperature=1000).temperature == 1000
    for logprobs in (-1, True):
        with pytest.raises(ValueError, match="logprobs="):
            SamplingParams(logprobs=logprobs)
    (output,) = llm.generate([PROMPT], SamplingParams(logprobs=99, max_tokens=1), use_tqdm=False)
    assert len(output.outputs[0].logprobs[0]) in (99, 100)


def test_n_answers_of_the_readme_s_question_are_equal_because_the_model_is_certain(llm):
    chat = [{"role": "user", "content": "What is a block table?"}]

    def texts(**more):
        (output,) = llm.chat(chat, SamplingParams(n=3, temperature=1.5, max_tokens=20, seed=1, **more), use_tqdm=False)
        return [answer.text for answer in output.outputs]

    assert len(set(texts(top_p=0.9))) == 1
    assert len(set(texts())) > 1
