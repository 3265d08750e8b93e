"""The HTTP client: every form an answer has, and every way it fails, in one line."""

import asyncio
import re
import socket
import threading
from contextlib import aclosing

import pytest

from ch07_sglang_radix.serving.http_client import Client, ServerError
from tests.ch07.serving.fake_openai import FakeServer

BODY = {"model": "fake", "prompt": [1, 2], "max_tokens": 4, "stream": True}


def with_server(check, timeout=100.0, **settings):
    """Run `await check(client, server)`."""

    async def run():
        async with FakeServer(**settings) as server, Client(server.url, timeout=timeout) as client:
            return await check(client, server)

    return asyncio.run(run())


async def words(client, path="/v1/completions"):
    return [event["choices"][0]["text"] async for event in client.events(path, BODY) if event["choices"]]


@pytest.mark.parametrize("tear", [1, 7, 1 << 16])
def test_events_come_whole_however_the_stream_is_cut(tear):
    async def check(client, server):
        assert await words(client) == [" one", " two", " three", " four"]

    with_server(check, tear=tear)


def test_a_connection_is_used_again_and_many_at_once_have_one_each():
    async def check(client, server):
        for _ in range(3):
            await words(client)
            assert await client.call("GET", "/v1/models") == (
                200,
                {"object": "list", "data": [{"id": "fake", "object": "model"}]},
            )
        assert server.connections == 1
        await asyncio.gather(*(words(client) for _ in range(5)))
        assert server.connections == 5

    with_server(check, gap_s=0.01)


def test_a_connection_that_the_server_has_closed_meanwhile_is_replaced():
    async def check(client, server):
        for _ in range(3):
            assert len(await words(client)) == 4
            await asyncio.sleep(0.05)  # the end of the connection arrives
        assert server.connections == 3

    with_server(check, keep_alive=False)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "no such thing", "code": None}}, "400: no such thing"),
        ({"object": "error", "message": "flat"}, "400: flat"), ({"error": "Unauthorized"}, "400: Unauthorized"),
        ({"detail": "Not Found"}, "400: Not Found"), (b"plain\nwords", "400: plain words"),
    ],
)  # fmt: skip
def test_a_refusal_is_told_in_the_server_s_words(body, said):
    async def check(client, server):
        with pytest.raises(ServerError) as caught:
            await words(client)
        assert str(caught.value) == said
        assert caught.value.status == 400
        assert (await client.call("POST", "/generate", BODY))[0] == 400
        assert server.connections == 1, "the refusal was read to its end"

    with_server(check, refuse=(400, body))


def test_an_error_in_the_middle_of_a_stream_ends_it():
    async def check(client, server):
        seen = []

        async def read():
            async for event in client.events("/v1/completions", BODY):
                seen.append(event)

        with pytest.raises(ServerError) as caught:
            await read()
        assert str(caught.value) == "out of luck"
        assert len(seen) == 2

    with_server(check, break_after=2)


def test_who_leaves_a_stream_closes_the_connection():
    async def check(client, server):
        async with aclosing(client.events("/v1/completions", BODY | {"max_tokens": 1000})) as events:
            async for _ in events:
                break
        for _ in range(6000):
            if server.gone:
                break
            await asyncio.sleep(0.01)
        assert server.gone == 1
        assert await client.call("GET", "/v1/models")
        assert server.connections == 2

    with_server(check, gap_s=0.005)


def test_a_server_that_does_not_answer_in_time_is_named():
    async def check(client, server):
        with pytest.raises(TimeoutError, match=re.escape("no answer of /v1/completions within 0.2 s")):
            await words(client)

    with_server(check, timeout=0.2, first_s=30)


def test_where_no_server_is_there_is_one_line():
    async def nobody():
        async with FakeServer() as server:
            url = server.url
        async with Client(url) as client:
            await client.call("GET", "/v1/models")

    with pytest.raises(OSError, match="onnect"):
        asyncio.run(nobody())


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9\r\n\r\n", b"\x15\x03\x01\r\n\r\n", b"x" * (1 << 18)])
def test_what_does_not_speak_http_is_said_to(greeting):
    async def other(reader, writer):
        writer.write(greeting)
        await reader.read(1 << 16)
        writer.close()

    async def run():
        server = await asyncio.start_server(other, "127.0.0.1", 0)
        async with Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
            with pytest.raises(ConnectionError, match="/v1/models: what answers there does not speak HTTP"):
                await client.call("GET", "/v1/models")
        server.close()

    asyncio.run(run())


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://x", "http://", ""])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="must be like http://127"):
        Client(url)


def test_a_name_that_nobody_looks_up_is_given_up(monkeypatch):
    """With a name server that does not answer; the loop's own threads are free for others."""
    over, real = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host, *place, flags=0, **more):
        if not flags & socket.AI_NUMERICHOST:
            over.wait(60)
        return real(host, *place, flags=flags, **more)

    async def ask():
        async with Client("http://worker.local:30000", connect_timeout=0.3) as client:
            with pytest.raises(TimeoutError, match=re.escape("no connection within 0.3 s")):
                await client.call("GET", "/health")
        return await asyncio.to_thread(int, "7")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert asyncio.run(ask()) == 7
    over.set()


def test_a_name_leads_to_its_server():
    async def check():
        async with FakeServer() as server, Client(server.url.replace("127.0.0.1", "localhost")) as client:
            return await client.call("GET", "/v1/models")

    assert asyncio.run(check())[0] == 200
