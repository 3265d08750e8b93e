"""What a replica answers and how it ends, without the Ray that would start it: the same application as launch_server's."""

import asyncio

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ch07_sglang_radix.serving.deploy.replica_server import Joined, ReplicaServer
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy

PROMPT = "What is a radix cache?"
SMALL = {"device": "cpu", "max_total_tokens": 1024, "page_size": 4}


async def call(server: ReplicaServer, method: str, path: str, body: dict | None = None) -> httpx.Response:
    transport = httpx.ASGITransport(server.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
        return await client.request(method, path, json=body)


def asked(tokens: int, **more) -> dict:
    return {"text": PROMPT, "sampling_params": {"max_new_tokens": tokens, "temperature": 0} | more}


def samples(text: str) -> dict[tuple[str, str], float]:
    """{(name, replica): sum}"""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            key = one.name, one.labels["replica"]
            found[key] = found.get(key, 0) + one.value
    return found


def test_two_replicas_answer_tell_the_numbers_of_both_and_let_what_runs_end():
    async def main() -> None:
        async def everybody():
            return [one.families() for one in servers]

        servers: list[ReplicaServer] = []
        servers += [ReplicaServer(SMALL, name, everybody) for name in "ab"]
        a, b = servers
        assert (await call(a, "GET", "/ready")).status_code == 503
        for one in servers:
            await one.ready()
            await one.check()
            assert [(await call(one, "GET", path)).status_code for path in ("/ready", "/health")] == [200, 200]

        answer = await call(a, "POST", "/generate", asked(12))
        ids = Tokenizer(TINY_QWEN_PATH).encode(PROMPT)
        assert answer.json()["output_ids"] == greedy(TINY_QWEN_PATH, ids, 12)
        for one in servers:
            numbers = samples((await call(one, "GET", "/metrics")).text)
            assert numbers["sglang:num_requests_total", "a"] == 1
            assert numbers["sglang:generation_tokens_total", "a"] == 12
            assert ("sglang:num_requests_total", "b") not in numbers, "it has had no request"
            assert numbers["sglang:max_total_num_tokens", "b"] == 1024

        running = asyncio.create_task(call(a, "POST", "/generate", asked(200, ignore_eos=True)))
        while not a.manager.num_in_flight:
            await asyncio.sleep(0.001)
        ending = asyncio.create_task(a.end())
        await asyncio.sleep(0)
        assert (await call(a, "GET", "/ready")).status_code == 503
        assert (await call(a, "POST", "/generate", asked(1))).status_code == 503
        assert len((await running).json()["output_ids"]) == 200
        await ending
        with pytest.raises(RuntimeError, match="the server has ended"):
            await a.check()
        await b.end()

    asyncio.run(main())


def test_an_engine_that_cannot_start_says_why():
    async def main() -> None:
        server = ReplicaServer(SMALL | {"max_total_tokens": 2}, "a")
        await server.ready()

    with pytest.raises(RuntimeError, match="max_total_tokens"):
        asyncio.run(main())


def test_who_can_hear_nobody_says_so_instead_of_waiting(monkeypatch):
    def deaf(*_) -> None:
        raise ValueError("no ears")

    async def main() -> None:
        monkeypatch.setattr(TokenizerManager, "_welcome", deaf)
        server = ReplicaServer(SMALL, "a")
        with pytest.raises(RuntimeError, match="no ears"):
            await asyncio.wait_for(server.ready(), 60)
        await server.end()

    asyncio.run(main())


def test_samples_of_a_name_stand_together():
    """A name may come once in an exposition: Prometheus refuses two."""

    class Family:
        def __init__(self, name, samples):
            self.name, self.samples = name, samples

    joined = Joined([[Family("x", [1]), Family("y", [2])], [Family("x", [3])]]).collect()
    assert [(one.name, one.samples) for one in joined] == [("x", [1, 3]), ("y", [2])]
