"""Engine(dp_size): the calls of one engine, in front of several."""

import asyncio
import os
import signal

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.serving.watch import wait_until
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy

IDS = [[5, 6, 7], [8, 9], [5, 6, 11], [12], [13, 14, 15, 16]]
PARAMS = {"max_new_tokens": 6, "ignore_eos": True}
LONG = {"max_new_tokens": 1500, "ignore_eos": True}
RIGHT = [greedy(TINY_QWEN_PATH, ids, 6) for ids in IDS]


@pytest.fixture(scope="module")
def engine():
    with Engine(device="cpu", dp_size=2, max_total_tokens=4096, check=True) as engine:
        yield engine
        assert wait_until(lambda: engine.get_server_info()["running"] == 0, 100)
        info = engine.get_server_info()
        assert info["free_tokens"] + info["evictable_tokens"] == info["max_total_num_tokens"] == 8192
        assert info["lost_replicas"] == {}


def test_the_answers_are_transformers_in_order_and_from_both(engine):
    answers = engine.generate(input_ids=IDS, sampling_params=PARAMS)
    assert [one["output_ids"] for one in answers] == RIGHT
    assert {one["meta_info"]["dp_rank"] for one in answers} == {0, 1}
    one = engine.generate(input_ids=IDS[0], sampling_params=PARAMS, return_logprob=True)
    assert one["output_ids"] == RIGHT[0]
    assert len(one["meta_info"]["output_token_logprobs"]) == 6


def test_a_stream_grows_and_who_leaves_it_ends_what_runs(engine):
    chunks = list(engine.generate(input_ids=IDS, sampling_params=PARAMS, stream=True))
    last = {chunk["index"]: chunk["output_ids"] for chunk in chunks}
    assert [last[i] for i in range(len(IDS))] == RIGHT
    for leave in (lambda stream: stream.close(), lambda stream: None):
        stream = engine.generate(input_ids=IDS, sampling_params=LONG, stream=True)
        next(stream)
        leave(stream)
        del stream
        assert wait_until(lambda: engine.get_server_info()["running"] == 0, 100)


def test_many_callers_at_once_and_one_that_is_cancelled(engine):
    async def go():
        calls = [engine.async_generate(input_ids=ids, sampling_params=PARAMS) for ids in IDS]
        cancelled = asyncio.ensure_future(engine.async_generate(input_ids=[5], sampling_params=LONG))
        assert [one["output_ids"] for one in await asyncio.gather(*calls)] == RIGHT
        cancelled.cancel()
        async for chunk in await engine.async_generate(input_ids=IDS[1], sampling_params=PARAMS, stream=True):
            last = chunk
        assert last["output_ids"] == RIGHT[1]

    asyncio.run(go())
    assert wait_until(lambda: engine.get_server_info()["running"] == 0, 100)


def test_what_cannot_run_is_refused_in_the_engine_s_words(engine):
    for wrong, words in (
        ({"prompt": "a", "input_ids": [1]}, "^give either prompt or input_ids$"),
        ({"input_ids": [10**6]}, "vocabulary"),
        ({"prompt": "a", "sampling_params": {"max_tokens": 1}}, "max_new_tokens"),
        ({"prompt": "a", "lora_path": "x"}, "asks for an adapter, and there are none here"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.generate(**wrong)
    with pytest.raises(ValueError, match="nothing says which request to end"):
        engine.abort_request()


def test_abort_and_flush_reach_both(engine):
    streams = [engine.generate(input_ids=[5], sampling_params=LONG, rid=f"r{i}", stream=True) for i in range(3)]
    for stream in streams:
        next(stream)
    assert not engine.flush_cache()
    assert engine.abort_request("r1") == 1
    assert list(streams[1])[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert engine.abort_request(abort_all=True) == 2
    for stream in streams:
        list(stream)
    assert engine.flush_cache()
    assert engine.get_server_info()["evictable_tokens"] == 0


def test_a_replica_that_dies_takes_its_requests_and_the_last_one_the_engine():
    engine = Engine(device="cpu", dp_size=2, max_total_tokens=4096)
    children = engine._workers.children
    streams = [engine.generate(input_ids=[5], sampling_params=LONG, stream=True) for _ in range(2)]
    first = [next(stream)["meta_info"]["dp_rank"] for stream in streams]
    assert first == [0, 1]
    os.kill(children["scheduler_0"].pid, signal.SIGKILL)
    end = list(streams[0])[-1]["meta_info"]["finish_reason"]
    assert (end["type"], end["status_code"]) == ("abort", 500)
    assert "scheduler_0" in end["message"]
    streams[1].close()
    assert [one["output_ids"] for one in engine.generate(input_ids=IDS, sampling_params=PARAMS)] == RIGHT
    assert list(engine.get_server_info()["lost_replicas"]) == [0]
    children["scheduler_1"].kill()
    assert wait_until(lambda: engine._manager.state == "failed", 100)
    with pytest.raises(RuntimeError, match="no replica is left: scheduler_1"):
        engine.generate(input_ids=[5], sampling_params=PARAMS)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(ValueError, match="this engine is shut down"):
        engine.generate("a")
    assert all(child.poll() is not None for child in children.values())
    assert not engine._workers.folder.exists()


def test_replicas_that_do_not_start_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json"):
        Engine(str(tmp_path), dp_size=2, skip_tokenizer_init=True, device="cpu")


# --- under torchrun


def _answers(dp_size, method):
    """Sent to a pool: what Engine answers on this rank, call after call."""
    from common import parallel_state  # noqa: PLC0415, in the child only

    before = parallel_state._state
    try:
        with Engine(
            device="cpu", dp_size=dp_size, load_balance_method=method, max_total_tokens=512, check=True
        ) as engine:
            calls = [engine.generate(input_ids=IDS, sampling_params=PARAMS) for _ in range(2)]
            one = engine.generate(input_ids=IDS[1], sampling_params=PARAMS)
            refused = []
            for wrong in (lambda: engine.generate("a", stream=True), lambda: asyncio.run(engine.async_generate("a"))):
                try:
                    wrong()
                except ValueError as error:
                    refused.append(str(error))
            info = engine.get_server_info()
            return [*calls[0], *calls[1], one], refused, (info["dp_size"], info["dp_rank"], info["tp_size"])
    finally:
        parallel_state._state = before


@pytest.mark.parametrize("method", ["round_robin", "cache_aware", "random"])
@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_has_all_answers_in_order(ranks, size, method):
    said = ranks(size).run(_answers, 2, method)
    assert all(one == said[0][:2] for one in (part[:2] for part in said)), "the same on all ranks"
    answers, refused, _ = said[0]
    assert [one["output_ids"] for one in answers] == [*RIGHT, *RIGHT, RIGHT[1]]
    replicas = [one["meta_info"]["dp_rank"] for one in answers]
    assert set(replicas) == {0, 1}
    if method == "round_robin":
        assert replicas == [i % 2 for i in range(11)]
    assert all("start Engine(dp_size=...) without torchrun" in words for words in refused)
    assert len(refused) == 2
    assert [facts for *_, facts in said] == [(2, 2 * rank // size, size // 2) for rank in range(size)]
