"""Engine(dp_size): the calls of one engine, in front of several."""

import asyncio
import os
import signal

import pytest
import torch

from ch07_sglang_radix import Engine
from ch07_sglang_radix.serving.watch import wait_until
from common.tiny_qwen import ADAPTERS_PATH, TINY_QWEN_PATH
from tests.adapters import greedy_with
from tests.oracle import greedy

IDS = [[5, 6, 7], [8, 9], [5, 6, 11], [12], [13, 14, 15, 16]]
PARAMS = {"max_new_tokens": 6, "ignore_eos": True}
LONG = {"max_new_tokens": 1500, "ignore_eos": True}
RIGHT = [greedy(TINY_QWEN_PATH, ids, 6) for ids in IDS]
PIRATE, TERSE = str(ADAPTERS_PATH / "pirate"), str(ADAPTERS_PATH / "terse")
ADAPTERS = {"lora_paths": {"pirate": PIRATE}, "max_lora_rank": 8, "max_loras_per_batch": 2}
NAMES = ["pirate", None, "terse", "pirate", "terse"]


def right_with(names):
    """What peft in transformers gives to each of IDS with the adapter of that name."""
    return [
        greedy_with(TINY_QWEN_PATH, ADAPTERS_PATH / name, ids, 6) if name else greedy(TINY_QWEN_PATH, ids, 6)
        for ids, name in zip(IDS, names, strict=True)
    ]


@pytest.fixture(scope="module")
def engine():
    with Engine(device="cpu", dp_size=2, max_total_tokens=4096, check=True, **ADAPTERS) as engine:
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
        ({"prompt": "a", "lora_path": "x"}, "^lora_path='x' is not loaded; loaded: pirate$"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.generate(**wrong)
    with pytest.raises(ValueError, match="nothing says which request to end"):
        engine.abort_request()


def test_adapters_are_loaded_and_unloaded_on_both_replicas_or_on_none(engine):
    ask = {"input_ids": IDS, "sampling_params": PARAMS}
    assert engine.load_lora_adapter("terse", TERSE)["loaded_adapters"] == {"pirate": PIRATE, "terse": TERSE}
    for names in (NAMES, NAMES[1:] + NAMES[:1]):  # each of them on each replica
        assert [one["output_ids"] for one in engine.generate(**ask, lora_path=names)] == right_with(names)
    busy = engine.generate(input_ids=[[5]] * 4, sampling_params=LONG, lora_path=[*NAMES[:3], None], stream=True)
    where = {chunk["index"]: chunk["meta_info"]["dp_rank"] for chunk, _ in zip(busy, range(40), strict=False)}
    assert where[0] == where[2] != where[1], "both places of one replica are taken"
    with pytest.raises(
        ValueError, match=rf"^replica {where[0]}: lora_name='more' would be pinned, and all 2 places"
    ) as e:
        engine.load_lora_adapter("more", TERSE, pinned=True)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"^lora_path='more' is not loaded; loaded: pirate, terse$"):
        engine.generate(input_ids=IDS[0], lora_path="more")
    busy.close()
    assert engine.load_lora_adapter("more", TERSE)["success"], "nobody has kept it"
    for name in ("more", "terse"):
        said = engine.unload_lora_adapter(name)
    assert said == {"success": True, "error_message": "", "loaded_adapters": {"pirate": PIRATE}}
    assert [one["lora_in_memory"] for one in engine.get_server_info()["replicas"]] == [1, 1]
    for wrong, words in (
        (lambda: engine.load_lora_adapter("pirate", TERSE), "^lora_name='pirate' is loaded already"),
        (lambda: engine.load_lora_adapter("a", "nowhere"), r"^nowhere.adapter_config.json cannot be read"),
        (lambda: engine.unload_lora_adapter("terse"), "^lora_path='terse' is not loaded; loaded: pirate$"),
        (lambda: engine.load_lora_adapter("", TERSE), "^lora_name: an empty text is none"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


def test_weights_are_held_by_the_replicas_alone(engine):
    for call in (
        lambda: engine.update_weights_from_tensor({"model.norm.weight": torch.zeros(112)}, hold=True),
        lambda: engine.update_weights_from_disk(str(TINY_QWEN_PATH), hold=True),
        lambda: engine.finish_update(write=True),
    ):
        with pytest.raises(
            ValueError, match=r"^dp_size=2: replicas hold and write by themselves; leave hold and finish"
        ):
            call()
    assert engine.generate(input_ids=IDS[0], sampling_params=PARAMS)["output_ids"] == RIGHT[0]


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
            device="cpu", dp_size=dp_size, load_balance_method=method, max_total_tokens=512, check=True, **ADAPTERS
        ) as engine:
            calls = [engine.generate(input_ids=IDS, sampling_params=PARAMS) for _ in range(2)]
            one = engine.generate(input_ids=IDS[1], sampling_params=PARAMS)
            refused = []
            for wrong in (lambda: engine.generate("a", stream=True), lambda: asyncio.run(engine.async_generate("a"))):
                try:
                    wrong()
                except ValueError as error:
                    refused.append(str(error))
            with_adapters = _adapters_come_and_go(engine, refused)
            info = engine.get_server_info()
            return (
                [*calls[0], *calls[1], one],
                with_adapters,
                refused,
                (info["dp_size"], info["dp_rank"], info["tp_size"]),
            )
    finally:
        parallel_state._state = before


def _adapters_come_and_go(engine, refused):
    """The tokens with two adapters, of which one is loaded in between; what is wrong on one replica alone is told by all."""
    engine.load_lora_adapter("terse", TERSE)
    tokens = [one["output_ids"] for one in engine.generate(input_ids=IDS, sampling_params=PARAMS, lora_path=NAMES)]
    engine.unload_lora_adapter("terse")
    with pytest.MonkeyPatch.context() as patch:
        if engine.get_server_info()["dp_rank"] == 1:
            patch.setattr(engine._adapters, "load", _no_room)
        for wrong in (
            lambda: engine.load_lora_adapter("terse", TERSE), lambda: engine.generate(input_ids=[5], lora_path="terse")
        ):  # fmt: skip
            try:
                wrong()
            except ValueError as error:
                refused.append(str(error))
    return tokens, len(engine.wrapper.lora.loaded)


def _no_room(ref):
    raise ValueError("no room")


@pytest.mark.parametrize(
    ("size", "method"), [(2, "round_robin"), (2, "cache_aware"), (2, "random"), (4, "round_robin")]
)  # who gets a request does not depend on the ranks of a replica
def test_every_rank_has_all_answers_in_order(ranks, size, method):
    said = ranks(size).run(_answers, 2, method)
    assert all(one == said[0][:3] for one in (part[:3] for part in said)), "the same on all ranks"
    answers, with_adapters, refused, _ = said[0]
    assert [one["output_ids"] for one in answers] == [*RIGHT, *RIGHT, RIGHT[1]]
    replicas = [one["meta_info"]["dp_rank"] for one in answers]
    assert set(replicas) == {0, 1}
    if method == "round_robin":
        assert replicas == [i % 2 for i in range(11)]
    assert all("start Engine(dp_size=...) without torchrun" in words for words in refused[:2])
    assert refused[2:] == ["replica 1: no room", "lora_path='terse' is not loaded; loaded: pirate"]
    assert with_adapters == (right_with(NAMES), 1)
    assert [facts for *_, facts in said] == [(2, 2 * rank // size, size // 2) for rank in range(size)]
