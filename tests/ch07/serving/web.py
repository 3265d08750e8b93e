"""A web app on a free port of this machine, while a test looks at it through the official client."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import monotonic, sleep

import openai
import uvicorn

from ch07_sglang_radix.serving.http_server import make_app
from tests.ch07.serving.running import InThisProcess


@contextmanager
def served(manager, run):
    """Yields the address. run: executes a coroutine in another thread, and returns a future."""
    server = uvicorn.Server(
        uvicorn.Config(make_app(manager), host="127.0.0.1", port=0, log_level="error", lifespan="off")
    )
    serving = run(server.serve())
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        serving.result(10)


@contextmanager
def client_of(manager):
    """The official client of a manager that needs no event loop of its own."""
    with (
        ThreadPoolExecutor(1) as pool,
        served(manager, lambda job: pool.submit(asyncio.run, job)) as url,
        openai_client(url) as client,
    ):
        yield client


@contextmanager
def client_of_an_engine(**args):
    """The same of a real manager, with scheduler and detokenizer as threads of this process. args: the engine's, the server's."""
    http = {name: args.pop(name) for name in ("reasoning_parser",) if name in args}
    server = InThisProcess(args, **http)
    with served(server.manager, lambda job: asyncio.run_coroutine_threadsafe(job, server.loop)) as url:
        with openai_client(url) as client:
            yield client
        info = server.run(server.manager.server_info())
        assert info["free_tokens"] + info["evictable_tokens"] == info["max_total_num_tokens"]
    server.end()


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=200)


def wait_until(true, seconds: float = 100.0) -> None:
    end = monotonic() + seconds
    while not true():
        assert monotonic() < end, f"not true within {seconds} s"
        sleep(0.01)


def post(client: openai.OpenAI, path: str, body: dict | bytes, **headers) -> tuple[int, dict]:
    """(status, body) of what the client's types would not let through."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    url, headers = f"{client.base_url}{path}", {"content-type": "application/json", **headers}
    response = client._client.post(url, content=content, headers=headers)
    return response.status_code, response.json()
