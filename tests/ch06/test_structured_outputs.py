"""Answers that must be something: the masks are common/sampling/grammar.py's; here is what vLLM's names make of them."""

import json

import pytest
import regex

from ch06_tp_vllm import LLM, SamplingParams, StructuredOutputsParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy, greedy_under_grammar

SCHEMA = {
    "type": "object", "required": ["name", "blocks"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 9}, "blocks": {"type": "integer", "minimum": 1, "maximum": 99}},
}  # fmt: skip
LARK = 'start: ("block" | "page") " " /[0-9]{1,3}/\n'
END = 3583


@pytest.fixture(scope="module")
def llm():
    return LLM()


@pytest.fixture(scope="module")
def question(llm):
    tokenizer = llm.llm_engine.runner.tokenizer
    return {"prompt_token_ids": tokenizer.encode_chat([{"role": "user", "content": "What is a block table?"}])}


def obey(**given):
    return SamplingParams(temperature=0, max_tokens=40, structured_outputs=StructuredOutputsParams(**given))


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_greedy_tokens_equal_a_plain_loop(question, async_scheduling):
    cases = [
        (obey(json=SCHEMA), "json_schema", json.dumps(SCHEMA)),
        (obey(regex="(yes|no), [a-z]{2,9}"), "regex", "(yes|no), [a-z]{2,9}"),
        (obey(grammar=LARK), "ebnf", LARK),
    ]
    with_none = SamplingParams(temperature=0, max_tokens=12)
    llm = LLM(async_scheduling=async_scheduling)
    outputs = llm.generate([question] * 4, [*(params for params, _, _ in cases), with_none], use_tqdm=False)
    hf, ids = llm.llm_engine.runner.tokenizer.hf, question["prompt_token_ids"]
    for (_, kind, written), output in zip(cases, outputs, strict=False):
        want = greedy_under_grammar(TINY_QWEN_PATH, hf, ids, kind, written, 40)
        assert list(output.outputs[0].token_ids) == want
        assert output.outputs[0].finish_reason == "stop"
        assert want[-1] == END
    assert list(outputs[3].outputs[0].token_ids) == greedy(TINY_QWEN_PATH, ids, 12)


def test_one_of_several_texts_and_any_object(llm, question):
    words = ["a ball", 'a "quoted" block', "ein Blöckchen"]
    chosen = llm.generate([question], obey(choice=words), use_tqdm=False)[0].outputs[0].text
    assert chosen in words
    cut = llm.generate([question], obey(json_object=True), use_tqdm=False)[0].outputs[0].text
    assert cut.startswith("{")


def test_valid_at_temperature_1_when_requests_are_preempted_in_the_middle():
    llm = LLM(num_gpu_blocks_override=24, block_size=16, max_num_seqs=12)
    params = SamplingParams(
        n=4,
        temperature=1.0,
        max_tokens=60,
        seed=1,
        structured_outputs=StructuredOutputsParams(regex=r"[a-z]+( [a-z]+){30}\."),
    )
    outputs = llm.generate(["A block is", "A page is", "A rank is"], params, use_tqdm=False)
    answers = [one for output in outputs for one in output.outputs]
    assert llm.llm_engine.scheduler.num_preemptions > 0
    for one in answers:
        pattern = regex.fullmatch(r"[a-z]+( [a-z]+){30}\.", one.text, partial=one.finish_reason == "length")
        assert pattern, one.text
    assert len({one.text for one in answers}) == len(answers)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "not by 0"),
        ({"regex": "a", "json": {}}, "not by 2"),
        ({"json_object": False}, "leave structured_outputs out"),
        ({"choice": []}, "choice is empty"),
        ({"choice": [5]}, "choice=5 must be a text"),
        ({"json": {"a": {1, 2}}}, "is no JSON"),
        ({"json": "{"}, "is no JSON"),
        ({"regex": 5}, "regex=5 must be a text"),
    ],
    ids=str,
)
def test_what_says_nothing_or_too_much_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**given)


def test_a_grammar_that_cannot_be_compiled_is_refused_before_anything_is_queued(llm, question):
    with pytest.raises(ValueError, match=r"json_schema cannot be compiled: Unimplemented keys: .\"if\"."):
        llm.generate([question] * 2, [SamplingParams(), obey(json={"if": {}})], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    with pytest.raises(ValueError, match="structured_outputs='json' must be"):
        SamplingParams(structured_outputs="json")
