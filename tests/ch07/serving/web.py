"""A web app on a free port of this machine, while a test looks at it through the official client."""

import json
from contextlib import contextmanager
from threading import Thread
from time import monotonic, sleep

import openai
import uvicorn
from fastapi import FastAPI

from ch07_sglang_radix.serving.http_server import make_app


@contextmanager
def served(app: FastAPI):
    """Yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def client_of(manager):
    """The official client of this manager's server."""
    with (
        served(make_app(manager)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client


def wait_until(true, seconds: float = 10.0) -> None:
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
