"""The router: who gets what, and what becomes of it when a worker fails, at every moment at which it can."""

import asyncio
import json
from contextlib import aclosing

import pytest

from ch07_sglang_radix.parallelism.forwarding import prompt_of, session_of
from ch07_sglang_radix.parallelism.router import Router
from ch07_sglang_radix.parallelism.router_args import RouterArgs, parse_args
from ch07_sglang_radix.serving.http_client import Client, ServerError
from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.security import ROUTES
from tests.ch07.parallelism.fleet import QUICK, FakeWorker, until, with_fleet
from tests.ch07.serving.test_security import routes


def test_requests_go_round_and_come_back_as_they_were():
    async def check(fleet):
        assert [await fleet.who() for _ in range(4)] == ["a", "b", "a", "b"]
        path, headers, body = fleet.workers[0].seen[0]
        assert (path, json.loads(body)) == ("/generate", {"text": "a"})
        assert headers["content-type"] == "application/json"
        assert headers["host"] == fleet.workers[0].url.removeprefix("http://")
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            assert (await fleet.ask(path=path))[0] == 200
        assert (await fleet.client.call("GET", "/v1/models/fake"))[0] == 200
        assert {path for worker in fleet.workers for path, *_ in worker.seen} >= {"/v1/models/fake", "/tokenize"}

    with_fleet(check)


def test_a_stream_comes_event_by_event():
    async def check(fleet):
        fleet.workers[0].gap_s = 0.05
        moments, numbers = [], []
        async for event in fleet.client.events("/generate", {"text": "a", "stream": True}):
            moments.append(asyncio.get_running_loop().time())
            numbers.append(event["n"])
        assert numbers == list(range(5))
        assert moments[-1] - moments[0] > 0.1, "not all at its end"

    with_fleet(check, 1)


def test_cache_aware_sends_a_prefix_where_it_was_sent_before():
    async def check(fleet):
        fleet.workers[0].gap_s = 0.2
        one = asyncio.create_task(fleet.who("You are a poet. Rain"))
        await until(lambda: fleet.sent()[0] == 1)
        fleet.workers[0].gap_s = 0
        assert await fleet.who("Completely something else") == "b", "a has something to do"
        assert await one == "a"
        assert [await fleet.who(text) for text in ("Completely something new", "You are a poet. Snow")] == ["b", "a"]
        chat = {"messages": [{"role": "user", "content": "In a chat, the text lies deeper"}]}
        first = (await fleet.client.call("POST", "/v1/chat/completions", chat))[1]["by"]
        assert (await fleet.client.call("POST", "/v1/chat/completions", chat))[1]["by"] == first

    with_fleet(check, policy="cache_aware")


@pytest.mark.parametrize("mode", ["drop", 500, 502, 503, 429])
@pytest.mark.parametrize("stream", [False, True])
def test_what_has_not_streamed_is_tried_elsewhere(mode, stream):
    async def check(fleet):
        fleet.workers[0].mode = mode
        body = {"text": "a"} | ({"stream": True} if stream else {})
        for _ in range(2):
            if stream:
                assert [event["by"] async for event in fleet.client.events("/generate", body)] == ["b"] * 5
            else:
                assert await fleet.who() == "b"
        assert min(fleet.sent()) >= 1
        text = (await fleet.client.call("GET", "/metrics"))[1]
        assert 'smg_worker_retries_total{endpoint="/generate"}' in text

    with_fleet(check)


OK = b"HTTP/1.1 200 OK\r\n"
GARBAGE = [
    b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"\xff\x00\r\n\r\n", b"HTTP/1.1 \r\n\r\n", b"HTTP/1.1 -5 X\r\n\r\n",
    b"HTTP/1.1 99999 X\r\n\r\n",
    b"x" * 200_000, OK, OK + b"content-length: lots\r\n\r\n{}", OK + b"content-length: -5\r\n\r\n{}",
    OK + b"content-length: 99\r\n\r\n{}", OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    OK + b"transfer-encoding: chunked\r\n\r\n-5\r\n{}\r\n0\r\n\r\n", OK + b"transfer-encoding: chunked\r\n\r\n" + b"1" * 200_000,
    OK + b"transfer-encoding: chunked\r\ncontent-type: text/event-stream\r\n\r\nevents\r\n",
]  # fmt: skip
GARBAGE_IDS = [f"{i} {said[:24]!r}" for i, said in enumerate(GARBAGE)]


@pytest.mark.parametrize("said", GARBAGE, ids=GARBAGE_IDS)
def test_what_is_no_answer_is_tried_elsewhere(said):
    async def check(fleet):
        fleet.workers[0].mode = said
        assert [await fleet.who() for _ in range(2)] == ["b", "b"]
        assert len(fleet.workers[0].seen) >= 1
        fleet.workers[1].mode = said
        status, answer = await fleet.ask()
        assert status == 503
        assert "and nobody has answered" in answer["error"]["message"]
        assert "\n" not in answer["error"]["message"]

    with_fleet(check, retry_max_retries=1)


@pytest.mark.parametrize(
    "said", [*GARBAGE, OK + b"content-length: 99999\r\n\r\n" + b"[" * 99999], ids=[*GARBAGE_IDS, "deep"]
)
def test_who_answers_health_checks_with_garbage_is_looked_at_again(said):
    async def check(fleet):
        fleet.workers[0].well = said
        worker = fleet.router.workers.all[fleet.workers[0].url]
        await asyncio.sleep(0.3)
        fleet.workers[0].well = True
        await until(lambda: worker.well)
        assert {await fleet.who() for _ in range(2)} == {"a", "b"}
        status, answer = await fleet.client.call("POST", f"/remove_worker?url={worker.url}")
        assert status == 200
        fleet.workers[0].well = said
        status, answer = await fleet.client.call("POST", f"/add_worker?url={worker.url}")
        assert (status, answer) == (200, answer) if b"99999" in said and said.startswith(OK) else status == 400, answer

    with_fleet(check)


def test_workers_come_and_go_before_the_first_look_is_over():
    async def check(fleet):
        slow, quick = FakeWorker("s"), FakeWorker("q")
        for worker in (slow, quick):
            await worker.start()
        slow.slow_s = 0.2
        router = Router(RouterArgs(worker_urls=(slow.url,), **QUICK))
        starting = asyncio.create_task(router.workers.start())
        await asyncio.sleep(0.02)
        await router.workers.add(quick.url)
        await router.workers.remove(slow.url)
        await starting
        assert list(router.workers.all) == list(router.workers._looking) == [quick.url]
        slow.slow_s = 0.05
        both = await asyncio.gather(router.workers.add(slow.url), router.workers.add(slow.url), return_exceptions=True)
        (refused,) = [one for one in both if isinstance(one, RequestError)]
        assert refused.message == f"{slow.url}: it is a worker by now; it is not added"
        assert len(router.workers._looking) == 2
        await router.workers.close()
        for worker in (slow, quick):
            await worker.die()

    with_fleet(check)


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_what_is_wrong_with_the_request_is_not_tried_elsewhere(status):
    async def check(fleet):
        fleet.workers[0].mode = fleet.workers[1].mode = status
        assert await fleet.ask() == (status, {"said": status, "by": "a"})
        assert fleet.sent() == [1, 0]
        assert all(worker.breaker.state == "closed" for worker in fleet.router.workers.all.values())

    with_fleet(check)


def test_a_stream_that_breaks_off_is_not_tried_again_and_says_so():
    async def check(fleet):
        fleet.workers[0].mode = "cut"
        events = fleet.client.events("/generate", {"text": "a", "stream": True})
        assert [(await anext(events))["n"] for _ in range(2)] == [0, 1]
        with pytest.raises(ServerError, match="broke off in the middle of its answer"):
            await anext(events)
        assert fleet.sent() == [1, 0]
        whole = await fleet.client.call("POST", "/generate", {"text": "a", "stream": True})
        assert whole[1].endswith("data: [DONE]\n\n"), "from b"

    with_fleet(check)


def test_when_all_fail_the_last_answer_is_told_or_why_there_is_none():
    async def check(fleet):
        for worker in fleet.workers:
            worker.mode = 503
        assert (await fleet.ask())[0] == 503
        assert sum(fleet.sent()) == 4, "once, and retry_max_retries times more"
        for worker in fleet.workers:
            worker.mode = "drop"
        status, answer = await fleet.ask()
        assert status == 503
        assert "asked 4 time(s), and nobody has answered" in answer["error"]["message"]

    with_fleet(check, retry_max_retries=3)


@pytest.mark.parametrize("policy", ["round_robin", "cache_aware", "prefix_hash", "power_of_two"])
def test_nobody_is_there_is_a_503_in_a_line_and_no_hang(policy):
    async def check(fleet):
        for call in (
            fleet.ask(),
            fleet.client.call("GET", "/v1/models"),
            fleet.client.call("POST", "/flush_cache", {}),
        ):
            status, answer = await asyncio.wait_for(call, 2)
            assert status == 503
            assert answer["error"]["message"].startswith("none of 2 worker(s) can be asked: http://127.0.0.1:")
            assert answer["error"]["message"].count("does not answer") == 2
        status, health = await fleet.client.call("GET", "/health")
        assert (status, health["available"], health["workers"]) == (503, 0, 2)

    with_fleet(check, dead=(0, 1), policy=policy)


def test_no_worker_at_all_is_a_503_that_says_how_to_add_one():
    async def check(fleet):
        status, answer = await fleet.ask()
        assert (status, answer["error"]["message"]) == (503, "the router has no worker; POST /add_worker?url=...")

    with_fleet(check, 0)


def test_who_is_dead_at_the_start_is_named_and_serves_once_it_comes():
    async def check(fleet):
        told = (await fleet.client.call("GET", "/list_workers"))[1]["workers"]
        assert [one["healthy"] for one in told] == [True, False]
        assert "does not answer" in told[1]["why"]
        assert [await fleet.who() for _ in range(3)] == ["a", "a", "a"]
        await fleet.workers[1].start()
        second = fleet.router.workers.all[fleet.workers[1].url]
        await until(lambda: second.well)
        assert {await fleet.who() for _ in range(4)} == {"a", "b"}

    with_fleet(check, dead=(1,))


def test_who_dies_gets_nothing_more_and_its_prefixes_are_forgotten():
    async def check(fleet):
        assert await fleet.who("a long prefix that lies at a") == "a"
        first = fleet.router.workers.all[fleet.workers[0].url]
        await fleet.workers[0].die()
        assert await fleet.who("a long prefix that lies at a") == "b", "at once, by a retry"
        await until(lambda: not first.well)
        before = fleet.sent()
        await fleet.workers[0].start()
        await until(lambda: first.well)
        assert await fleet.who("a long prefix that lies at a") == "b", "whoever came back has an empty cache"
        assert fleet.sent()[0] == before[0]

    with_fleet(check, policy="cache_aware")


def test_a_health_check_that_fails_now_and_then_is_no_death():
    async def check(fleet):
        first = fleet.router.workers.all[fleet.workers[0].url]
        first.note("a hiccup")
        first.note("another")
        first.note("")
        first.note("a hiccup")
        first.note("another")
        assert first.well, "three in a row are wanted"
        first.note("a third")
        assert not first.well
        first.note("")
        assert not first.well, "two in a row are wanted"
        first.note("")
        assert first.well

    with_fleet(check, health_check_interval_secs=100)


def test_an_open_breaker_spares_everybody_the_worker_that_hangs():
    async def check(fleet):
        fleet.workers[0].mode = "hang"
        for _ in range(4):
            assert await fleet.who() == "b"
        first = fleet.router.workers.all[fleet.workers[0].url]
        assert first.breaker.state == "open"
        assert first.well, "/health answers all the while"
        asked = fleet.sent()[0]
        assert [await fleet.who() for _ in range(3)] == ["b"] * 3
        assert fleet.sent()[0] == asked == 2
        metrics = (await fleet.client.call("GET", "/metrics"))[1]
        assert f'smg_worker_cb_state{{worker="{first.url}"}} 1.0' in metrics

    with_fleet(check, request_timeout_secs=1, cb_failure_threshold=2, health_check_interval_secs=100)


def test_a_half_open_breaker_closes_by_health_checks_even_if_the_policy_asks_others():
    async def check(fleet):
        first = fleet.router.workers.all[fleet.workers[0].url]
        fleet.workers[0].mode = 500
        while first.breaker.state == "closed":
            await fleet.who()
        fleet.workers[0].mode = "ok"
        asked = fleet.sent()[0]
        await until(lambda: first.breaker.state == "closed")
        assert fleet.sent()[0] == asked

    with_fleet(check, cb_failure_threshold=1, cb_timeout_duration_secs=0.1, cb_success_threshold=2)


def test_a_client_that_goes_closes_its_stream_at_the_worker():
    async def check(fleet):
        fleet.workers[0].gap_s = 0.05
        async with aclosing(fleet.client.events("/generate", {"text": "a", "stream": True})) as events:
            await anext(events)
        await until(lambda: fleet.workers[0].gone == 1)
        fleet.workers[0].mode = "hang"
        waiting = asyncio.create_task(fleet.ask())
        await until(lambda: len(fleet.workers[0].seen) == 2)
        waiting.cancel()
        await until(lambda: fleet.router.forwarding.in_flight == 0)
        assert fleet.router.workers.all[fleet.workers[0].url].breaker.state == "closed", (
            "its client's haste is not its failure"
        )

    with_fleet(check, 1, cb_failure_threshold=1, health_check_interval_secs=100)


def test_workers_come_and_go_while_it_runs():
    async def check(fleet):
        b = fleet.workers[1]
        assert await fleet.client.call("POST", f"/remove_worker?url={b.url}/") == (200, {"removed": f"{b.url}/"})
        assert [await fleet.who() for _ in range(2)] == ["a", "a"]
        assert (await fleet.client.call("POST", f"/remove_worker?url={b.url}"))[0] == 400
        assert await fleet.client.call("POST", f"/add_worker?url={b.url}") == (200, {"added": b.url, "model": "fake"})
        assert {await fleet.who() for _ in range(2)} == {"a", "b"}
        status, answer = await fleet.client.call("POST", f"/add_worker?url={b.url}")
        assert (status, answer["error"]["message"]) == (400, f"{b.url} is a worker already")
        for wrong in (
            "",
            "b.example",
            "ftp://x",
            "http://",
            "http://x:0",
            "http://x:y",
            "http://127.0.0.1:1/?a=b",
            "file:///etc",
        ):
            status, answer = await fleet.client.call("POST", f"/add_worker?url={wrong.replace('?', '%3F')}")
            assert (status, "must be like http://127.0.0.1:30001" in answer["error"]["message"]) == (400, True), wrong
        status, answer = await fleet.client.call("POST", "/add_worker?url=http://127.0.0.1:9")
        assert status == 400
        assert "does not answer" in answer["error"]["message"]
        assert "it is not added" in answer["error"]["message"]
        assert len((await fleet.client.call("GET", "/list_workers"))[1]["workers"]) == 2

    with_fleet(check)


def test_what_runs_at_a_worker_that_is_removed_goes_on():
    async def check(fleet):
        fleet.workers[0].gap_s = 0.05
        events = fleet.client.events("/generate", {"text": "a", "stream": True})
        assert (await anext(events))["n"] == 0
        await fleet.client.call("POST", f"/remove_worker?url={fleet.workers[0].url}")
        assert [event["n"] async for event in events] == [1, 2, 3, 4]

    with_fleet(check)


def test_a_worker_with_another_model_is_refused_by_name():
    async def check(fleet):
        told = (await fleet.client.call("GET", "/list_workers"))[1]
        assert told["model"] == "fake"
        assert [one["healthy"] for one in told["workers"]] == [True, False, True]
        assert "serves 'other', the other workers 'fake'" in told["workers"][1]["why"]
        assert {await fleet.who() for _ in range(4)} == {"a", "c"}
        url = fleet.workers[1].url
        await fleet.client.call("POST", f"/remove_worker?url={url}")
        status, answer = await fleet.client.call("POST", f"/add_worker?url={url}")
        assert status == 400
        assert "serves 'other'" in answer["error"]["message"]
        await asyncio.sleep(0.2)
        assert len((await fleet.client.call("GET", "/list_workers"))[1]["workers"]) == 2

    with_fleet(check, 3, models={1: "other"})


def test_a_session_stays_with_its_worker():
    async def check(fleet):
        names = [(await fleet.client.call("POST", "/open_session", {}))[1] for _ in range(2)]
        assert names == ["session of a", "session of b"]
        for _ in range(3):
            assert await fleet.who(session_params={"id": names[1]}) == "b"
        await fleet.workers[1].die()
        second = fleet.router.workers.all[fleet.workers[1].url]
        await until(lambda: not second.well)
        status, answer = await fleet.ask(session_params={"id": names[1]})
        assert status == 503
        assert "'session of b' lies on" in answer["error"]["message"]
        assert await fleet.who(session_params={"id": names[0]}) == "a"
        assert (await fleet.client.call("POST", "/close_session", {"session_id": names[0]}))[0] == 200
        assert list(fleet.router.forwarding.sessions) == [names[1]]

    with_fleet(check)


def test_what_an_operator_says_reaches_all_and_the_worst_status_is_told():
    async def check(fleet):
        assert (await fleet.client.call("GET", "/server_info"))[1] == {
            worker.url: {"by": worker.name} for worker in fleet.workers
        }
        fleet.workers[1].mode = 400
        status, answers = await fleet.client.call("POST", "/flush_cache", {})
        assert status == 400
        assert answers == {fleet.workers[0].url: {"by": "a"}, fleet.workers[1].url: {"said": 400, "by": "b"}}

    with_fleet(check)


def test_keys_pass_through_and_the_router_s_own_is_asked_for():
    async def passes(fleet):
        async with Client(f"http://127.0.0.1:{fleet.client._place[1]}", "theirs") as client:
            await client.call("POST", "/generate", {"text": "a"})
        assert fleet.workers[0].seen[-1][1]["authorization"] == "Bearer theirs"

    with_fleet(passes, 1)

    async def asks(fleet):
        url = f"http://127.0.0.1:{fleet.client._place[1]}"
        async with Client(url) as nobody, Client(url, "boss") as admin:
            assert (await nobody.call("POST", "/generate", {"text": "a"}))[0] == 401
            assert (await nobody.call("GET", "/list_workers"))[0] == 401
            assert (await nobody.call("GET", "/health"))[0] == 200
            assert await fleet.who() == "a"
            assert (await fleet.client.call("POST", "/add_worker?url=http://127.0.0.1:9"))[0] == 401, (
                "the admin's alone"
            )
            assert (await admin.call("POST", "/add_worker?url=http://127.0.0.1:9"))[0] == 400
        assert fleet.workers[0].seen[-1][1]["authorization"] == "Bearer ours"

    with_fleet(asks, 1, api_key="ours", admin_api_key="boss")


def test_pages_of_other_sites_and_bodies_without_end_are_refused():
    async def check(fleet):
        async def status(headers, body=b"{}"):
            pieces = fleet.client.exchange("POST", "/generate", body, headers)
            head = await anext(pieces)
            await pieces.aclose()
            return head.status

        assert await status({"origin": "http://evil.example"}) == 403
        assert await status({"origin": f"http://127.0.0.1:{fleet.client._place[1]}"}) == 200
        assert "origin" not in fleet.workers[0].seen[-1][1], "the worker would compare it with its own name"
        assert await status({}, b"x" * 2000) == 413

    with_fleet(check, 1, max_body_bytes=1024)


def test_when_it_drains_what_runs_goes_on_and_nothing_new_comes_in():
    async def check(fleet):
        fleet.workers[0].gap_s = 0.05
        events = fleet.client.events("/generate", {"text": "a", "stream": True})
        await anext(events)
        fleet.router.forwarding.draining = True
        status, answer = await fleet.ask()
        assert (status, answer["error"]["message"]) == (503, "the router is draining")
        assert (await fleet.client.call("GET", "/health"))[0] == 503
        assert fleet.router.forwarding.in_flight == 1
        assert len([event async for event in events]) == 4

    with_fleet(check, 1)


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"text": "a"}, "a"),
        ({"text": ["a", "b"]}, "a\nb"),
        ({"prompt": [1, 2]}, "1 2"),
        ({"input_ids": [[1, 2], [3]]}, "1 2\n3"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "x"}]},
            "user: a\nx: None",
        ),
        ({"messages": "no list"}, ""),
        ({}, ""),
        ([], ""),
        (None, ""),
        ({"text": 5}, "5"),
    ],
)
def test_the_text_that_a_policy_looks_at(body, prompt):
    assert prompt_of(body) == prompt
    assert session_of(body) is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--worker-urls", "localhost:30000"], "worker url 'localhost:30000' must be like"),
        (["--worker-urls", "http://a", "http://a/"], "names 2, and only 1 different"),
        (["--worker-urls", "http://me:secret@a"], "worker url .* must be like"),
        (["--policy", "shortest_queue"], "policy='shortest_queue' is unknown"),
        (["--cb-failure-threshold", "0"], "cb_failure_threshold=0 must be at least 1"),
        (["--cache-threshold", "1.5"], r"cache_threshold=1\.5 must be in \[0, 1\]"),
        (
            ["--health-check-interval", "1"],
            r"unknown flag .--health-check-interval.; did you mean --health-check-interval-secs",
        ),
        (["--mini-lb"], "flag --mini-lb is not here: python -m ch07_sglang_radix.disaggregation.mini_lb is one"),
        (["--pd-disaggregation", "--decode", "http://a"], "no prefill server is named; give --prefill URL"),
        (["--pd-disaggregation", "--prefill", "http://a"], "no decode server is named; give --decode URL"),
        (["--prefill", "http://a"], "prefill without pd_disaggregation; give --pd-disaggregation, too"),
        (["--pd-disaggregation", "--worker-urls", "http://a"], "name each server as --prefill URL or --decode URL"),
        (["--pd-disaggregation", "--prefill", "http://a", "--decode", "http://a/"], "names 2, and only 1 different"),
        (["--decode-policy", "longest"], "decode_policy without pd_disaggregation"),
        (["--pd-disaggregation", "--prefill", "http://a", "8998"], "worker url '8998' must be like"),
        (["http://a"], "'http://a' belongs to no flag"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words):
    with pytest.raises(ValueError, match=words):
        parse_args(flags)


def test_every_route_has_a_guard_of_its_own():
    paths = [path for path, _ in routes(Router(RouterArgs()).app)]
    assert {"/generate", "/add_worker", "/metrics"} <= set(paths)
    assert [path for path in paths if path.replace(":path", "") not in ROUTES] == []


def test_the_defaults_are_sglang_s():
    args = RouterArgs()
    assert (args.policy, args.cache_threshold, args.balance_abs_threshold, args.balance_rel_threshold, args.max_tree_size) == (
        "cache_aware", 0.3, 64, 1.5, 2**26,
    )  # fmt: skip
