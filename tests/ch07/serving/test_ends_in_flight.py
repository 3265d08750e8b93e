"""Ends that come while a caller is busy with what was before them, and the end of the server itself."""

import asyncio

import pytest
from starlette.testclient import TestClient

from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.http_server import make_app
from ch07_sglang_radix.serving.io_struct import GenerateRequest, RequestError
from ch07_sglang_radix.serving.messages import VERSION, BatchStr, Hello
from ch07_sglang_radix.serving.scheduler_process import NOTHING
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager

FACTS = {"vocab_size": 100, "context_length": 64, "max_total_num_tokens": 64, "page_size": 1, "shortened_by": None}


class Pipe:
    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)


def batch(tickets, new, reasons):
    none = [NOTHING] * len(tickets)
    return BatchStr(1, tickets, ["x"] * len(tickets), [[new]] * len(tickets), reasons, [0] * len(tickets), none, none)


@pytest.mark.parametrize("first_to_end", [(0, 1), (1, 0), (1,)])
def test_each_of_two_streams_ends_once_whenever_the_ends_come(first_to_end):
    """Both grow; while the caller has taken one of them only, the ends of `first_to_end` come; then the others."""

    async def run():
        manager = TokenizerManager(HttpArgs(engine=ServerArgs(device="cpu")), None, Pipe(), Pipe())
        manager.take(Hello(VERSION, "scheduler", 1, FACTS))
        answers = manager.generate(
            GenerateRequest(input_ids=[[1], [2]], stream=True, sampling_params={"max_new_tokens": 2})
        )
        first = asyncio.ensure_future(anext(answers))
        await asyncio.sleep(0)
        tickets = [one.ticket for one in manager._scheduler.sent[-1].requests]
        manager.take(batch(tickets, 5, [None, None]))
        seen = [await first]
        end = {"type": "length", "length": 2}
        manager.take(batch([tickets[i] for i in first_to_end], 6, [end] * len(first_to_end)))
        if len(first_to_end) < 2:
            seen.append(await anext(answers))
            manager.take(batch([tickets[0]], 6, [end]))
        async for one in answers:
            seen.append(one)
        return seen

    seen = asyncio.run(asyncio.wait_for(run(), 20))
    ends = [one["index"] for one in seen if one["meta_info"]["finish_reason"]]
    assert sorted(ends) == [0, 1], "each ends once"
    last = {one["index"]: one for one in seen}
    assert {index: one["output_ids"] for index, one in last.items()} == {0: [5, 6], 1: [5, 6]}


def test_who_asks_when_the_scheduler_has_been_told_to_leave_gets_a_503_at_once():
    """Before, and after: neither waits for a reply that nobody will send."""

    async def run():
        manager = TokenizerManager(HttpArgs(engine=ServerArgs(device="cpu")), None, Pipe(), Pipe())
        manager.take(Hello(VERSION, "scheduler", 1, FACTS))
        before = asyncio.ensure_future(manager.server_info())
        await asyncio.sleep(0)
        manager.leave()
        for asked in (before, manager.server_info(), manager.flush_cache()):
            with pytest.raises(RequestError, match="the server has ended") as refused:
                await asyncio.wait_for(asked, 5)
            assert refused.value.status == 503
        return make_app(manager)

    client = TestClient(asyncio.run(run()), base_url="http://127.0.0.1")
    for path in ("/server_info", "/get_server_info", "/ready", "/health"):
        assert client.get(path).status_code == 503, path
