"""The interfaces: LLM.generate, LLMEngine's loop, and what they refuse."""

import math
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
import torch

from ch06_tp_vllm import LLM, LLMEngine, SamplingParams
from common.parallel_state import get_tensor_parallel
from common.text.detokenizer import IncrementalDetokenizer
from tests.common.models.files import rewrite
from tests.common.text.kinds import llama
from tests.oracle import greedy, some_prompts


def params(tokens=8, **more):
    return SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True} | more)


@pytest.fixture(scope="module")
def llm():
    return LLM(device="cpu", num_gpu_blocks_override=256, check=True)


@pytest.fixture
def engine(checkpoint):
    return LLMEngine(str(checkpoint("qwen2")), device="cpu", num_gpu_blocks_override=64, block_size=4, check=True)


def test_text_in_text_out(llm):
    ids = llm.llm_engine.runner.tokenizer.encode_chat([{"role": "user", "content": "What is a block table?"}])
    outputs = llm.generate([ids, "What is a page?"], SamplingParams(temperature=0.0, max_tokens=40))
    assert [output.prompt for output in outputs] == [None, "What is a page?"]
    assert "block" in outputs[0].outputs[0].text
    assert all(output.finished for output in outputs)


@pytest.mark.parametrize(
    "prompt",
    ["a", [1, 2, 3], {"prompt_token_ids": [1, 2, 3]}, {"prompt": "a"}, np.array([1, 2, 3]), torch.tensor([1, 2, 3])],
    ids=["text", "ids", "dict of ids", "dict of text", "numpy", "torch"],
)
def test_one_prompt_may_stand_alone(llm, prompt):
    (output,) = llm.generate(prompt, params(2))
    assert len(output.outputs[0].token_ids) == 2


def test_as_in_vllm_the_default_draws_sixteen_tokens(llm):
    one, other = (
        llm.generate([[5, 6, 7]], SamplingParams(seed=seed, ignore_eos=True))[0].outputs[0] for seed in (1, 2)
    )
    assert len(one.token_ids) == 16
    assert one.token_ids != other.token_ids
    again = llm.generate([[5, 6, 7]], SamplingParams(seed=1, ignore_eos=True))[0].outputs[0]
    assert again.token_ids == one.token_ids


def test_n_answers_differ_and_each_repeats(llm):
    drawn = [llm.generate([[5, 6, 7]], params(temperature=1.0, n=4, seed=3))[0].outputs for _ in range(2)]
    assert [answer.index for answer in drawn[0]] == [0, 1, 2, 3]
    assert len({tuple(answer.token_ids) for answer in drawn[0]}) == 4
    assert [a.token_ids for a in drawn[0]] == [a.token_ids for a in drawn[1]]
    alone = llm.generate([[5, 6, 7]], params(temperature=1.0, seed=5))[0].outputs[0]
    assert alone.token_ids == drawn[0][2].token_ids, "the third answer draws with seed + 2"


def test_the_token_of_a_log_probability_reads_as_it_does_inside_a_text(checkpoint, tmp_path):
    llm = LLM(str(checkpoint("qwen2")), tokenizer=str(llama(tmp_path)), device="cpu", num_gpu_blocks_override=64)
    vocabulary = llm.llm_engine.runner.tokenizer.hf.get_vocab()
    for written, read in (("▁pages", " pages"), ("</s>", "</s>")):
        ids = [vocabulary["▁the"], vocabulary[written]]
        asked = params(2, logprobs=0, prompt_logprobs=0, allowed_token_ids=ids[1:])
        (output,) = llm.generate([ids], asked, use_tqdm=False)
        told = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert [one[ids[1]].decoded_token for one in told] == [read] * 3


def test_finish_reasons_and_logprobs(llm):
    long = llm.generate([[5, 6, 7]], params(8, logprobs=1))[0].outputs[0]
    assert (long.finish_reason, long.stop_reason, len(long.logprobs)) == ("length", None, 8)
    chosen = [one[token].logprob for one, token in zip(long.logprobs, long.token_ids, strict=True)]
    assert long.cumulative_logprob == pytest.approx(sum(chosen))
    assert all(value <= 0 for value in chosen)
    stop = long.token_ids[3]
    short = llm.generate([[5, 6, 7]], params(8, stop_token_ids=(stop,)))[0].outputs[0]
    assert short.token_ids == long.token_ids[: long.token_ids.index(stop) + 1]
    assert (short.finish_reason, short.stop_reason, short.logprobs) == ("stop", stop, None)


def test_prefix_hits_are_told(checkpoint):
    llm = LLM(str(checkpoint("qwen2")), device="cpu", num_gpu_blocks_override=64, block_size=4, check=True)
    first = llm.generate([list(range(20))], params(5))[0]
    again = llm.generate([list(range(20)), first.prompt_token_ids + first.outputs[0].token_ids + [9]], params(1))
    assert [output.num_cached_tokens for output in (first, *again)] == [0, 16, 24]


def test_the_loop_streams_text_that_grows(llm):
    engine = llm.llm_engine
    engine.add_request("one", "What is a radix cache?", SamplingParams(temperature=0.0, max_tokens=12))
    detokenizer, seen, text = IncrementalDetokenizer(engine.runner.tokenizer), 0, ""
    while engine.has_unfinished_requests():
        for output in engine.step():
            answer = output.outputs[0]
            text += detokenizer.add(*answer.token_ids[seen:])
            seen = len(answer.token_ids)
    assert text + detokenizer.finish() == answer.text
    assert output.finished


@pytest.mark.parametrize("asynchronous", [False, True])
def test_requests_come_go_and_are_aborted_at_any_step(checkpoint, asynchronous):
    folder, prompts = checkpoint("qwen2"), some_prompts(1009, 6, shared=16, longest=12)
    engine = LLMEngine(
        str(folder), device="cpu", num_gpu_blocks_override=64, block_size=4, async_scheduling=asynchronous, check=True
    )
    done, step = {}, 0
    while step < 6 or engine.has_unfinished_requests():
        if step < 6:
            engine.add_request(f"r{step}", prompts[step], params(9))
        if step in (3, 8):
            engine.abort_request({3: "r1", 8: "r5"}[step])
            engine.blocks.check(engine.scheduler.running)
        done |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
        step += 1
    assert sorted(done) == ["r0", "r2", "r3", "r4"]
    for name, answer in done.items():
        assert answer.token_ids == greedy(folder, prompts[int(name[1:])], 9)
    assert engine.blocks.num_free_blocks == 64


def test_an_aborted_group_takes_all_its_answers_along(engine):
    engine.add_request("a", [1, 2, 3], params(30, n=3))
    for _ in range(3):
        engine.step()
    engine.abort_request("a")
    assert not engine.has_unfinished_requests()
    assert engine.blocks.num_free_blocks == 64
    engine.add_request("a", [1, 2, 3], params(2))  # the name is free again
    while engine.has_unfinished_requests():
        engine.step()


@pytest.mark.parametrize("names", ["never", "finished", ["never", "finished"], []])
def test_an_abort_of_what_is_not_there_does_nothing_as_in_vllm(engine, names):
    engine.add_request("finished", [1, 2, 3], params(1))
    while engine.has_unfinished_requests():
        engine.step()
    engine.abort_request(names)
    assert engine.blocks.num_free_blocks == len(engine.blocks.blocks)


def test_who_waits_and_is_aborted_never_runs(checkpoint):
    engine = LLMEngine(str(checkpoint("qwen2")), device="cpu", num_gpu_blocks_override=16, max_num_seqs=1, check=True)
    for name in "abc":
        engine.add_request(name, [1, 2, 3], params(2))
    engine.step()
    engine.abort_request("b")
    assert [request.group for request in engine.scheduler.waiting] == ["c"]
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.request_id for output in outputs if output.finished] == ["a", "c"]


def test_several_requests_are_aborted_at_one_go(engine):
    for name in "abc":
        engine.add_request(name, [1, 2, 3], params(9))
    engine.step()
    engine.abort_request(["a", "c", "unknown"])
    assert list(engine.groups) == ["b"]
    while engine.has_unfinished_requests():
        last = engine.step()
    assert [output.request_id for output in last] == ["b"]
    with pytest.raises(ValueError, match="request_id=5 must be a text"):
        engine.abort_request([5])


def test_a_request_id_in_use_is_refused(engine):
    engine.add_request("a", [1], params(1))
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add_request("a", [2], params(1))


@pytest.mark.parametrize(
    ("prompt", "n", "message"),
    [
        ([], 1, "the prompt is empty"),
        ([1009], 1, "token id 1009 is outside the vocabulary 0..1008"),
        ([-1], 1, "token id -1"),
        ([1] * 500, 13, "prompt 500 . max_tokens 13 = 513 tokens, but the model ends at 512.*at most 12"),
        ([1] * 200, 57, "= 257 tokens, but the pool holds 256; shorten the request or raise num_gpu_blocks_override"),
        ([1] * 600, 1, "the model ends at 512; shorten the prompt to 511 or fewer"),
        ("words", 1, r"no tokenizer \(.*; give prompt_token_ids"),
        (None, 1, "the prompt is a text or token ids .whole numbers., not None"),
        ([1.5, 2], 1, "the prompt is a text or token ids"),
        ({"text": "a"}, 1, "unknown prompt key text; known: cache_salt, prompt, prompt_token_ids"),
    ],
)
def test_what_can_never_run_is_refused_at_once_and_the_others_go_on(engine, prompt, n, message):
    engine.add_request("good", [1, 2, 3], params(2))
    with pytest.raises(ValueError, match=message):
        engine.add_request("bad", prompt, params(n))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].request_id == "good"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_salt": 5}, "cache_salt=5 must be a text or None"),
        ({"cache_salt": ""}, "cache_salt: an empty text is none"),
        ({"cache_salt": "\ud800"}, "cache_salt holds half a surrogate pair"),
        ({"priority": "high"}, "priority='high' must be a whole number"),
        ({"params": {"n": 1}}, "params=.* must be a SamplingParams"),
    ],
)
def test_a_value_of_a_wrong_kind_is_refused_at_once_and_the_others_go_on(engine, options, message):
    engine.add_request("good", [1, 2, 3], params(2))
    with pytest.raises(ValueError, match=message):
        engine.add_request("bad", [1, 2, 3], **{"params": params(2)} | options)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"good"}


def test_of_equal_priority_the_first_goes_first_and_so_do_the_answers_of_a_prompt(checkpoint):
    engine = LLMEngine(
        str(checkpoint("qwen2")), device="cpu", num_gpu_blocks_override=64, scheduling_policy="priority", max_num_seqs=1
    )
    for name, n, priority in (("a", 3, 0), ("b", 1, 0), ("c", 2, -1)):
        engine.add_request(name, [1, 2, 3], params(1, n=n), priority=priority)
    assert [request.request_id for request in engine.scheduler.waiting] == ["c/0", "c/1", "a/0", "a/1", "a/2", "b/0"]


def test_a_salt_stands_in_the_prompt_or_beside_it(engine):
    """And the blocks of one salt are not those of another."""
    hits = []
    for prompt, beside in [
        ({"cache_salt": "A"}, None), ({}, "A"), ({"cache_salt": "A"}, "A"), ({"cache_salt": "B"}, None), ({}, None)
    ]:  # fmt: skip
        engine.add_request("one", {"prompt_token_ids": list(range(9)), **prompt}, params(1), cache_salt=beside)
        hits += [output.num_cached_tokens for output in engine.step()]
    assert hits == [0, 8, 8, 0, 0]
    with pytest.raises(ValueError, match="cache_salt='A', but the prompt says 'B'; give one of the two"):
        engine.add_request("two", {"prompt_token_ids": [1], "cache_salt": "B"}, params(1), cache_salt="A")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt": "a", "prompt_token_ids": [1]}, "a prompt has 'prompt' or 'prompt_token_ids', this one has"),
        ({"cache_salt": "A"}, "a prompt has 'prompt' or 'prompt_token_ids', this one has"),
        ({"prompt": [1, 2]}, "'prompt' holds .*; a text goes into 'prompt', token ids into 'prompt_token_ids'"),
        ({"prompt_token_ids": "a"}, "'prompt_token_ids' holds 'a'; a text goes into 'prompt'"),
    ],
)
def test_a_prompt_in_a_dict_is_one_thing_under_its_own_name(engine, prompt, message):
    with pytest.raises(ValueError, match=message):
        engine.add_request("one", prompt, params(1))


@pytest.mark.parametrize(("length", "tokens"), [(20, 12), (31, 1)])
def test_without_chunked_prefill_prompt_and_answer_fit_into_one_step(checkpoint, length, tokens):
    """Preempted, it has to come back in one; an answer without a limit is as long as that allows."""
    llm = LLM(
        str(checkpoint("qwen2")), device="cpu", num_gpu_blocks_override=64, max_num_batched_tokens=32, max_num_seqs=4,
        enable_chunked_prefill=False,
    )  # fmt: skip
    (output,) = llm.generate([list(range(length))], params(None))
    assert len(output.outputs[0].token_ids) == tokens
    with pytest.raises(ValueError, match=r"= 33 tokens, but without chunked prefill a step holds .*=32"):
        llm.generate([list(range(length))], params(33 - length))


def test_an_answer_without_a_limit_is_as_long_as_model_and_pool_allow(checkpoint):
    llm = LLM(str(checkpoint("qwen2")), device="cpu", num_gpu_blocks_override=4, block_size=16)
    assert len(llm.generate([[1] * 50], params(None))[0].outputs[0].token_ids) == 64 - 50


@pytest.mark.parametrize("name", ["block_size", "max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks_override"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_sizes_of_the_engine_are_named_as_they_were_given(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be (at least 1|a whole number)"):
        LLMEngine(device="cpu", **{name: value})


def test_generate_does_not_mix_with_the_loop(llm):
    engine = llm.llm_engine
    engine.add_request("mine", [1, 2, 3], params(3))
    with pytest.raises(ValueError, match="the engine has 1 unfinished requests of add_request"):
        llm.generate([[4, 5]], params(1))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.request_id for output in outputs] == ["mine"] * 3
    assert llm.generate([[4, 5]], params(1))[0].finished


@pytest.mark.parametrize("question", ["什么是分页？", "什么是 KV 缓存？", "What is a page?"])
def test_streamed_text_only_grows_and_ends_as_the_whole(llm, question):
    engine = llm.llm_engine
    ids = engine.runner.tokenizer.encode_chat([{"role": "user", "content": question}])
    engine.add_request("a", ids, SamplingParams(temperature=0.0, max_tokens=60))
    texts = [""]
    while engine.has_unfinished_requests():
        for output in engine.step():
            texts.append(output.outputs[0].text)
    assert all(late.startswith(early) for early, late in pairwise(texts))
    assert texts[-1] == engine.runner.tokenizer.decode(output.outputs[0].token_ids)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None), "the model's own end"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("question", ["What is a block table?", "什么是分页？"])
def test_a_stop_text_ends_the_answer_before_it_wherever_it_lies(question, asynchronous):
    llm = LLM(device="cpu", num_gpu_blocks_override=64, async_scheduling=asynchronous, check=True)
    engine, conversation = llm.llm_engine, [{"role": "user", "content": question}]
    whole = llm.chat(conversation, params(30), use_tqdm=False)[0].outputs[0].text
    ids = engine.runner.tokenizer.encode_chat(conversation)
    for length in (1, 3, 7):
        for at in range(1, len(whole) - length, 5):
            stop = whole[at : at + length]
            engine.add_request("a", ids, params(30, stop=[stop, "never said"]))
            texts = [""]
            while engine.has_unfinished_requests():
                texts += [output.outputs[0].text for output in engine.step() if (last := output)]
            answer = last.outputs[0]
            assert (answer.text, answer.finish_reason, answer.stop_reason) == (whole[: whole.find(stop)], "stop", stop)
            assert all(late.startswith(early) for early, late in pairwise(texts)), "what was shown stays"
    assert engine.blocks.num_free_blocks == 64


def test_n_answers_end_each_at_its_own_stop_text(llm):
    free = llm.generate("What is a page?", params(20, n=3, temperature=1.5, seed=2))[0].outputs
    stopped = llm.generate("What is a page?", params(20, n=3, temperature=1.5, seed=2, stop=" "))[0].outputs
    for one, other in zip(free, stopped, strict=True):
        assert other.text == one.text.split(" ")[0]


def test_a_stop_token_is_among_the_tokens_and_not_in_the_text(llm):
    free = llm.generate("What is a page?", params(12))[0].outputs[0]
    decode = llm.llm_engine.runner.tokenizer.decode
    for given in ([free.token_ids[5]], free.token_ids[5]):
        stopped = llm.generate("What is a page?", params(12, stop_token_ids=given))[0].outputs[0]
        end = free.token_ids.index(free.token_ids[5]) + 1
        assert stopped.token_ids == free.token_ids[:end]
        assert stopped.text == decode(free.token_ids[: end - 1])
        assert stopped.stop_reason == free.token_ids[5]


def test_prompts_and_params_may_come_from_an_iterator(llm):
    outputs = llm.generate(([i, i + 1] for i in range(3)), (params(n) for n in (1, 2, 3)))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3]
    assert [output.prompt_token_ids for output in outputs] == [[0, 1], [1, 2], [2, 3]]


def test_an_interrupted_generate_leaves_nothing_behind(llm, monkeypatch):
    engine = llm.llm_engine
    before, runs, run = engine.blocks.num_free_blocks, [], engine.runner.run

    def interrupted(step):
        runs.append(step)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return run(step)

    monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3], [4, 5]], params(8), use_tqdm=False)
    monkeypatch.undo()
    assert not engine.has_unfinished_requests()
    assert engine.blocks.num_free_blocks == before
    assert llm.generate([[1, 2, 3]], params(3))[0].finished


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ({"role": "user"}, "must be a list of messages"),
        ("hi", "must be a list of messages"),
        (None, "must be a list of messages"),
        (["hi"], "a conversation is one message or several, in a list, not 'hi'"),
        ([{"role": "user"}], "a message is"),
        ([{"role": "user", "content": 5}], "a message is"),
    ],
)
def test_what_is_no_conversation_is_refused(llm, conversation, message):
    with pytest.raises(ValueError, match=message):
        llm.chat(conversation)


@pytest.mark.parametrize("given", [{"max_tokens": 3}, 5, [None]])
def test_what_is_no_sampling_params_is_refused(llm, given):
    with pytest.raises(ValueError, match="SamplingParams"):
        llm.generate(["a"], given)
    assert not llm.llm_engine.has_unfinished_requests()


def test_text_that_is_none_is_refused(llm):
    with pytest.raises(ValueError, match="half a surrogate pair"):
        llm.generate("a\ud800", params(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": "x"}, "seed='x' must"),
        ({"seed": None}, "seed=None must"),
        ({"trace": True}, "trace=True must be a file"),
        ({"trace": "/no/such/folder/a"}, "must be a file in a folder that exists"),
    ],
)
def test_the_engine_s_own_values(options, message):
    with pytest.raises(ValueError, match=message):
        LLMEngine(device="cpu", **options)


def test_weights_that_are_not_finite_are_named_on_request(copy):
    folder, pool = copy("qwen2"), {"device": "cpu", "num_gpu_blocks_override": 8}
    rewrite(folder, lambda weights: weights["model.norm.weight"][3:5].fill_(math.nan))
    with pytest.raises(ValueError, match=r"NaN or infinity as float32 in 1 tensors: model.norm.weight \(2 of 112\)"):
        LLM(str(folder), check_finite=True, **pool)
    with LLM(str(folder), **pool) as llm:
        (output,) = llm.generate([[1, 2, 3]], params(2), use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"
    assert "NaN or infinite" in output.outputs[0].stop_reason


@pytest.mark.parametrize("caught", [True, False])
def test_an_exception_that_leaves_the_with_block_is_told_to_the_other_ranks(checkpoint, monkeypatch, caught):
    """One that is caught inside is no failure of this rank."""
    told = []
    monkeypatch.setattr("ch06_tp_vllm.llm.shutdown_tensor_parallel", lambda tp, error: told.append(error))
    failure = KeyError("mine")
    with suppress(KeyError), LLM(str(checkpoint("qwen2"))):
        try:
            raise failure
        except KeyError:
            if not caught:
                raise
    assert told == [None if caught else failure]


def test_after_shutdown_there_is_one_line(checkpoint):
    llm = LLM(str(checkpoint("qwen2")), device="cpu", num_gpu_blocks_override=8)
    llm.shutdown()
    with pytest.raises(ValueError, match="this LLM is shut down"):
        llm.generate([[1]], params(1))


def test_a_bad_word_is_never_completed(llm):
    """One that has as many tokens with a space as without: of others vLLM forbids the spelling without alone."""
    free = llm.generate("What is a page?", params(12))[0].outputs[0].text
    encode = llm.get_tokenizer().encode
    word = next(one for one in free.split()[1:] if len(encode(one)) == len(encode(f" {one}")))
    held = llm.generate("What is a page?", params(12, bad_words=[word]))[0].outputs[0].text
    assert word in free
    assert word not in held


def test_a_bad_word_needs_a_tokenizer(engine):
    with pytest.raises(ValueError, match=r"no tokenizer \(.*\), so bad_words are no tokens; use logit_bias"):
        engine.add_request("a", [1, 2, 3], params(2, bad_words=["x"]))


def test_a_stop_text_needs_a_tokenizer(engine):
    with pytest.raises(ValueError, match=r"no tokenizer \(.*, so no text to stop at; use stop_token_ids"):
        engine.add_request("a", [1, 2, 3], params(2, stop="x"))


def test_chat_is_generate_behind_the_template(llm):
    conversation = [{"role": "user", "content": "What is a page?"}]
    ids = llm.llm_engine.runner.tokenizer.encode_chat(conversation)
    one, two = llm.chat(conversation, params(8)), llm.chat([conversation, conversation], params(8))
    assert len(one) == 1
    assert [output.prompt_token_ids for output in two] == [ids, ids]
    assert one[0].outputs[0].token_ids == llm.generate(ids, params(8))[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": "2"}, "n='2' must be a whole number"),
        ({"max_tokens": 2.5}, "max_tokens=2.5 must be a whole number"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
        ({"seed": "x"}, "seed='x' must be a whole number"),
        ({"temperature": None}, "temperature=None must be a number"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids=..a.,. must be token ids"),
        ({"stop_token_ids": 2.5}, "stop_token_ids=2.5 must be token ids"),
        ({"stop": ""}, "stop: an empty text is none"),
        ({"stop": [5]}, "stop=5 must be a text"),
        ({"stop": 0}, "stop=0 must be one text or several"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"logprobs": -1}, "logprobs=-1 must be at least 0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_bad_sampling_params(given, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**given)


def test_nothing_runs_if_one_prompt_is_refused(llm):
    with pytest.raises(ValueError, match="empty"):
        llm.generate([[1], []], params(1))
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        llm.generate([[1], [2]], [params(1)])
    assert not llm.llm_engine.has_unfinished_requests()


def both_interfaces(folder, prompts):
    """On each rank: generate, then the loop with an abort; and the messages of a decode step."""
    llm = LLM(str(folder), device="cpu", num_gpu_blocks_override=64, block_size=4, check=True)
    generated = [output.outputs[0].token_ids for output in llm.generate(prompts, params(6), use_tqdm=False)]
    engine, tp = llm.llm_engine, get_tensor_parallel()
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params(6))
    looped = {}
    for step in range(100):
        if not engine.has_unfinished_requests():
            break
        if step == 3:
            engine.abort_request("1")
            with tp.ledger.recording() as ledger:
                outputs = engine.step()
                messages = [(entry.op, entry.label) for entry in ledger.entries]
        else:
            outputs = engine.step()
        looped |= {output.request_id: output.outputs[0].token_ids for output in outputs if output.finished}
    return generated, looped, messages, len(engine.scheduler.waiting) + len(engine.groups)


def test_all_ranks_get_the_same_outputs(checkpoint, ranks):
    folder = checkpoint("qwen2")
    prompts = some_prompts(1009, 4)
    expected = [greedy(folder, p, 6) for p in prompts]
    answers = ranks(2).run(both_interfaces, folder, prompts)
    for generated, looped, messages, left in answers:
        assert left == 0, "nothing of a finished request stays on any rank"
        assert generated == expected
        assert looped == {str(i): expected[i] for i in (0, 2, 3)}
        layers = [("all_reduce", f"layers.{i}.{name}") for i in range(3) for name in ("o_proj", "down_proj")]
        assert messages[:9] == [("broadcast", "step"), ("all_reduce", "embed_tokens"), *layers, ("gather", "logits")]
        assert messages[9] == ("broadcast", "tokens")
