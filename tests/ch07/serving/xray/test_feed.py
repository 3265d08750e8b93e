"""The feed: who comes late, who is slow, who leaves; and the routes of a server in front of it."""

import asyncio
import itertools
import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import aclosing

import pytest
import uvicorn
from fastapi import FastAPI

from ch07_sglang_radix.serving.xray import feed as feeds
from ch07_sglang_radix.serving.xray.events import snapshot, step
from ch07_sglang_radix.serving.xray.feed import Feed
from ch07_sglang_radix.serving.xray.page import FILES
from ch07_sglang_radix.serving.xray.router import xray_router
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.phrasings import SYSTEM_PROMPT


class Source:
    """What a recorder behind a feed does: a snapshot whenever it is started."""

    def __init__(self):
        self.seq, self.watched = 0, []
        self.feed = Feed(self.watch)

    def watch(self, on):
        self.watched.append(on)
        if on:
            self.feed.publish(snapshot(self.seq, {"seq": self.seq}))

    def step(self):
        self.seq += 1
        self.feed.publish(step(self.seq, {"seq": self.seq}))


async def read(told, n):
    return [json.loads(await anext(told)) for _ in range(n)]


def test_a_page_begins_with_a_snapshot_and_misses_nothing_behind_it():
    async def run():
        source = Source()
        source.step()  # nobody looks
        async with aclosing(source.feed.subscribe()) as told:
            got = await read(told, 1)
            for _ in range(3):
                source.step()
            got += await read(told, 3)
        return got, source.watched

    got, watched = asyncio.run(run())
    assert [(event["type"], event["seq"]) for event in got] == [("snapshot", 1), ("step", 2), ("step", 3), ("step", 4)]
    assert watched == [True, False]


def test_it_is_switched_off_when_the_last_page_leaves():
    async def run():
        source = Source()
        first, second = source.feed.subscribe(), source.feed.subscribe()
        await read(first, 1)
        await read(second, 1)
        await first.aclose()
        one_left = list(source.watched)
        await second.aclose()
        return one_left, source.watched

    one_left, watched = asyncio.run(run())
    assert one_left == [True, True]
    assert watched == [True, True, False]


def test_a_slow_page_loses_events_and_goes_on_from_a_snapshot(monkeypatch):
    monkeypatch.setattr(feeds, "MOST_WAITING", 5)

    async def run():
        source = Source()
        slow, quick = source.feed.subscribe(), source.feed.subscribe()
        await read(slow, 1)
        await read(quick, 1)
        seen = []
        for _ in range(20):
            source.step()
            seen += await read(quick, 1)
        waiting = max(page._waiting.qsize() for page in source.feed._pages)
        caught_up = await read(slow, 1)
        source.step()
        while caught_up[-1]["seq"] < source.seq:
            caught_up += await read(slow, 1)
        await slow.aclose()
        await quick.aclose()
        return seen, waiting, caught_up

    seen, waiting, caught_up = asyncio.run(run())
    assert [event["seq"] for event in seen if event["type"] == "step"] == list(range(1, 21)), (
        "the quick one has lost nothing"
    )
    assert waiting <= 5
    assert caught_up[0]["type"] == "snapshot"
    assert caught_up[-1]["seq"] == 21
    for before, after in itertools.pairwise(caught_up):
        assert after["type"] == "snapshot" or after["seq"] == before["seq"] + 1, "no change without what it changes"


def test_a_quiet_stream_says_that_it_is_still_there(monkeypatch):
    monkeypatch.setattr(feeds, "HEARTBEAT_S", 0.01)

    async def run():
        source = Source()
        async with aclosing(source.feed.subscribe()) as told:
            await anext(told)
            quiet = await anext(told)
            source.step()
            return quiet, json.loads(await anext(told))["seq"]

    assert asyncio.run(run()) == (b"", 1)


def test_close_ends_every_stream():
    async def run():
        source = Source()
        told = source.feed.subscribe()
        await read(told, 1)
        source.feed.close()
        rest = [event async for event in told]
        return rest, [event async for event in source.feed.subscribe()], source.watched

    assert asyncio.run(run()) == ([], [], [True, False, False])


# --- over HTTP


@pytest.fixture
def served():
    """(source, its address)."""
    source, app = Source(), FastAPI()
    app.include_router(xray_router(source.feed, Tokenizer(TINY_QWEN_PATH)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    source.loop = server.servers[0].get_loop()
    yield source, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    source.loop.call_soon_threadsafe(source.feed.close)
    server.should_exit = True
    thread.join(100)
    assert not thread.is_alive()


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_the_page_and_its_files_and_nothing_else(served):
    _, address = served
    status, headers, body = get(f"{address}/xray")
    assert (status, body) == (200, FILES["index.html"].body)
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    for name, file in FILES.items():
        status, headers, body = get(f"{address}/xray/{name}")
        assert (status, headers["Content-Type"], body) == (200, file.content_type, file.body)
        assert headers["X-Content-Type-Options"] == "nosniff"
    for name in ("feed.py", "recording.jsonl", "..%2Ffeed.py", "..", "%2e%2e/messages.py", "x" * 3000):
        assert get(f"{address}/xray/{name}")[0] == 404


def test_the_stream_is_sse_and_the_engine_is_watched_while_it_is_open(served):
    source, address = served
    with urllib.request.urlopen(f"{address}/xray/events", timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        source.loop.call_soon_threadsafe(source.step)
        lines = [response.readline() for _ in range(4)]
    assert lines[0] == b"data: " + snapshot(0, {"seq": 0}) + b"\n"
    assert lines[2] == b"data: " + step(1, {"seq": 1}) + b"\n"
    assert lines[1] == lines[3] == b"\n"
    source.loop.call_soon_threadsafe(source.step)
    deadline = time.monotonic() + 60
    while source.watched != [True, False] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert source.watched == [True, False], "a page that has gone is noticed"


def test_too_many_pages_are_refused(served, monkeypatch):
    monkeypatch.setattr(feeds, "MOST_PAGES", 0)
    _, address = served
    status, _, body = get(f"{address}/xray/events")
    assert status == 503
    assert "X-ray pages are open" in json.loads(body)["error"]["message"]


def test_the_page_can_write_what_the_chat_template_writes(served):
    _, address = served
    source = json.loads(get(f"{address}/xray/source")[2])
    words = {"\ue000": SYSTEM_PROMPT, "\ue001": "What is a page?", "\ue002": "A page is."}
    first, following = ("".join(words.get(c, c) for c in source["chat"][part]) for part in ("first", "next"))
    turns = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "What is a page?"}]
    tokenizer = Tokenizer(TINY_QWEN_PATH)
    assert first == tokenizer.render_chat(turns)
    turns += [{"role": "assistant", "content": "A page is."}, {"role": "user", "content": "What is a page?"}]
    assert first + following == tokenizer.render_chat(turns)
    assert source["system"] == SYSTEM_PROMPT


def test_none_of_it_is_in_the_schema():
    app = FastAPI()
    app.include_router(xray_router(Feed(lambda on: None)))
    assert not any("xray" in path for path in app.openapi()["paths"]), "who tries every route would hang in the stream"
