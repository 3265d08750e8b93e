"""The load test at a tenth, and that it would notice what it looks for."""

import asyncio
import os

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.serving.http_client import Client
from ch07_sglang_radix.serving.load_test import (
    BAD_BODIES,
    FLAGS,
    SMALL_CACHE,
    Call,
    Crowd,
    Footprint,
    calls_of,
    conservation,
    grown,
    load,
)
from ch07_sglang_radix.serving.served import served


@pytest.fixture(scope="module")
def calls():
    with Engine(device="cpu", dtype="float32") as engine:
        return calls_of(engine)


@pytest.fixture(scope="module")
def server():
    with served(*FLAGS, environment=SMALL_CACHE) as url_and_pid:
        yield url_and_pid


def test_a_thousand_clients_of_whom_some_leave_and_some_send_rubbish(calls, server):
    outcome = asyncio.run(load(*server, calls, requests=1000, concurrency=50))
    assert not outcome.wrong
    assert sum(outcome.counts.values()) == 1000
    assert outcome.counts["left"] > 150
    assert outcome.counts["refused"] > 25
    assert outcome.counts["right"] > 650
    assert len(outcome.memory) >= 3, "main, scheduler, detokenizer"


def test_a_wrong_answer_and_a_body_that_is_taken_are_noticed(calls, server):
    one = calls[0]
    wrong = Call(one.text, one.params, [("another text", *one.expected[0][1:])])

    async def ask():
        async with Client(server[0]) as client:
            crowd = Crowd(client, [wrong], 0)
            for way in (crowd._whole, crowd._streamed, crowd._completion):
                with pytest.raises(ValueError, match="instead of"):
                    await way(wrong)
            with pytest.raises(ValueError, match="is answered with 200"):
                await crowd._refused({"text": "a", "sampling_params": {"max_new_tokens": 1}})
            for body in BAD_BODIES:
                await crowd._refused(body)

    asyncio.run(ask())


def test_what_is_lost_held_or_grown_is_named():
    whole = {
        "free_tokens": 60,
        "evictable_tokens": 4,
        "protected_tokens": 0,
        "held_tokens": 0,
        "max_total_num_tokens": 64,
    }
    assert conservation(whole) == []
    assert conservation(whole | {"free_tokens": 59}) == ["59 free + 4 evictable + 0 protected + 0 held is not 64"]
    assert "nothing runs, and yet" in conservation(whole | {"free_tokens": 50, "held_tokens": 10})[0]
    assert not list(grown([100, 120, 150, *[150 + i % 9 for i in range(20)]]))
    assert list(grown(range(100, 300, 2))) == ["198 MB after 50% of the requests, 298 MB at the end"]


def test_the_footprint_sees_a_descriptor_that_stays_open(tmp_path):
    feet = Footprint(os.getpid())
    before = feet.descriptors()[os.getpid()]
    with (tmp_path / "file").open("w"):
        assert feet.descriptors()[os.getpid()] == before + 1
    assert feet.megabytes()[os.getpid()] > 10
