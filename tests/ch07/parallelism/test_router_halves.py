"""The router in front of prefill and decode servers: who gets what, and whose fault it is when one of a pair fails."""

import asyncio
import json
from contextlib import aclosing, asynccontextmanager

import pytest

from ch07_sglang_radix.parallelism.router import Router
from ch07_sglang_radix.parallelism.router_args import RouterArgs, parse_args
from ch07_sglang_radix.serving.http_args import bind
from ch07_sglang_radix.serving.http_client import Client
from ch07_sglang_radix.serving.http_life import Http
from tests.ch07.parallelism.fleet import QUICK, FakeWorker, until

PATIENT = QUICK | {"policy": "round_robin", "health_check_timeout_secs": 5, "connect_timeout_secs": 5}


class FakeHalf(FakeWorker):
    """kind: what it says it is. rooms: what prefill has computed, and whether it is still there, for which decode waits."""

    def __init__(self, name: str, kind: str, rooms: dict[int, bool]):
        super().__init__(name)
        self.kind, self.rooms = kind, rooms

    async def _answer(self, path, headers, body, writer):
        if path == "/server_info":
            told = {"disaggregation_mode": self.kind, "disaggregation_bootstrap_port": 9000 + ord(self.name)}
            return self._say(writer, 200, json.dumps(told).encode())
        wanted = json.loads(body) if body else {}
        room = wanted.get("bootstrap_room") if isinstance(wanted, dict) else None
        if room is not None and self.kind == "prefill":
            assert wanted["stream"] is False
            body = json.dumps({name: value for name, value in wanted.items() if name != "stream"}).encode()
            await asyncio.sleep(self.gap_s)
            if self.mode in ("ok", "drop"):
                self.rooms[room] = self.mode == "ok"
        elif room is not None and self.mode in ("ok", "cut"):
            await until(lambda: room in self.rooms, 60)
            if not self.rooms[room]:
                self.seen.append((path, headers, body))
                return self._say(writer, 500, b'{"error": {"message": "rank 0 of the prefill side is gone"}}')
        return await super()._answer(path, headers, body, writer)


class Halves:
    def __init__(self, prefill, decode, router, client):
        self.prefill, self.decode, self.router, self.client = prefill, decode, router, client

    async def ask(self, text="a", **body):
        return await self.client.call("POST", "/generate", {"text": text} | body)

    async def who(self, text="a"):
        status, answer = await self.ask(text)
        assert status == 200, answer
        return answer["by"]

    def sent(self):
        return [len(worker.seen) for worker in [*self.prefill, *self.decode]]

    def at_rest(self):
        """Nothing is counted that has ended, on either side."""
        assert self.router.forwarding.in_flight == 0
        for group in self.router.groups:
            assert all(load.requests == load.tokens == 0 for load in group.balancer.loads.values())
            assert not any(worker.breaker._testing for worker in group.all.values())


@asynccontextmanager
async def the_halves(prefill=2, decode=2, **args):
    rooms: dict[int, bool] = {}
    sides = {"prefill": [FakeHalf("pq"[i], "prefill", rooms) for i in range(prefill)]}
    sides["decode"] = [FakeHalf("de"[i], "decode", rooms) for i in range(decode)]
    for worker in [*sides["prefill"], *sides["decode"]]:
        await worker.start()
    urls = {name: tuple(worker.url for worker in some) for name, some in sides.items()}
    router = Router(RouterArgs(pd_disaggregation=True, **urls, **PATIENT | args))
    socket = bind("127.0.0.1", 0)
    http = Http(router.app)
    serving = asyncio.create_task(http.serve([socket]))
    await router.start()
    try:
        async with Client(f"http://127.0.0.1:{socket.getsockname()[1]}") as client:
            yield Halves(*sides.values(), router, client)
    finally:
        await router.close()
        http.should_exit = True
        await asyncio.wait([serving], timeout=60)
        for worker in [*sides["prefill"], *sides["decode"]]:
            await worker.die()


def with_halves(check, **args):
    async def run():
        async with the_halves(**args) as halves:
            await check(halves)
            await until(lambda: halves.router.forwarding.in_flight == 0)
            halves.at_rest()

    asyncio.run(run())


def room_of(worker, i=-1):
    body = json.loads(worker.seen[i][2])
    return {name: body.get(f"bootstrap_{name}") for name in ("host", "port", "room")}


def test_a_request_goes_to_one_of_each_side_in_one_room_and_decode_answers():
    async def check(halves):
        assert [await halves.who() for _ in range(4)] == ["d", "e", "d", "e"]
        assert halves.sent() == [2, 2, 2, 2]
        rooms = []
        for i, (prefill, decode) in enumerate(zip(halves.prefill, halves.decode, strict=True)):
            for turn in range(2):
                room = room_of(prefill, turn)
                assert room == room_of(decode, turn)
                assert (room["host"], room["port"]) == ("127.0.0.1", 9000 + ord("pq"[i]))
                rooms.append(room["room"])
        assert len(set(rooms)) == 4
        assert all(0 <= room < 2**63 and room % 4096 == 0 for room in rooms), "n answers have rooms behind it"

    with_halves(check)


def test_each_side_has_a_policy_of_its_own():
    async def check(halves):
        halves.prefill[0].gap_s = 0.2
        one = asyncio.create_task(halves.ask("You are a poet. Rain"))
        load = halves.router.prefill.balancer.loads[halves.prefill[0].url]
        await until(lambda: load.requests == 1)
        await halves.ask("Completely something else")
        await one
        halves.prefill[0].gap_s = 0
        await halves.ask("You are a poet. Snow")
        await halves.ask("Completely something new")
        assert halves.sent() == [2, 2, 2, 2]
        assert [json.loads(seen[2])["text"][:3] for seen in halves.prefill[0].seen] == ["You", "You"], "its cache"
        told = (await halves.client.call("GET", "/list_workers"))[1]
        assert (told["prefill_policy"], told["decode_policy"]) == ("cache_aware", "round_robin")
        assert [one["worker_type"] for one in told["workers"]] == ["prefill"] * 2 + ["decode"] * 2

    with_halves(check, prefill_policy="cache_aware")


def test_a_stream_is_decode_s_and_a_client_that_goes_ends_both():
    async def check(halves):
        events = [event["by"] async for event in halves.client.events("/generate", {"text": "a", "stream": True})]
        assert events == ["d"] * 5
        halves.decode[1].gap_s = 0.05
        async with aclosing(halves.client.events("/generate", {"text": "a", "stream": True})) as events:
            await anext(events)
        await until(lambda: halves.decode[1].gone == 1)

    with_halves(check)


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("mode", ["drop", 500, 503, 429])
def test_who_fails_is_tried_elsewhere(side, mode):
    async def check(halves):
        getattr(halves, side)[0].mode = mode
        for _ in range(3):
            assert (await halves.ask())[0] == 200
        url = getattr(halves, side)[0].url
        text = (await halves.client.call("GET", "/metrics"))[1]
        assert f'smg_worker_errors_total{{worker="{url}"}}' in text

    with_halves(check, retry_max_retries=3)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_side_of_which_nobody_is_left_is_a_503_that_names_it_and_comes_back(side):
    async def check(halves):
        dead = getattr(halves, side)
        for worker in dead:
            await worker.die()
        await until(lambda: not {"prefill": halves.router.prefill, "decode": halves.router.workers}[side].available)
        status, answer = await asyncio.wait_for(halves.ask(), 5)
        assert status == 503
        assert answer["error"]["message"].startswith(f"none of 2 {side} worker(s) can be asked: http://127.0.0.1:")
        status, answer = await halves.client.call("GET", "/health")
        assert (status, answer["available"]) == (503, 2)
        for worker in dead:
            await worker.start()
        await until(lambda: halves.router.prefill.available and halves.router.workers.available)
        assert (await halves.ask())[0] == 200
        assert (await halves.client.call("GET", "/health"))[0] == 200

    with_halves(check, health_failure_threshold=1, health_success_threshold=1)


def test_one_dead_of_each_side_costs_no_request():
    async def check(halves):
        await halves.prefill[1].die()
        await halves.decode[0].die()
        answers = await asyncio.gather(*(halves.who() for _ in range(8)))
        assert answers == ["e"] * 8

    with_halves(check)


def test_an_open_breaker_leaves_a_prefill_server_out():
    async def check(halves):
        halves.prefill[0].mode = 503
        for _ in range(6):
            assert (await halves.ask())[0] == 200
        assert halves.router.prefill.all[halves.prefill[0].url].breaker.state == "open"
        assert halves.sent()[0] == 2

    with_halves(check, cb_failure_threshold=2)


def test_decode_s_500_while_prefill_says_nothing_counts_for_both():
    async def check(halves):
        halves.prefill[0].gap_s, halves.decode[0].mode = 60, 500
        assert await halves.who() == "e", "another pair"
        for group, worker in ((halves.router.prefill, halves.prefill[0]), (halves.router.workers, halves.decode[0])):
            assert group.all[worker.url].breaker._in_a_row == 1

    with_halves(check)


def test_a_stream_that_breaks_off_says_so_and_is_no_fault_of_prefill():
    async def check(halves):
        halves.decode[0].mode = "cut"
        status, text = 0, b""
        async for piece in halves.client.exchange("POST", "/generate", {"text": "a", "stream": True}):
            status, text = (piece.status, text) if not isinstance(piece, bytes) else (status, text + piece)
        assert status == 200
        assert b"broke off in the middle" in text
        assert halves.router.prefill.all[halves.prefill[0].url].breaker._in_a_row == 0

    with_halves(check)


def test_a_400_is_the_answer_and_not_tried_again():
    async def check(halves):
        halves.prefill[0].mode = 400
        assert (await asyncio.wait_for(halves.ask(), 3))[0] == 400
        status, answer = await halves.client.call("POST", "/generate", [1])
        assert (status, answer["error"]["message"]) == (400, "the body: an object of JSON is expected")
        assert halves.sent()[:2] == [1, 0]

    with_halves(check)


def test_a_server_on_the_wrong_side_gets_nothing_and_workers_come_and_go_by_type():
    async def check(halves):
        url = halves.prefill[1].url
        add = f"/add_worker?url={url}"
        for kind, said in (("", "is none of 'prefill', 'decode' here"), ("&worker_type=decode", "is a worker already")):
            status, answer = await halves.client.call("POST", add + kind)
            assert status == 400
            assert said in answer["error"]["message"]
        assert (await halves.client.call("POST", f"/remove_worker?url={url}"))[0] == 200
        status, answer = await halves.client.call("POST", add + "&worker_type=decode")
        assert status == 400
        assert answer["error"]["message"] == f"{url}: is no decode server: disaggregation_mode=prefill; it is not added"
        assert (await halves.client.call("POST", add + "&worker_type=prefill"))[0] == 200
        assert (await halves.client.call("POST", "/flush_cache"))[0] == 200
        assert halves.sent() == [1, 1, 1, 1], "all of both sides"
        assert (await halves.client.call("GET", "/v1/models"))[1]["by"] in "de"

    with_halves(check)


def test_flags_are_given_as_often_as_there_are_servers():
    flags = (
        "--pd-disaggregation --prefill http://a --prefill http://b --decode http://c http://d --decode-policy random"
    )
    args = parse_args(flags.split())
    assert (args.prefill, args.decode) == (("http://a", "http://b"), ("http://c", "http://d"))
    assert (args.policy, args.prefill_policy, args.decode_policy) == ("cache_aware", None, "random")
