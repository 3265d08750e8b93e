"""The rest of the Engine's calls: streams, many callers, n, stop strings, control, traces."""

import asyncio
import itertools
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields

import pytest
import torch

from ch07_sglang_radix import Engine
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.server_args import ELSEWHERE, IDLE, ServerArgs
from ch07_sglang_radix.tasks import PrefillTask
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.tiny_qwen import TINY_QWEN_PATH
from tests.common.models.files import rewrite
from tests.oracle import greedy


@pytest.fixture(scope="module")
def engine():
    return Engine(device="cpu", check=True, page_size=4)


@pytest.fixture(scope="module")
def question(engine):
    return engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": "What is a radix cache?"}])


def at_rest(engine):
    info = engine.get_server_info()
    assert (info["running"], info["waiting"], info["protected_tokens"]) == (0, 0, 0)
    assert info["free_tokens"] + info["evictable_tokens"] == info["max_total_num_tokens"]
    return info


def test_a_stream_grows_to_the_whole_answer(engine, question):
    whole = engine.generate(input_ids=question, sampling_params={"max_new_tokens": 9})
    chunks = list(engine.generate(input_ids=question, sampling_params={"max_new_tokens": 9}, stream=True))
    assert [len(chunk["output_ids"]) for chunk in chunks] == list(range(1, 10))
    assert all(later["text"].startswith(chunk["text"]) for chunk, later in itertools.pairwise(chunks))
    assert chunks[-1]["text"] == whole["text"]
    assert chunks[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 9}
    assert chunks[0]["meta_info"]["finish_reason"] is None


def test_streams_of_a_list_say_whose_they_are(engine, question):
    last = {}
    for chunk in engine.generate(input_ids=[question, [5, 6]], sampling_params={"max_new_tokens": 4}, stream=True):
        last[chunk["index"]] = chunk["output_ids"]
    assert last == {0: greedy(TINY_QWEN_PATH, question, 4), 1: greedy(TINY_QWEN_PATH, [5, 6], 4)}


def test_who_leaves_a_stream_early_gives_everything_back(engine, question):
    for i, _ in enumerate(
        engine.generate(input_ids=[question, [5, 6]], sampling_params={"max_new_tokens": 99}, stream=True)
    ):
        if i == 5:
            break
    at_rest(engine)
    assert engine.generate(input_ids=[7, 8], sampling_params={"max_new_tokens": 3})["output_ids"] == greedy(
        TINY_QWEN_PATH, [7, 8], 3
    )


def test_one_stream_at_a_time(engine):
    never_read = engine.generate(input_ids=[7, 8], sampling_params={"max_new_tokens": 3}, stream=True)
    del never_read
    at_rest(engine)
    stream = engine.generate(input_ids=[[5, 6], [7, 8]], sampling_params={"max_new_tokens": 9}, stream=True)
    first = next(stream)
    with pytest.raises(ValueError, match="a stream of this engine is still open"):
        engine.generate(input_ids=[1, 2])
    assert engine.abort_request(first["meta_info"]["id"]) == 1
    last = {chunk["index"]: chunk for chunk in stream}
    assert last[0]["meta_info"]["finish_reason"] == {"type": "abort"}
    assert last[1]["output_ids"] == greedy(TINY_QWEN_PATH, [7, 8], 9)
    at_rest(engine)


def test_n_answers_share_one_prompt(engine):
    ids = [11] * 33
    params = {"n": 4, "temperature": 1.5, "max_new_tokens": 8, "sampling_seed": 1}
    answers = engine.generate(input_ids=ids, sampling_params=params)
    assert len({tuple(answer["output_ids"]) for answer in answers}) > 1
    assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [0, 32, 32, 32]
    assert [a["output_ids"] for a in engine.generate(input_ids=ids, sampling_params=params)] == [
        a["output_ids"] for a in answers
    ]
    assert len(engine.generate(input_ids=[ids, [1, 2]], sampling_params={"n": 2, "max_new_tokens": 1})) == 4


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(engine, question):
    whole = engine.generate(input_ids=question, sampling_params={"max_new_tokens": 30})["text"]
    word = whole.split()[3]
    result = engine.generate(input_ids=question, sampling_params={"max_new_tokens": 30, "stop": ["@@", " " + word]})
    assert result["text"] == whole[: whole.index(" " + word)]
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": " " + word}
    assert result["meta_info"]["completion_tokens"] < 30
    one = engine.generate(input_ids=question, sampling_params={"max_new_tokens": 30, "stop": whole[5:9]})
    assert one["text"] == whole[:5], "across tokens"


@pytest.mark.parametrize("no_stop_trim", [False, True])
def test_a_stop_pattern_cuts_where_its_match_begins_and_is_named_itself(engine, question, no_stop_trim):
    """Inside a word, and with the space behind it: wherever tokens are cut."""
    whole = engine.generate(input_ids=question, sampling_params={"max_new_tokens": 30})["text"]
    pattern = re.escape(whole[6:8]) + r"\S*\s"
    found = re.search(pattern, whole)
    params = {"max_new_tokens": 30, "stop_regex": ["@@+", pattern], "no_stop_trim": no_stop_trim}
    result = engine.generate(input_ids=question, sampling_params=params)
    assert result["text"] == whole[: found.end() if no_stop_trim else found.start()]
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": pattern}
    assert result["meta_info"]["completion_tokens"] < 30
    chunks = list(engine.generate(input_ids=question, sampling_params=params, stream=True))
    assert all(result["text"].startswith(chunk["text"]) for chunk in chunks)


def test_stop_strings_that_end_inside_a_character(engine):
    """A Chinese character is several tokens of this vocabulary."""
    ids = engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": "什么是全归约？"}])
    whole = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 40})["text"]
    assert engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 40, "stop": whole[6]})["text"] == whole[:6]


def test_who_does_not_stream_is_told_once(question, monkeypatch):
    """An answer as it grows costs a dictionary and a trip to the caller's loop for every token."""
    told = []
    with Engine(device="cpu", page_size=4) as engine:
        output_of = engine.scheduler.output_of
        monkeypatch.setattr(engine.scheduler, "output_of", lambda req: told.append(req.rid) or output_of(req))
        params = {"max_new_tokens": 6, "ignore_eos": True}
        answer = asyncio.run(engine.async_generate(input_ids=question, sampling_params=params))
        assert len(answer["output_ids"]) == 6
        assert engine.generate(input_ids=question, sampling_params=params)["output_ids"] == answer["output_ids"]
        assert told == []
        assert len(list(engine.generate(input_ids=question, sampling_params=params, stream=True))) == 6
        assert len(told) == 5, "the last one is told as a result"


def test_many_callers_at_once_run_together(question):
    engine = Engine(device="cpu", check=True, page_size=4)

    async def callers():
        tasks = [engine.async_generate(input_ids=[i, i + 1], sampling_params={"max_new_tokens": 6}) for i in range(5)]
        return await asyncio.gather(*tasks)

    async def streamed():
        stream = await engine.async_generate(input_ids=question, sampling_params={"max_new_tokens": 5}, stream=True)
        return [chunk["output_ids"] async for chunk in stream]

    async def cancelled():
        task = asyncio.create_task(
            engine.async_generate(input_ids=question, sampling_params={"max_new_tokens": 400, "ignore_eos": True})
        )
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    results = asyncio.run(callers())
    assert [r["output_ids"] for r in results] == [greedy(TINY_QWEN_PATH, [i, i + 1], 6) for i in range(5)]
    assert engine.get_server_info()["steps"]["decode"] < 5 * 5, "they did not run one by one"
    chunks = asyncio.run(streamed())
    assert chunks[-1] == greedy(TINY_QWEN_PATH, question, 5)
    assert len(chunks) == 5

    async def cancelled_at_once():
        tasks = [asyncio.create_task(engine.async_generate(input_ids=[9, i])) for i in range(4)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(cancelled())
    asyncio.run(cancelled_at_once())
    at_rest(engine)
    assert engine.generate(input_ids=[[7, 8], [5, 6]], sampling_params={"max_new_tokens": 3})[1][
        "output_ids"
    ] == greedy(TINY_QWEN_PATH, [5, 6], 3)
    chunks = list(engine.generate(input_ids=[7, 8], sampling_params={"max_new_tokens": 3}, stream=True))
    assert chunks[-1]["output_ids"] == greedy(TINY_QWEN_PATH, [7, 8], 3)
    with pytest.raises(ValueError, match="the prompt is empty"):
        asyncio.run(engine.async_generate(input_ids=[]))
    assert engine.flush_cache()
    engine.shutdown()


def test_a_step_that_fails_reaches_whoever_waits():
    engine = Engine(device="cpu")

    def broken(task):
        raise RuntimeError("the GPU is on fire")

    engine.scheduler.control.execute = broken
    for _ in range(2):
        result = asyncio.run(engine.async_generate(input_ids=[1, 2]))
        assert result["meta_info"]["finish_reason"] == {
            "type": "abort", "message": "RuntimeError: the GPU is on fire", "status_code": 500,
            "err_type": "InternalServerError",
        }  # fmt: skip
    at_rest(engine)
    engine.shutdown()


def test_a_step_that_fails_ends_its_requests_and_nobody_else(engine, question):
    """The step that computes a prompt fails; those that decode go on, and every page comes back."""
    scheduler, execute = engine.scheduler, engine.scheduler.control.execute

    def fails_for_the_long_prompt(task):
        if isinstance(task, PrefillTask) and len(task.token_ids) > 90:
            raise RuntimeError("out of memory,\n  or so")
        return execute(task)

    rids = [scheduler.add_request(input_ids=[i, i + 1], max_new_tokens=9) for i in (3, 5)]
    for _ in range(3):
        scheduler.step()
    rids.append(scheduler.add_request(input_ids=[7] * 100, max_new_tokens=9))
    scheduler.control.execute = fails_for_the_long_prompt
    try:
        results = scheduler.process_requests()
    finally:
        del scheduler.control.execute
    assert [results[rid].output_ids for rid in rids[:2]] == [greedy(TINY_QWEN_PATH, [i, i + 1], 9) for i in (3, 5)]
    assert results[rids[2]].finish_reason["message"] == "RuntimeError: out of memory, or so"
    at_rest(engine)


def test_threads_wait_in_line(engine):
    with ThreadPoolExecutor(4) as pool:
        params = {"max_new_tokens": 6}
        results = list(pool.map(lambda i: engine.generate(input_ids=[i, i + 1], sampling_params=params), range(12)))
    assert [r["output_ids"] for r in results] == [greedy(TINY_QWEN_PATH, [i, i + 1], 6) for i in range(12)]


def test_an_open_stream_keeps_everybody_else_out_at_the_call(engine):
    stream = engine.generate(input_ids=[7, 8], sampling_params={"max_new_tokens": 3}, stream=True)  # unread
    for call in (
        lambda: engine.generate(input_ids=[1, 2], stream=True),
        lambda: asyncio.run(engine.async_generate(input_ids=[1, 2])),
    ):
        with pytest.raises(ValueError, match="a stream of this engine is still open"):
            call()
    assert list(stream)[-1]["output_ids"] == greedy(TINY_QWEN_PATH, [7, 8], 3)


def test_after_shutdown_every_call_says_so():
    engine = Engine(device="cpu")
    engine.shutdown()
    engine.shutdown()
    for call in (lambda: engine.generate("a"), engine.get_server_info, engine.flush_cache, lambda: engine.wrapper):
        with pytest.raises(ValueError, match="this engine is shut down; make a new one"):
            call()


@pytest.mark.parametrize("caught", [True, False])
def test_an_exception_that_leaves_the_with_block_is_told_to_the_other_ranks(monkeypatch, caught):
    """One that is caught inside is no failure of this rank."""
    told = []
    monkeypatch.setattr("ch07_sglang_radix.engine.shutdown_tensor_parallel", lambda tp, error: told.append(error))
    failure = KeyError("mine")
    with suppress(KeyError), Engine(device="cpu", max_total_tokens=64):
        try:
            raise failure
        except KeyError:
            if not caught:
                raise
    assert told == [None if caught else failure]


def test_an_interrupt_leaves_nothing_behind(engine):
    def interrupted(task):
        raise KeyboardInterrupt

    engine.scheduler.control.execute = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate(input_ids=[[1, 2], [3, 4]])
    del engine.scheduler.control.execute
    at_rest(engine)
    assert engine.generate(input_ids=[7, 8], sampling_params={"max_new_tokens": 3})["output_ids"] == greedy(
        TINY_QWEN_PATH, [7, 8], 3
    )


def test_flush_cache_forgets_and_refuses_while_something_runs(engine, question):
    engine.generate(input_ids=question, sampling_params={"max_new_tokens": 2})
    assert at_rest(engine)["evictable_tokens"] > 0
    stream = engine.generate(input_ids=question, sampling_params={"max_new_tokens": 5}, stream=True)
    next(stream)
    assert not engine.flush_cache()
    stream.close()
    assert engine.flush_cache()
    info = at_rest(engine)
    assert info["free_tokens"] == info["max_total_num_tokens"]
    again = engine.generate(input_ids=question, sampling_params={"max_new_tokens": 2})
    assert again["meta_info"]["cached_tokens"] == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", range(7))
def test_abort_at_any_moment_gives_every_page_back(steps, overlap):
    """Waiting, in the middle of its chunks, running, finished: five requests, one aborted after so many steps."""
    engine = Engine(
        device="cpu", check=True, page_size=4, max_running_requests=3, chunked_prefill_size=8,
        disable_overlap_schedule=not overlap,
    )  # fmt: skip
    scheduler, prompts = engine.scheduler, [[i] * (5 + 7 * i) for i in range(1, 6)]
    for victim in range(5):
        engine.flush_cache()
        rids = [scheduler.add_request(input_ids=p, max_new_tokens=4) for p in prompts]
        for _ in range(steps):
            scheduler.step()
        ended = engine.abort_request(rids[victim])
        results = scheduler.process_requests()
        for i, rid in enumerate(rids):
            expected = greedy(TINY_QWEN_PATH, prompts[i], 4)
            if i == victim and ended:
                assert results[rid].finish_reason == {"type": "abort"}
                assert results[rid].output_ids == expected[: len(results[rid].output_ids)]
            else:
                assert results[rid].output_ids == expected
        at_rest(engine)
    assert engine.abort_request(10_000) == 0
    rids = [scheduler.add_request(input_ids=p, max_new_tokens=4) for p in prompts]
    scheduler.step()
    assert engine.abort_request(abort_all=True) == 5
    assert len(scheduler.process_requests()) == 5
    at_rest(engine)


def test_info_counts_what_was_served():
    engine = Engine(device="cpu", page_size=4, max_total_tokens=400, schedule_policy="lpm", radix_eviction_policy="lfu")
    for _ in range(2):
        engine.generate(input_ids=list(range(21)), sampling_params={"max_new_tokens": 2})
    info = at_rest(engine)
    assert (info["prompt_tokens"], info["cached_tokens"], info["hit_rate"]) == (42, 20, 20 / 42)
    assert (info["schedule_policy"], info["radix_eviction_policy"]) == ("lpm", "lfu")
    assert info["max_total_num_tokens"] == 400


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("enable_priority_scheduling", "schedule_policy='priority'"), ("prefill_decode_interval", "leave it out"),
     ("host", "launch_server"), ("port", "launch_server"), ("api_key", "launch_server"), ("chat_template", "tokenizer_path="),
     ("enable_metrics", "get_server_info"), ("log_requests", "trace=")],
)  # fmt: skip
def test_a_name_of_sglang_s_that_is_not_here_comes_with_a_way_out(name, way_out):
    with pytest.raises(ValueError, match=f"{name}.*: .*{re.escape(way_out)}"):
        Engine(**{name: "x"})


def test_switches_of_sglang_s_that_are_off_ask_for_nothing():
    with Engine(
        device="cpu", enable_priority_scheduling=False, enable_metrics=False, log_requests=False, host=None
    ) as engine:
        with pytest.raises(ValueError, match="cache_salt is not here: use extra_key"):
            engine.generate("a", cache_salt="mine")
        assert engine.generate(input_ids=[1], sampling_params={"max_new_tokens": 1}, cache_salt=None)["output_ids"]


def test_one_rid_for_a_list_is_numbered():
    with Engine(device="cpu") as engine:
        short = {"max_new_tokens": 1}
        ids = [one["meta_info"]["id"] for one in engine.generate(input_ids=[[1], [2]], sampling_params=short, rid="a")]
        assert ids == ["a_0", "a_1"]
        assert engine.generate(input_ids=[1], sampling_params=short, rid="a")["meta_info"]["id"] == "a"
        assert engine.generate(input_ids=[[1]], sampling_params=short, rid="a")[0]["meta_info"]["id"] == "a_0"
        with pytest.raises(ValueError, match="rid: an empty text is none"):
            engine.generate(input_ids=[[1], [2]], rid="")


def test_no_limit_of_running_requests_is_the_default_one():
    with Engine(device="cpu", max_running_requests=None) as engine:
        assert engine.wrapper.max_running_requests == 256


def test_a_flush_is_no_eviction():
    engine = Engine(device="cpu", page_size=4, max_total_tokens=400)
    engine.generate(input_ids=list(range(21)), sampling_params={"max_new_tokens": 2})
    before = engine.get_server_info()
    assert engine.flush_cache()
    info = at_rest(engine)
    assert (before["evictable_tokens"], info["evictable_tokens"], info["free_tokens"]) == (20, 0, 400)
    assert info["evicted_tokens"] == before["evicted_tokens"] == 0


@pytest.mark.parametrize("policy", ["lpm", "dfs-weight", "hrrn", "dynamic", "lof"])
def test_without_a_tree_the_policy_that_is_told_is_the_one_that_is_used(policy):
    with Engine(device="cpu", disable_radix_cache=True, schedule_policy=policy) as engine:
        assert engine.get_server_info()["schedule_policy"] == ("lof" if policy == "lof" else "fcfs")


def test_an_abort_of_nothing_says_what_to_give():
    with Engine(device="cpu") as engine, pytest.raises(ValueError, match="give rid=, or abort_all=True"):
        engine.abort_request()


def test_a_limit_of_the_user_s_own_is_named_as_such():
    for given, said in (({"context_length": 4}, "context_length is 4"), ({}, "the model ends at 2048")):
        with Engine(device="cpu", **given) as engine, pytest.raises(ValueError, match=f"tokens, but {said};"):
            engine.generate(input_ids=[1, 2], sampling_params={"max_new_tokens": 2100})


def test_who_left_the_tokenizer_out_is_told_so():
    with Engine(device="cpu", skip_tokenizer_init=True) as engine:
        with pytest.raises(ValueError, match=r"no tokenizer \(.*skip_tokenizer_init=True\); give input_ids"):
            engine.generate("a text")
        with pytest.raises(ValueError, match=r"skip_tokenizer_init=True\), so no text to stop at"):
            engine.generate(input_ids=[1], sampling_params={"stop": "x"})


def test_cached_tokens_are_what_a_plain_simulation_says():
    """A random conversation, request by request: the longest prefix that any earlier one has left, in whole pages."""
    rng = torch.Generator().manual_seed(3)
    for page_size in (1, 4, 16):
        engine, left, served = Engine(device="cpu", check=True, page_size=page_size), [], []
        for _ in range(25):
            base = left[int(torch.randint(len(left), (), generator=rng))] if left else []
            n = int(torch.randint(len(base) + 1, (), generator=rng))
            ids = (
                base[:n]
                + torch.randint(0, 900, (int(torch.randint(1, 20, (), generator=rng)),), generator=rng).tolist()
            )
            out = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 3, "ignore_eos": True})
            common = max((_common(ids[:-1], other) for other in left), default=0)
            assert out["meta_info"]["cached_tokens"] == common // page_size * page_size
            left.append(ids + out["output_ids"][:-1])  # the last token was never fed in
            left[-1] = left[-1][: len(left[-1]) // page_size * page_size]
            served.append(common)
        assert sum(served) > 0


def _common(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def test_the_trace_tells_every_step(tmp_path):
    path = tmp_path / "steps.jsonl"
    with Engine(device="cpu", page_size=4, chunked_prefill_size=16, max_total_tokens=80, trace=path) as engine:
        prompts = [list(range(40)), list(range(20)), [7] * 5]
        outputs = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 3, "ignore_eos": True})
        engine.generate(input_ids=[300 + i for i in range(60)], sampling_params={"max_new_tokens": 2})
        evicted, inserted = engine.scheduler.tree.evicted, engine.scheduler.tree.inserted
        free, steps = engine.scheduler.pool.num_free_pages, engine.scheduler.steps
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert {kind: kinds.count(kind) for kind in ("prefill", "decode")} == steps
    computed = sum(new for line in lines if line["kind"] == "prefill" for _, _, new, _, _ in line["scheduled"])
    cached = sum(output["meta_info"]["cached_tokens"] for output in outputs)
    assert computed == sum(map(len, prompts)) + 60 - cached
    assert any(line["chunked"] == 0 for line in lines)
    whys = [(rid, why) for line in lines if line["kind"] == "prefill" for rid, *_, why in line["scheduled"]]
    assert whys[:3] == [(0, "fcfs"), (0, "chunk"), (0, "chunk")]
    assert {"0": "full"} not in [line.get("held") for line in lines]
    assert any(line.get("held", {}).get("1") for line in lines), "it shares what 0 computes, or finds no budget"
    assert sum(line["finished"] for line in lines) == 4
    assert sum(line["tree"]["evicted"] for line in lines) == evicted > 0
    assert sum(line["tree"]["inserted"] for line in lines) == inserted
    taken, given = (sum(line["pages"][key] for line in lines) for key in ("taken", "given"))
    assert 20 - taken + given == free == lines[-1]["pages"]["free"]
    assert all(line["ms"]["total"] >= line["ms"]["settle"] for line in lines)


def test_kv_in_a_smaller_dtype_holds_more_and_says_nearly_the_same(question):
    full, half = (Engine(device="cpu", kv_cache_dtype=dtype) for dtype in ("auto", "bfloat16"))
    assert half.wrapper.kv_cache.k.dtype == torch.bfloat16
    assert half.get_server_info()["kv_cache_dtype"] == "bfloat16"
    answers = [
        e.generate(input_ids=question, sampling_params={"max_new_tokens": 20}, return_logprob=True)
        for e in (full, half)
    ]
    a, b = ([logprob for logprob, _, _ in answer["meta_info"]["output_token_logprobs"]] for answer in answers)
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    assert a != b
    assert a == pytest.approx(b, abs=0.05)


def test_the_pool_can_be_a_share_of_the_memory():
    sizes = [
        Engine(device="cpu", mem_fraction_static=f, max_running_requests=4000).get_server_info()["max_total_num_tokens"]
        for f in (0.01, 0.02)
    ]
    assert 1.8 < sizes[1] / sizes[0] < 2.3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"schedule_policy": "lru"}, "schedule_policy='lru' is unknown; use fcfs"),
        ({"radix_eviction_policy": "lpm"}, "radix_eviction_policy='lpm' is unknown; use lru"),
        ({"mem_fraction_static": 1.5}, "mem_fraction_static=1.5 must be in"),
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype='int3' is unknown; use auto"),
        ({"small_request_share": 1.0}, "small_request_share=1.0 must be in"),
    ],
)
def test_bad_options_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Engine(device="cpu", **options)


def test_sglang_s_defaults_spelled_out_make_the_engine_without_them(engine):
    assert ServerArgs(**IDLE) == ServerArgs(**dict.fromkeys(ELSEWHERE)) == ServerArgs()
    assert set(IDLE) == set(ELSEWHERE)
    assert not {field.name for field in fields(ServerArgs)} & set(ELSEWHERE)
    idle = {"image_data": None, "audio_data": None, "lora_path": None, "return_hidden_states": False}
    params = {"max_new_tokens": 1, "regex": None, "custom_params": None}
    assert engine.generate("What?", params, **idle)["output_ids"]
    for call in (engine.generate, lambda *args, **more: asyncio.run(engine.async_generate(*args, **more))):
        with pytest.raises(ValueError, match=r"^argument audio_data is not here: this engine reads text and pictures$"):
            call("What?", params, audio_data="a")
        with pytest.raises(
            ValueError, match=r"^image_data: this model reads text only; use one with a vision tower, or leave it out$"
        ):
            call("What?", params, image_data="a")
        with pytest.raises(ValueError, match=r"^unknown argument sampling_param; did you mean sampling_params\?$"):
            call("What?", sampling_param=params)
    at_rest(engine)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"pp_size": 5}, "^pp_size=5 stages for 4 layers: every stage needs one; use pp_size=4 or less$"),
        (
            {"pp_size": 2, "pp_layer_partition": "5,5"},
            "^pp_layer_partition=5,5 makes 10 layers, but the model has 4; use 2,2$",
        ),
        (
            {"pp_size": 2, "pp_layer_partition": "4,0"},
            "^pp_layer_partition=4,0 leaves a stage without layers; use 2,2, or fewer",
        ),
        ({"pp_size": 4, "tp_size": 100}, "^tp100 x pp4 would start 399 processes; this machine takes"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_before_any_rank_is_started(given, complaint, monkeypatch):
    monkeypatch.setattr(
        "common.distributed.spawn.subprocess.Popen", lambda *_, **__: pytest.fail("a process was started")
    )
    with pytest.raises(ValueError, match=complaint):
        Engine(device="cpu", **given)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            {"pp_async_batch_depth": 1},
            "^pp_async_batch_depth=1 is about stages, and pp_size=1; use pp_size=2 or leave it out$",
        ),
        (
            {"load_balance_method": "cache_aware"},
            "^load_balance_method='cache_aware' chooses among replicas, and dp_size=1; use dp_size=2, or leave it out$",
        ),
        (
            {"enable_dynamic_chunking": True},
            "^enable_dynamic_chunking=True is about stages, and pp_size=1; use pp_size=2 or leave it out$",
        ),
        (
            {"pp_size": 2, "enable_dynamic_chunking": True, "chunked_prefill_size": -1},
            "as long as the first, and chunked_prefill_size=-1 makes none; give the first one's tokens$",
        ),
        ({"pp_size": 2, "enable_dynamic_chunking": 3}, "^enable_dynamic_chunking=3 must be"),
        (
            {"pp_size": 2, "pp_layer_partition": "4"},
            r"^pp_layer_partition='4' lists 1 stage\(s\), but pp_size=2; give each its",
        ),
        (
            {"pp_size": 2, "pp_layer_partition": "1,x"},
            "pp_layer_partition='1,x' must be the number of layers of each stage",
        ),
        ({"moe_a2a_backend": "deepep"}, "^engine argument moe_a2a_backend is not here: use ep_dispatch='all_to_all', "),
        (
            {"tpsize": 2, "dcp_size": 2},
            r"^engine argument dcp_size .*; unknown engine argument tpsize; did you mean tp_size",
        ),
        ({"max_lora_chunk_size": 32}, "^engine argument max_lora_chunk_size is not here: segments"),
        ({"colour": 1}, r"^unknown engine argument colour; help\(ServerArgs\) has them all$"),
    ],
)
def test_what_is_not_here_is_refused_by_every_door(given, complaint):
    for door in (ServerArgs, lambda **given: ServerArgs.of(given), Engine):
        with pytest.raises(ValueError, match=complaint):
            door(**given)


def test_half_and_float_are_sglang_s_other_names_of_dtypes(checkpoint):
    for name, dtype in (("half", "float16"), ("float", "float32"), (None, "float32")):
        info = Engine(str(checkpoint("qwen2")), device="cpu", dtype=name, max_total_tokens=64).get_server_info()
        assert (info["dtype"], info["kv_cache_dtype"]) == (dtype, dtype)


@pytest.mark.parametrize(
    ("params", "complaint"),
    [({"n": 0}, "n=0 must be at least 1"), ({"stop": [""]}, "an empty text is none"), ({"stop": 3}, "stop")],
)
def test_bad_parameters_are_refused_before_anything_runs(engine, params, complaint):
    steps = dict(engine.scheduler.steps)
    with pytest.raises(ValueError, match=complaint):
        engine.generate(["What?", "Why?"], [{}, params])
    assert engine.scheduler.steps == steps
    at_rest(engine)


def refusal(folder, options):
    """What this rank says to them; None if it takes them."""
    try:
        Engine(str(folder), device="cpu", **options)
    except ValueError as error:
        return str(error)
    return None


def test_weights_that_are_not_finite_are_named_on_request_by_all_ranks(copy, ranks):
    folder = copy("qwen2")
    assert ranks(2).run(refusal, folder, {"check_finite": True}) == [None, None]
    rewrite(folder, lambda weights: weights["model.norm.weight"][3:5].fill_(math.inf))
    both = ranks(2).run(refusal, folder, {"check_finite": True})
    assert both[0] == both[1]
    assert "NaN or infinity as float32 in 1 tensors: model.norm.weight (2 of 112)" in both[0]
    with Engine(str(folder), device="cpu") as engine:
        result = engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 2})
    assert "NaN or infinite" in result["meta_info"]["finish_reason"]["message"]


def scheduler_refusal(options):
    wrapper = TPRadixAttentionModelWrapper(device="cpu", max_total_tokens=64)
    try:
        TPScheduler(wrapper, **options)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"schedule_policy": "lru"}, "schedule_policy='lru' is unknown; use fcfs"),
        ({"radix_eviction_policy": "lpm"}, "radix_eviction_policy='lpm' is unknown; use lru"),
        ({"schedule_policy": "shortest-prefill-first", "disable_radix_cache": True}, "needs the radix cache"),
    ],
)
def test_what_rank_0_alone_uses_is_refused_by_all_ranks(options, complaint, ranks):
    for both in (ranks(2).run(refusal, TINY_QWEN_PATH, options), ranks(2).run(scheduler_refusal, options)):
        assert both[0] == both[1]
        assert complaint in both[0]


def stream_and_follow(prompt):
    engine = Engine(device="cpu")
    chunks = [
        c["output_ids"] for c in engine.generate(input_ids=prompt, sampling_params={"max_new_tokens": 4}, stream=True)
    ]
    after = engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 3})["output_ids"]
    answer = None
    if engine.scheduler.tp.rank == 0:
        answer = asyncio.run(engine.async_generate(input_ids=prompt, sampling_params={"max_new_tokens": 4}))[
            "output_ids"
        ]
        engine._loop.stop()
    else:
        engine.follow()
    return chunks, after, answer


def test_two_ranks_stream_and_follow(ranks, question):
    (chunks, after, answer), (others, other_after, nothing) = ranks(2).run(stream_and_follow, question)
    expected = greedy(TINY_QWEN_PATH, question, 4)
    assert chunks == [expected[: n + 1] for n in range(4)]
    assert others == [expected]
    assert after == other_after == greedy(TINY_QWEN_PATH, [1, 2, 3], 3)
    assert (answer, nothing) == (expected, None)
