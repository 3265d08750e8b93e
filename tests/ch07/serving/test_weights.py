"""Weights and memory over HTTP: routes under SGLang's names, while requests run.

pytest tests/ch07/serving/test_weights.py
"""

import asyncio
import base64
import json
import socket
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from ch07_sglang_radix.parallelism.replica_engine import ReplicaEngine
from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.weights import BODIES, OF_ONE_WILL, exchange
from ch07_sglang_radix.weight_calls import EXCHANGES
from common.distributed import reach, update_group
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.serving.running import InThisProcess
from tests.ch07.serving.web import served
from tests.oracle import greedy

NORM = "model.norm.weight"
GROUP = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1}
ASK = {"input_ids": list(range(100, 140)), "sampling_params": {"max_new_tokens": 6, "ignore_eos": True}}


class Client:
    def __init__(self, url: str):
        self.url = url

    def __call__(self, path: str, body: dict | None = None) -> tuple[int, object]:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=200) as answer:
                return answer.status, json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "null")

    def generate(self, **more) -> dict:
        status, answer = self("/generate", ASK | more)
        assert status == 200, answer
        return answer


@pytest.fixture(scope="module")
def client():
    running = InThisProcess({"page_size": 4, "max_total_tokens": 4096})
    with served(running.manager, lambda job: asyncio.run_coroutine_threadsafe(job, running.loop)) as url:
        yield Client(url)
    running.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled model with other numbers."""
    new = tmp_path_factory.mktemp("new")
    for file in ("config.json", "generation_config.json"):
        (new / file).write_bytes((TINY_QWEN_PATH / file).read_bytes())
    tensors = load_file(TINY_QWEN_PATH / "model.safetensors")
    save_file(
        {name: x.flip(0).contiguous() if "mlp" in name else x for name, x in tensors.items()}, new / "model.safetensors"
    )
    return new


def test_every_exchange_has_a_route():
    others = {"update_weights_from_tensor", "get_weights_by_name"}
    assert {*BODIES, *others} == set(EXCHANGES) - {"finish_update"}  # what a server says to its replicas
    assert set(OF_ONE_WILL) < set(EXCHANGES)


def test_weights_from_disk_answer_from_then_on_with_their_version(client, folder):
    old = client.generate()
    status, told = client("/update_weights_from_disk", {"model_path": str(folder), "weight_version": "7"})
    assert (status, told["success"], told["num_paused_requests"]) == (200, True, 0)
    new = client.generate()
    assert new["output_ids"] != old["output_ids"]
    assert [one["meta_info"]["weight_version"] for one in (old, new)] == ["default", "7"]
    assert new["meta_info"]["cached_tokens"] == 0, "what the old weights had cached is not found"
    assert client("/get_weight_version") == (200, {"weight_version": "7"})
    assert (
        client("/update_weights_from_disk", {"model_path": str(TINY_QWEN_PATH), "weight_version": "default"})[0] == 200
    )
    assert client.generate()["output_ids"] == old["output_ids"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/update_weights_from_disk", {"model_path": "/nowhere"}, "/nowhere/config.json is missing"),
        ("/update_weights_from_disk", {"model_path": ".", "load_format": "pickle"}, "safetensors alone"),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["a", "b"]}, "2 items; give one"),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["%"]}, "base64"),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["gASVAA=="]}, "no safetensors"),
        ("/init_weights_update_group", GROUP | {"world_size": 9}, "rank_offset=1"),
        ("/init_weights_update_group", GROUP | {"world_size": 5000}, "world_size=5000 must be at most 4096"),
        ("/init_weights_update_group", GROUP | {"rank_offset": 0, "world_size": 2}, "rank_offset=0 must be at least 1"),
        ("/init_weights_update_group", GROUP | {"rank_offset": 2, "world_size": 2}, "must be at most 1, of world_size=2"),
        ("/init_weights_update_group", GROUP | {"master_port": 65536, "world_size": 2}, "at most 65535"),
        ("/init_weights_update_group", GROUP | {"master_address": "\0", "world_size": 2}, "must be the name of a host"),
        ("/init_weights_update_group", GROUP | {"world_size": 2}, "nobody listens at 127.0.0.1:1 (Connection refused)"),
        ("/destroy_weights_update_group", {}, "no group"),
        ("/weights_checker", {"action": "reset_tensors"}, "checksum, snapshot or compare"),
        ("/release_memory_occupation", {"tags": ["all"]}, "weights, kv_cache or cuda_graph"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_400_and_one_line(client, path, body, words):
    status, told = client(path, body)
    assert (status, told["success"]) == (400, False)
    assert words in told["message"]
    assert "\n" not in told["message"]
    assert client.generate()["meta_info"]["weight_version"] == "default"


def test_others_are_answered_while_a_name_is_looked_up_and_nobody_waits_long(client, monkeypatch):
    """With a name server that does not answer. The steps of the engine go on, too."""
    over, asked, told = threading.Event(), threading.Event(), []
    real = reach.socket.getaddrinfo

    def getaddrinfo(host, *place, flags=0, **more):
        if host == "trainer.local" and not flags & socket.AI_NUMERICHOST:
            asked.set()
            over.wait(60)
        return real(host, *place, flags=flags, **more)

    monkeypatch.setattr(reach.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(update_group, "REACH_S", 3)
    body = GROUP | {"master_address": "trainer.local", "world_size": 2}
    asking = threading.Thread(target=lambda: told.append(client("/init_weights_update_group", body)))
    asking.start()
    assert asked.wait(60)
    client.generate()
    asking.join(60)
    over.set()
    assert told[0][0] == 400
    assert told[0][1]["message"] == (
        "nobody listens at trainer.local:1 (the lookup of 'trainer.local' takes longer than 3 s); start the trainer first"
    )


def test_tensors_come_as_a_safetensors_file_in_base64(client):
    _, rows = client("/get_weights_by_name", {"name": NORM, "truncate_size": 3})
    data = save({NORM: 2 * load_file(TINY_QWEN_PATH / "model.safetensors")[NORM]})
    body = {"serialized_named_tensors": [base64.b64encode(data).decode()]}
    assert client("/update_weights_from_tensor", body)[0] == 200
    assert client("/get_weights_by_name", {"name": NORM, "truncate_size": 3})[1] == (2 * torch.tensor(rows)).tolist()
    assert client("/get_weights_by_name", {"name": "x"})[0] == 400
    client("/update_weights_from_disk", {"model_path": str(TINY_QWEN_PATH)})
    assert client("/get_weights_by_name", {"name": NORM, "truncate_size": 3})[1] == rows


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_requests_run_while_weights_change(client, folder, mode):
    """The answer begins with the old weights; what becomes of it is the mode's."""
    old, answer = client.generate(), {}
    asked = threading.Thread(
        target=lambda: answer.update(client.generate(sampling_params={"max_new_tokens": 200, "ignore_eos": True}))
    )
    client("/pause_generation", {"mode": "in_place"})  # so that it is there, for certain, and has a few tokens
    asked.start()
    while client("/step_generation", {"steps": 3})[1]["requests"] < 1:
        pass
    while client("/server_info")[1]["running"] < 1:
        pass
    assert client("/update_weights_from_disk", {"model_path": str(folder)})[1]["num_paused_requests"] == 1
    client("/update_weights_from_disk", {"model_path": str(TINY_QWEN_PATH)})
    assert client("/pause_generation", {"mode": mode})[1] == {"status": "paused", "requests": 1}
    told = client("/update_weights_from_disk", {"model_path": str(folder), "weight_version": mode})[1]
    assert told["num_paused_requests"] == (mode != "abort")
    client("/continue_generation", {})
    asked.join(200)
    reason = {"abort": "abort", "retract": "length", "in_place": "length"}[mode]
    assert answer["meta_info"]["finish_reason"]["type"] == reason
    assert answer["meta_info"]["weight_version"] == ("default" if mode == "abort" else mode)
    assert client.generate()["output_ids"] != old["output_ids"]
    client("/update_weights_from_disk", {"model_path": str(TINY_QWEN_PATH), "weight_version": "default"})
    assert client.generate()["output_ids"] == old["output_ids"]


def test_a_server_that_sleeps_says_so_and_answers_the_same_when_it_wakes(client):
    want = client.generate()["output_ids"]
    assert client("/release_memory_occupation", {})[1]["away"] == ["cuda_graph", "kv_cache", "weights"]
    status, told = client("/generate", ASK)
    assert status == 503
    assert "asleep" in told["error"]["message"]
    assert client("/ready") == (503, {"status": "asleep"})
    assert client("/health") == (200, None)
    assert client("/resume_memory_occupation", {"tags": ["weights"]})[1]["away"] == ["cuda_graph", "kv_cache"]
    assert client("/generate", ASK)[0] == 503
    assert client("/resume_memory_occupation", {})[1]["away"] == []
    assert client("/ready")[0] == 200
    assert client.generate()["output_ids"] == want


def test_replicas_sleep_together_and_change_together(folder):
    ids = [[5, 6, 7], [8, 9]]
    with ReplicaEngine(dp_size=2, device="cpu", max_total_tokens=1024) as engine:

        def answers():
            told = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 4, "ignore_eos": True})
            assert [one["meta_info"]["dp_rank"] for one in told] == [0, 1]
            return [one["output_ids"] for one in told], {one["meta_info"]["weight_version"] for one in told}

        before, after = ([greedy(path, one, 4) for one in ids] for path in (TINY_QWEN_PATH, folder))
        assert before != after
        with pytest.raises(
            ValueError, match="destroy_weights_update_group with dp_size=2: a trainer's group would have 2"
        ):
            engine.destroy_weights_update_group()
        with pytest.raises(ValueError, match=r"nowhere.config.json is missing"):
            engine.update_weights_from_disk("nowhere")
        assert answers() == (before, {"default"})
        assert engine.update_weights_from_disk(str(folder), weight_version="7")["success"]
        assert answers() == (after, {"7"})
        tensors = load_file(TINY_QWEN_PATH / "model.safetensors")
        assert engine.update_weights_from_tensor(tensors, weight_version="8")["success"]
        assert engine.pause_generation("in_place") == 0
        engine.continue_generation()
        engine.release_memory_occupation()
        with pytest.raises(RuntimeError, match="asleep"):
            engine.generate("What?")
        engine.resume_memory_occupation()
        assert answers() == (before, {"8"})


def test_a_release_that_is_refused_leaves_the_server_awake():
    async def control(op, **arguments):
        assert manager.away == ["memory"], "who asks meanwhile is refused already"
        raise RequestError(400, "2 request(s) wait or run")

    manager = SimpleNamespace(away=[], args=SimpleNamespace(engine=SimpleNamespace(dp_size=1)), control=control)
    with pytest.raises(RequestError):
        asyncio.run(exchange(manager, "release_memory_occupation", tags=None))
    assert manager.away == []


def test_if_one_of_two_replicas_is_busy_the_other_does_not_stay_asleep():
    """It would be given the next request, and has no memory for it."""
    asked = []

    async def control(op, **arguments):
        asked.append((op, arguments, list(manager.away)))
        if op == "release_memory_occupation":
            raise RequestError(400, "replica 0: 1 request(s) wait or run")
        return {"away": []}

    manager = SimpleNamespace(away=[], args=SimpleNamespace(engine=SimpleNamespace(dp_size=2)), control=control)
    with pytest.raises(RequestError, match="replica 0"):
        asyncio.run(exchange(manager, "release_memory_occupation", tags=["kv_cache"]))
    assert manager.away == []
    assert asked == [
        (f"{what}_memory_occupation", {"tags": ["kv_cache"]}, ["memory"]) for what in ("release", "resume")
    ], "nobody may ask meanwhile"


def test_whoever_hangs_up_while_memory_is_given_back_leaves_the_server_asleep():
    """Nobody knows whether it has been given back; resume_memory_occupation is right in both cases."""

    async def hangs_up():
        release = asyncio.create_task(exchange(manager, "release_memory_occupation", tags=None))
        await asyncio.sleep(0)
        release.cancel()
        await asyncio.gather(release, return_exceptions=True)

    async def control(op, **arguments):
        await asyncio.Event().wait()

    manager = SimpleNamespace(away=[], args=SimpleNamespace(engine=SimpleNamespace(dp_size=1)), control=control)
    asyncio.run(hangs_up())
    assert manager.away
