"""Scheduler, detokenizer and manager in one process, against Engine.generate for the same calls: the same dictionaries."""

import asyncio
import itertools
import json

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.serving.io_struct import GenerateRequest, RequestError, SessionParams
from tests.ch07.serving.calls import CALLS, engine_call, expected
from tests.ch07.serving.running import InThisProcess

SETTINGS = {"page_size": 4, "max_total_tokens": 8192, "random_seed": 3}


@pytest.fixture(scope="module")
def here():
    running = InThisProcess(SETTINGS)
    yield running
    running.end()


def collect(manager, request, is_disconnected=None, most=None):
    async def all_of_it():
        found = []
        stream = manager.generate(request, is_disconnected)
        async for one in stream:
            found.append(one)
            if len(found) == most:
                break
        await stream.aclose()
        return found

    return all_of_it()


def at_rest(here):
    async def wait():
        while (info := await here.manager.server_info())["running"] or info["waiting"]:
            await asyncio.sleep(0.02)
        return info

    info = here.run(asyncio.wait_for(wait(), 20))
    assert info["free_tokens"] + info["evictable_tokens"] == info["max_total_num_tokens"]
    return info


def test_every_call_answers_what_the_engine_answers():
    """In the same order from the same start, so that seeds and hits are the same too."""
    here, engine = InThisProcess(SETTINGS), Engine(device="cpu", **SETTINGS)
    try:
        for name, call in CALLS.items():
            known = engine.generate(**engine_call(call, name))
            given = here.run(here.manager.answer(GenerateRequest(**call, rid=_rids(call, name))))
            assert json.loads(json.dumps(given)) == expected(known), name
        served = here.run(here.manager.server_info())
        known = engine.get_server_info()
        assert {key: served[key] for key in ("prompt_tokens", "cached_tokens", "evictable_tokens")} == {
            key: known[key] for key in ("prompt_tokens", "cached_tokens", "evictable_tokens")
        }
    finally:
        here.end()
        engine.shutdown()


def _rids(call, name):
    return engine_call(call, name)["rid"]


def test_a_stream_is_cumulative_and_ends_with_the_whole_answer(here):
    params = {"max_new_tokens": 24, "stop": ["tree"]}
    whole = here.run(here.manager.answer(GenerateRequest(text="What is a radix cache?", sampling_params=params)))
    chunks = here.run(
        collect(here.manager, GenerateRequest(text="What is a radix cache?", sampling_params=params, stream=True))
    )
    assert len(chunks) > 3
    for chunk, later in itertools.pairwise(chunks):
        assert later["text"].startswith(chunk["text"])
        assert later["output_ids"][: len(chunk["output_ids"])] == chunk["output_ids"]
        assert chunk["meta_info"]["finish_reason"] is None
    assert {key: chunks[-1][key] for key in ("text", "output_ids")} == {
        key: whole[key] for key in ("text", "output_ids")
    }
    assert chunks[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(here):
    """A grammar makes the model say characters that its vocabulary has in pieces only."""
    params = {"max_new_tokens": 40, "regex": "all is 万里长城"}
    chunks = here.run(collect(here.manager, GenerateRequest(text="What?", sampling_params=params, stream=True)))
    decode, whole = here.manager.tokenizer.decode, chunks[-1]["output_ids"]
    assert chunks[-1]["text"] == "all is 万里长城"
    assert any(decode(whole[:n]).endswith("\ufffd") for n in range(len(whole))), "some token ends inside a character"
    for chunk in chunks:  # whether its tokens came alone or, on a busy machine, several at once
        assert chunk["text"] == decode(chunk["output_ids"]).rstrip("\ufffd"), "half a character waits, and nothing else"


def test_answers_of_a_batch_say_which_they_are(here):
    request = GenerateRequest(input_ids=[[5, 6], [7, 8, 9]], sampling_params={"max_new_tokens": 4}, stream=True)
    last = {chunk["index"]: chunk for chunk in here.run(collect(here.manager, request))}
    assert [last[i]["meta_info"]["prompt_tokens"] for i in (0, 1)] == [2, 3]
    assert all(len(one["output_ids"]) == 4 for one in last.values())


REFUSED = {
    "neither": ({}, "give either text or input_ids"),
    "both": ({"text": "a", "input_ids": [1]}, "give either text or input_ids"),
    "empty": ({"input_ids": []}, "empty"),
    "outside": ({"input_ids": [10**9]}, "outside the vocabulary"),
    "parameter": ({"text": "a", "sampling_params": {"temprature": 1}}, "unknown sampling parameter"),
    "value": ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
    "too long": ({"text": "a", "sampling_params": {"max_new_tokens": 10**8}}, "max_new_tokens"),
    "logprobs": ({"text": "a", "top_logprobs_num": 2}, "return_logprob"),
    "too many": ({"text": ["a"] * 2000}, "2000 prompts"),
    "n": ({"text": "a", "sampling_params": {"n": 100_000}}, "answers of a request"),
    "stops": ({"text": "a", "sampling_params": {"stop": ["x"] * 40}}, "40 stop"),
    "top": ({"text": "a", "return_logprob": True, "top_logprobs_num": 5000}, "5000 top_logprobs_num"),
    "surrogate": ({"text": "\ud800"}, "surrogate"),
    "no session": ({"text": "a", "session_params": SessionParams("nobody")}, "is not open"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_before_anything_is_queued(here, name):
    body, said = REFUSED[name]
    before = at_rest(here)["steps"]
    with pytest.raises(RequestError, match=said) as refused:
        here.run(collect(here.manager, GenerateRequest(**body)))
    assert refused.value.status == 400
    assert "\n" not in refused.value.message
    assert at_rest(here)["steps"] == before


def test_a_name_that_is_in_use_is_refused(here):
    async def both():
        request = GenerateRequest(input_ids=[1, 2], sampling_params={"max_new_tokens": 50}, rid="mine", stream=True)
        first = here.manager.generate(request)
        await anext(first)
        with pytest.raises(RequestError, match="is in use"):
            await anext(here.manager.generate(request))
        await first.aclose()

    here.run(both())
    at_rest(here)
    again = GenerateRequest(input_ids=[1, 2], sampling_params={"max_new_tokens": 2}, rid="mine")
    assert here.run(here.manager.answer(again))["meta_info"]["id"] == "mine"


@pytest.mark.parametrize("how", ["closed", "cancelled", "disconnected"])
@pytest.mark.parametrize("stream", [True, False])
def test_whoever_goes_away_gives_every_page_back(here, how, stream):
    params = {"max_new_tokens": 2000, "ignore_eos": True}
    request = GenerateRequest(input_ids=[[3, 4], [5, 6]], sampling_params=params, stream=stream)

    async def leave():
        if how == "closed" and stream:
            return len(await collect(here.manager, request, most=3))
        if how == "disconnected":

            async def gone():
                return True

            return len(await collect(here.manager, request, gone))
        task = asyncio.create_task(collect(here.manager, request))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = at_rest(here)
    here.run(leave())
    after = at_rest(here)
    assert after["steps"]["decode"] - before["steps"]["decode"] < 2000
    assert here.manager.num_in_flight == 0


def test_abort_ends_what_the_name_means(here):
    async def main():
        request = GenerateRequest(
            text="What is a radix cache?",
            sampling_params={"max_new_tokens": 500, "ignore_eos": True, "n": 2},
            rid="twins",
        )
        waiting = asyncio.create_task(here.manager.answer(request))
        while here.manager.num_in_flight < 2:
            await asyncio.sleep(0.01)
        assert await here.manager.abort("twi") == 0, "a name, not a prefix of one"
        aborted = await here.manager.abort("twins")
        return aborted, await waiting

    aborted, answers = here.run(main())
    assert aborted == 2
    assert [one["meta_info"]["finish_reason"] for one in answers] == [{"type": "abort"}] * 2
    assert [one["meta_info"]["id"] for one in answers] == ["twins_0", "twins_1"]
    with pytest.raises(RequestError, match="give the rid"):
        here.run(here.manager.abort(""))


def test_flush_is_done_when_nothing_runs(here):
    here.run(here.manager.answer(GenerateRequest(input_ids=[1] * 40, sampling_params={"max_new_tokens": 2})))
    assert at_rest(here)["evictable_tokens"] > 0

    async def while_it_runs():
        stream = here.manager.generate(
            GenerateRequest(input_ids=[1, 2], sampling_params={"max_new_tokens": 400}, stream=True)
        )
        await anext(stream)
        done = await here.manager.flush_cache()
        await stream.aclose()
        return done

    assert here.run(while_it_runs()) is False
    at_rest(here)
    assert here.run(here.manager.flush_cache()) is True
    assert at_rest(here)["free_tokens"] == at_rest(here)["max_total_num_tokens"]


def test_a_probe_is_counted_nowhere_and_cached_nowhere(here):
    counts = ("prompt_tokens", "cached_tokens", "evictable_tokens", "free_tokens", "hit_rate")
    before = at_rest(here)
    assert all(here.run(here.manager.healthy(20)) for _ in range(3))
    after = at_rest(here)
    assert {key: after[key] for key in counts} == {key: before[key] for key in counts}
    assert after["steps"]["prefill"] == before["steps"]["prefill"] + 3, "but something was computed"


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_a_pause_and_what_becomes_of_the_requests(here, mode):
    body = {"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 40, "ignore_eos": True}}
    undisturbed = here.run(here.manager.answer(GenerateRequest(**body)))

    async def main():
        stream = here.manager.generate(GenerateRequest(**body, stream=True))
        await anext(stream)
        met = await here.manager.pause(mode)
        info = await here.manager.server_info()
        steps = dict(info["steps"])
        assert await here.manager.healthy(20), "paused is not dead"
        await asyncio.sleep(0.1)
        assert (await here.manager.server_info())["steps"] == steps, "no step runs"
        if mode == "in_place":
            await here.manager.step(2)
            await asyncio.sleep(0.3)
            now = (await here.manager.server_info())["steps"]
            assert sum(now.values()) == sum(steps.values()) + 2
        await here.manager.resume()
        return met, info, [one async for one in stream][-1]

    met, info, last = here.run(main())
    assert met == 1
    assert (info["running"], info["waiting"]) == {"abort": (0, 0), "retract": (0, 1), "in_place": (1, 0)}[mode]
    if mode == "abort":
        assert last["meta_info"]["finish_reason"] == {"type": "abort"}
    else:
        assert last["output_ids"] == undisturbed["output_ids"]
        assert last["text"] == undisturbed["text"]
    at_rest(here)


def test_steps_one_by_one_are_for_a_paused_engine(here):
    with pytest.raises(RequestError, match="paused"):
        here.run(here.manager.step(1))


def test_a_session_continues_by_token_ids_and_hits_the_tree(here):
    async def main():
        name = here.manager.sessions.open()
        params = {"max_new_tokens": 8, "ignore_eos": True}

        async def ask(text, **more):
            session = SessionParams(name, **more)
            return await here.manager.answer(GenerateRequest(text=text, sampling_params=params, session_params=session))

        first = await ask("What is a radix cache?")
        second = await ask(" And what is a page?", rid=first["meta_info"]["id"])
        branch = await ask(" Say it again.", rid=first["meta_info"]["id"])
        here.manager.sessions.close(name)
        return first, second, branch

    here.run(here.manager.flush_cache())
    first, second, branch = here.run(main())
    encode = here.manager.tokenizer.encode
    context = encode("What is a radix cache?") + first["output_ids"]
    for answer, text in ((second, " And what is a page?"), (branch, " Say it again.")):
        assert answer["meta_info"]["prompt_tokens"] == len(context) + len(encode(text))
        assert answer["meta_info"]["cached_tokens"] >= (len(context) - 1) // 4 * 4
    bare = GenerateRequest(
        input_ids=context + encode(" Say it again."), sampling_params={"max_new_tokens": 8, "ignore_eos": True}
    )
    assert here.run(here.manager.answer(bare))["output_ids"] == branch["output_ids"]


def test_a_streaming_session_keeps_its_k_and_v_through_a_turn_whose_client_goes_away(here):
    prompts = ["What is a radix cache?", " And what is a page?", " Say it again."]
    params = {"max_new_tokens": 8, "ignore_eos": True}

    async def main():
        name = here.manager.sessions.open(streaming=True)
        wanted = lambda text, **more: GenerateRequest(  # noqa: E731
            text=text, sampling_params=params | more, session_params=SessionParams(name), stream=True
        )
        first = (await collect(here.manager, wanted(prompts[0])))[-1]
        answers = here.manager.generate(wanted(prompts[1], max_new_tokens=2000))
        await anext(answers)
        with pytest.raises(RequestError, match="wait for the turn that runs"):
            await here.manager.answer(wanted(prompts[2]))
        await answers.aclose()
        held = (await here.manager.server_info())["session_held_tokens"]
        last = (await collect(here.manager, wanted(prompts[2])))[-1]
        here.manager.sessions.close(name)
        return first, held, last

    here.run(here.manager.flush_cache())
    first, held, last = here.run(main())
    context = here.manager.tokenizer.encode(prompts[0]) + first["output_ids"]
    in_tree = (len(context) - 8) // 4 * 4
    assert held == -(-(len(context) - 1) // 4) * 4 - in_tree, "of the first turn: its last token has no K and V"
    assert last["meta_info"]["cached_tokens"] == len(context) - 1
    at_rest(here)
    bare = GenerateRequest(input_ids=context + here.manager.tokenizer.encode(prompts[2]), sampling_params=params)
    assert here.run(here.manager.answer(bare))["output_ids"] == last["output_ids"]


def test_a_session_that_nobody_continues_gives_its_pages_back(here):
    async def main():
        name = here.manager.sessions.open(streaming=True, timeout=0.1)
        request = GenerateRequest(
            text="What is a page?", sampling_params={"max_new_tokens": 8}, session_params=SessionParams(name)
        )
        await here.manager.answer(request)
        while len(here.manager.sessions):
            await asyncio.sleep(0.02)
        while (await here.manager.server_info())["held_tokens"]:
            await asyncio.sleep(0.02)

    here.run(asyncio.wait_for(main(), 100))
    at_rest(here)


def test_a_full_queue_is_said_and_nothing_of_the_request_runs():
    here = InThisProcess({"max_running_requests": 1, **SETTINGS}, max_queued_requests=2)
    try:

        async def main():
            await here.manager.pause("in_place")
            one = GenerateRequest(input_ids=[1, 2], sampling_params={"max_new_tokens": 2})
            waiting = [asyncio.create_task(here.manager.answer(one)) for _ in range(2)]
            while here.manager.num_queued < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(RequestError, match="queue is full") as refused:
                await here.manager.answer(one)
            assert refused.value.status == 503
            with pytest.raises(RequestError, match="queue is full"):
                await here.manager.answer(GenerateRequest(input_ids=[[1]] * 3))
            await here.manager.resume()
            answers = await asyncio.gather(*waiting)
            return [len(one["output_ids"]) for one in answers], len((await here.manager.answer(one))["output_ids"])

        assert here.run(main()) == ([2, 2], 2)
    finally:
        here.end()


def test_without_a_tokenizer_ids_go_in_and_out():
    here = InThisProcess({"skip_tokenizer_init": True, **SETTINGS})
    try:
        request = GenerateRequest(
            input_ids=[5, 6], sampling_params={"max_new_tokens": 4}, return_logprob=True, logprob_start_len=0
        )
        answer = here.run(here.manager.answer(request))
        assert (answer["text"], len(answer["output_ids"])) == ("", 4)
        assert len(answer["meta_info"]["input_token_logprobs"]) == 2
        assert here.run(here.manager.healthy(20))
        with pytest.raises(RequestError, match="no tokenizer"):
            here.run(here.manager.answer(GenerateRequest(text="a")))
    finally:
        here.end()


def test_when_the_server_fails_whoever_waits_hears_why():
    here = InThisProcess(SETTINGS)

    async def main():
        request = GenerateRequest(input_ids=[1, 2], sampling_params={"max_new_tokens": 1000, "ignore_eos": True})
        await here.manager.pause("in_place")
        waiting = asyncio.create_task(here.manager.answer(request))
        while not here.manager.num_in_flight:
            await asyncio.sleep(0.01)
        here.manager.fail("the scheduler (pid 5) has died")
        with pytest.raises(RequestError, match="failed: the scheduler") as refused:
            await here.manager.answer(request)
        return await waiting, refused.value.status, await here.manager.healthy()

    answer, status, healthy = here.run(main())
    assert answer["meta_info"]["finish_reason"] == {
        "type": "abort", "message": "the scheduler (pid 5) has died", "status_code": 500,
        "err_type": "InternalServerError",
    }  # fmt: skip
    assert (status, healthy) == (503, False)
    here.end()


def test_no_new_requests_while_the_server_drains():
    here = InThisProcess(SETTINGS)

    async def main():
        stream = here.manager.generate(
            GenerateRequest(input_ids=[1, 2], sampling_params={"max_new_tokens": 20, "ignore_eos": True}, stream=True)
        )
        await anext(stream)
        here.manager.drain()
        with pytest.raises(RequestError, match="draining") as refused:
            await here.manager.answer(GenerateRequest(input_ids=[1]))
        assert not here.manager.idle.is_set()
        last = [one async for one in stream][-1]
        assert here.manager.idle.is_set()
        return refused.value.status, len(last["output_ids"])

    assert here.run(main()) == (503, 20)
    here.end()


def test_answers_are_json(here):
    request = GenerateRequest(
        text="What?", sampling_params={"max_new_tokens": 3}, return_logprob=True, top_logprobs_num=2,
        return_text_in_logprobs=True,
    )  # fmt: skip
    answer = here.run(here.manager.answer(request))
    told = json.loads(json.dumps(answer))["meta_info"]["output_token_logprobs"]
    assert "".join(text for _, _, text in told) == answer["text"]
