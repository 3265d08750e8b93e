"""Whatever stands where a value belongs: a right answer, or one ValueError in one line; never a dead engine, never a lost page.

Each case puts one value of tests/nasty_values.py, or a made-up one, into one argument of one call; some put several at once. A
right answer is one whose tokens are those of transformers where nothing random or edited was asked for, and tokens of the
vocabulary, no more than were asked for, everywhere else. After every few calls each page has one owner, and a plain request is
answered as ever. The engines are small: a request has at most 40 tokens, the pool 96.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch

from ch06_tp_vllm import LLM
from ch06_tp_vllm import SamplingParams as VLLMParams
from ch06_tp_vllm.engine_args import EngineArgs
from ch07_sglang_radix import Engine
from ch07_sglang_radix.generate_request import PARAM_NAMES
from ch07_sglang_radix.invariants import check_invariants
from ch07_sglang_radix.server_args import ServerArgs
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.nasty_values import NASTY, some_value
from tests.oracle import greedy

PROMPT, NEW = [5, 60, 0, 33, 8], 3
LENGTH, POOL, PAGE = 40, 96, 4
VOCABULARY = 3584  # of the bundled model
MADE_UP = 20  # values for each argument, besides the listed ones
CHECK_EVERY = 100  # calls, and behind the last: a lost page stays lost

pytestmark = pytest.mark.timeout(300)  # for one argument with all values; as a rule one takes less than a second


def fuzz(
    call: Callable[[Any], Any], well: Callable[[], None] = lambda: None, vary: Callable = lambda value: value
) -> None:
    """`call` with every value, which may raise as `refused` says; `well` now and then. Tells all that went wrong."""
    rng, wrong = random.Random(0), []
    made_up = [(f"made-up value {i}", lambda: some_value(rng)) for i in range(MADE_UP)]
    for i, (what, make) in enumerate([*NASTY.items(), *made_up]):
        given = vary(make())
        try:
            call(given)
        except Exception as error:
            wrong += refused(error, what)
        if i % CHECK_EVERY == 0:
            well()
    well()
    assert not wrong, "\n".join(wrong)


def refused(error: Exception, what: str) -> list[str]:
    """What is wrong with this way to refuse a value; nothing if it is one ValueError in one line."""
    text = str(error)
    if type(error) is ValueError and text.isprintable() and 0 < len(text) < 400:
        return []
    return [f"{what}: {type(error).__name__}: {text[:300]!r} ({len(text)} characters)"]


def right(tokens: list[int], ids: list[int], params: SamplingParams, ended: str) -> None:
    """Can `tokens` be the answer to `ids`? As transformers continues them, or at least tokens of the vocabulary."""
    if params.grammar and ended == "abort":  # it cannot be compiled
        assert not tokens
        return
    assert all(type(token) is int and 0 <= token < VOCABULARY for token in (*ids, *tokens))
    assert 1 <= len(tokens) <= params.max_new_tokens
    assert ended == "stop" or (ended, len(tokens)) == ("length", params.max_new_tokens)
    if params.greedy and not params.edits and not params.grammar:
        # transformers' answers are kept by their length: so there are two of these
        enough = NEW if len(tokens) <= NEW else LENGTH - 1
        assert tokens == greedy(TINY_QWEN_PATH, ids, enough)[: len(tokens)]


def taken_as_given(ids: list[int], given: Any) -> None:
    """Token ids are those that were given: not cut, not rounded, and a bool is none."""
    if isinstance(given, str):
        return
    given = list(islice(given, len(given)))
    assert len(ids) == len(given)
    for mine, theirs in zip(ids, given, strict=True):
        assert mine == int(theirs) == theirs
        assert "bool" not in type(theirs).__name__ + str(getattr(theirs, "dtype", ""))


def hashable(value: Any) -> Any:
    """The value, or a type: some key of a dict."""
    try:
        hash(value)
    except Exception:
        return type(value)
    return value


# --- chapter 7


@pytest.fixture(scope="module")
def engine():
    with Engine(
        device="cpu", page_size=PAGE, max_total_tokens=POOL, context_length=LENGTH, chunked_prefill_size=8,
        max_running_requests=5, check=True,
    ) as engine:  # fmt: skip
        yield engine


@pytest.fixture
def queued(engine, monkeypatch):
    """The requests that generate has let in: [(token ids, parameters)]."""
    found, enqueue = [], engine._enqueue

    def noted(request):
        found.append((request.ids, request.params))
        return enqueue(request)

    monkeypatch.setattr(engine, "_enqueue", noted)
    return found


@pytest.fixture
def sglang_is_well(engine):
    def check():
        scheduler = engine.scheduler
        check_invariants(scheduler)
        assert not scheduler.busy
        assert scheduler.pool.free_slots + scheduler.tree.evictable_size == POOL
        result = engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": NEW})
        assert result["output_ids"] == greedy(TINY_QWEN_PATH, PROMPT, NEW)

    return check


def short(**more):
    return {"max_new_tokens": NEW} | more


GENERATE = {
    "prompt": lambda value: {"prompt": value, "input_ids": None},
    "a prompt of several": lambda value: {"prompt": ["What?", value], "input_ids": None},
    "input_ids": lambda value: {"input_ids": value},
    "input_ids of several": lambda value: {"input_ids": [[1, 2], value]},
    "a token": lambda value: {"input_ids": [1, value]},
    "sampling_params": lambda value: {"sampling_params": value},
    "sampling_params of several": lambda value: {"input_ids": [[1], [2]], "sampling_params": [short(), value]},
    "rid": lambda value: {"rid": value},
    "rid of several": lambda value: {"input_ids": [[1], [2]], "rid": value},
    "extra_key": lambda value: {"extra_key": value},
    "priority": lambda value: {"priority": value},
    "routing_key": lambda value: {"routing_key": value},
    "return_logprob": lambda value: {"return_logprob": value},
    "logprob_start_len": lambda value: {"return_logprob": True, "logprob_start_len": value},
    "top_logprobs_num": lambda value: {"return_logprob": True, "top_logprobs_num": value},
    "token_ids_logprob": lambda value: {"return_logprob": True, "token_ids_logprob": value},
    "stream": lambda value: {"stream": value}, "require_reasoning": lambda value: {"require_reasoning": value},
}  # fmt: skip
GENERATE |= {
    f"sampling_params: {name}": lambda value, name=name: {"sampling_params": short() | {name: value}}
    for name in (*PARAM_NAMES, "seed", "structural_tag", "no\nname")
}


@pytest.mark.parametrize("argument", GENERATE)
def test_engine_generate(engine, queued, sglang_is_well, argument):
    base = {"input_ids": PROMPT, "sampling_params": short()}
    fuzz(lambda given: generate(engine, queued, base | given), sglang_is_well, GENERATE[argument])


def generate(engine, queued, given):
    queued.clear()
    result = engine.generate(**given)
    if isinstance(result, dict):
        result = [result]
    elif not isinstance(result, list):  # a stream: of each answer the last of it
        result = list({one["index"]: one for one in result}.values())
    for (ids, params), one in zip(queued, result, strict=True):
        meta = one["meta_info"]
        right(one["output_ids"], ids, params, meta["finish_reason"]["type"])
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(ids), len(one["output_ids"]))
        assert one["text"].encode() or params.grammar
        json.dumps(one)  # of plain values all through
    if len(queued) == 1 and isinstance(given["input_ids"], list | np.ndarray | torch.Tensor):
        told = given["input_ids"]
        taken_as_given(queued[0][0], np.array(told if isinstance(told, list) else told.tolist(), dtype=object).ravel())


def test_engine_generate_with_several_at_once(engine, queued, sglang_is_well):
    def some(rng):
        names = rng.sample(list(GENERATE), rng.randrange(2, 6))
        given = {"input_ids": PROMPT, "sampling_params": short()}
        for name in names:
            one = GENERATE[name](rng.choice(list(NASTY.values()))() if rng.random() < 0.5 else some_value(rng))
            both = [isinstance(v, dict) for v in (one.get("sampling_params"), given["sampling_params"])]
            given |= {"sampling_params": given["sampling_params"] | one["sampling_params"]} if all(both) else one
        return given

    rng, wrong = random.Random(1), []
    for i in range(400):
        try:
            generate(engine, queued, some(rng))
        except Exception as error:
            wrong += refused(error, f"case {i}")
        if i % CHECK_EVERY == 0:
            sglang_is_well()
    assert not wrong, "\n".join(wrong)


# --- chapter 7, the scheduler itself

ADD_REQUEST = {
    "text": lambda value: {"text": value, "input_ids": None},
    "input_ids": lambda value: {"input_ids": value},
    "max_new_tokens": lambda value: {"max_new_tokens": value},
    "sampling_params": lambda value: {"sampling_params": value},
}


@pytest.mark.parametrize("argument", ADD_REQUEST)
def test_scheduler_add_request(engine, sglang_is_well, argument):
    def call(given):
        scheduler = engine.scheduler
        rid = scheduler.add_request(**{"input_ids": PROMPT, "max_new_tokens": NEW} | given)
        params = scheduler.waiting[-1].params
        (result,) = scheduler.process_requests().values()
        assert result.request_id == rid
        right(result.output_ids, result.prompt_ids, params, result.finish_reason["type"])
        if argument == "input_ids":
            taken_as_given(result.prompt_ids, given["input_ids"])

    fuzz(call, sglang_is_well, ADD_REQUEST[argument])


@pytest.mark.parametrize("field", [field.name for field in fields(SamplingParams)])
def test_sampling_params(engine, sglang_is_well, field):
    def call(value):
        scheduler = engine.scheduler
        params = SamplingParams(**{"max_new_tokens": NEW, field: value})
        plain(getattr(params, field))
        scheduler.add_request(input_ids=PROMPT, sampling_params=params)
        (result,) = scheduler.process_requests().values()
        right(result.output_ids, PROMPT, params, result.finish_reason["type"])

    fuzz(call, sglang_is_well)


def plain(value):
    """Of Python's own types, all through."""
    assert value is None or type(value) in (int, float, bool, str, tuple)
    for one in value if isinstance(value, tuple) else ():
        plain(one)


@pytest.mark.parametrize("argument", ["rid", "abort_all"])
def test_engine_abort_request(engine, sglang_is_well, argument):
    def call(value):
        scheduler = engine.scheduler
        params = SamplingParams(max_new_tokens=NEW)
        rids = [scheduler.enqueue(None, PROMPT, params, name=name) for name in ("a", "7", None)]
        try:
            scheduler.step()
            ended = engine.abort_request(**{argument: value})
        finally:
            results = scheduler.process_requests()
        aborted = [rid for rid in rids if results[rid].finish_reason["type"] == "abort"]
        assert len(aborted) == ended
        if argument == "rid":
            assert ended == (value == "a") or aborted == [value]

    fuzz(call, sglang_is_well)


# --- chapter 6


@pytest.fixture(scope="module")
def llm():
    with LLM(
        device="cpu", block_size=PAGE, num_gpu_blocks_override=POOL // PAGE, max_model_len=LENGTH, max_num_seqs=5,
        max_num_batched_tokens=16, check=True,
    ) as llm:  # fmt: skip
        yield llm


@pytest.fixture
def vllm_is_well(llm):
    def check():
        engine = llm.llm_engine
        engine.blocks.check(engine.scheduler.running)
        assert not engine.groups
        assert not engine.scheduler.waiting + engine.scheduler.running
        assert engine.blocks.num_free_blocks == POOL // PAGE
        (output,) = llm.generate([PROMPT], greedily(), use_tqdm=False)
        assert output.outputs[0].token_ids == greedy(TINY_QWEN_PATH, PROMPT, NEW)

    return check


def greedily(**more):
    return VLLMParams(**{"max_tokens": NEW, "temperature": 0.0} | more)


PROMPTS = {
    "a prompt": lambda value: value,
    "a prompt of several": lambda value: ["What?", value],
    "a token": lambda value: [1, value],
    "prompt in a dict": lambda value: {"prompt": value},
    "prompt_token_ids in a dict": lambda value: {"prompt_token_ids": value},
    "cache_salt in a dict": lambda value: {"prompt_token_ids": PROMPT, "cache_salt": value},
    "an unknown key in a dict": lambda value: {"prompt": "a", "lora": value},
    "a key in a dict": lambda value: {"prompt": "a", hashable(value): 1},
}
LLM_GENERATE = {name: lambda value, vary=vary: {"prompts": vary(value)} for name, vary in PROMPTS.items()} | {
    "sampling_params": lambda value: {"sampling_params": value},
    "sampling_params of several": lambda value: {"prompts": [[1], [2]], "sampling_params": [greedily(), value]},
    "use_tqdm": lambda value: {"use_tqdm": value},
    "priority": lambda value: {"priority": value},
    "priority of several": lambda value: {"prompts": [[1], [2]], "priority": [1, value]},
}


@pytest.mark.parametrize("argument", LLM_GENERATE)
def test_llm_generate(llm, vllm_is_well, argument):
    base = {"prompts": [PROMPT], "sampling_params": greedily(), "use_tqdm": False}
    fuzz(lambda given: llm_generate(llm, base | given), vllm_is_well, LLM_GENERATE[argument])


def llm_generate(llm, given):
    groups, add = [], llm.llm_engine.outputs.add
    llm.llm_engine.outputs.add = lambda group: (groups.append(group), add(group))
    try:
        outputs = llm.generate(**given)
    finally:
        llm.llm_engine.outputs.add = add
    for group, output in zip(groups, outputs, strict=True):
        right_outputs(group, output)
    return outputs


def right_outputs(group, output):
    assert output.finished
    for request, one in zip(group.requests, output.outputs, strict=True):
        right(one.token_ids, output.prompt_token_ids, request.params, one.finish_reason)
        assert one.text.encode() or not one.text
    json.dumps(output.to_json())


@pytest.mark.parametrize("field", [field.name for field in fields(VLLMParams)])
def test_vllm_sampling_params(llm, vllm_is_well, field):
    def call(value):
        params = VLLMParams(**{"max_tokens": NEW, "temperature": 0.0, field: value})
        llm_generate(llm, {"prompts": [PROMPT], "sampling_params": params, "use_tqdm": False})

    fuzz(call, vllm_is_well)


ADD = {"request_id": lambda value: {"request_id": value}, "params": lambda value: {"params": value}}
ADD |= {name: lambda value, vary=vary: {"prompt": vary(value)} for name, vary in PROMPTS.items()}
ADD |= {name: lambda value, name=name: {name: value} for name in ("priority", "cache_salt")}


@pytest.mark.parametrize("argument", ADD)
def test_llm_engine_add_request(llm, vllm_is_well, argument):
    def call(given):
        engine, outputs = llm.llm_engine, []
        given = {"request_id": "a", "prompt": PROMPT, "params": greedily()} | given
        engine.add_request(**given)
        (group,) = engine.groups.values()
        while engine.has_unfinished_requests():
            outputs += engine.step()
        right_outputs(group, outputs[-1])
        if argument == "a prompt" and not isinstance(given["prompt"], Mapping):
            taken_as_given(group.requests[0].prompt_token_ids, given["prompt"])

    fuzz(call, vllm_is_well, ADD[argument])


def test_llm_engine_abort_request(llm, vllm_is_well):
    def call(value):
        engine = llm.llm_engine
        for name in ("a", "2"):
            engine.add_request(name, PROMPT, greedily())
        try:
            engine.step()
            engine.abort_request(value)
        finally:
            left = list(engine.groups)
            while engine.has_unfinished_requests():
                engine.step()
        gone = [value] if isinstance(value, str) else [] if value is None else list(value)
        assert left == [name for name in ("a", "2") if name not in gone]

    fuzz(call, vllm_is_well)


# --- what engines are made with


@pytest.mark.parametrize(
    ("args", "field"), [(args, field.name) for args in (EngineArgs, ServerArgs) for field in fields(args)], ids=str
)
def test_engine_and_server_args(args, field):
    """What is taken can be told to another process."""
    fuzz(lambda value: json.dumps(args.of({field: value}).for_a_follower()))


@pytest.mark.parametrize("args", [EngineArgs, ServerArgs])
def test_names_of_engine_and_server_args(args):
    def call(value):
        args.of({value: 1})
        raise AssertionError(f"{value!r} is no argument")

    fuzz(call, vary=hashable)


def test_there_are_many_of_them():
    several = (
        GENERATE,
        ADD_REQUEST,
        LLM_GENERATE,
        ADD,
        *map(fields, (SamplingParams, VLLMParams, EngineArgs, ServerArgs)),
    )
    assert len(NASTY) * len(list(chain(*several))) > 20_000
