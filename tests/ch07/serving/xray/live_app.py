"""The smallest server that the page can live on: an engine in this process, /generate, /server_info and the page's routes."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

from ch07_sglang_radix import Engine
from ch07_sglang_radix.serving.xray.feed import Feed
from ch07_sglang_radix.serving.xray.recorder import Recorder
from ch07_sglang_radix.serving.xray.router import xray_router


@contextmanager
def live(**engine_args: Any) -> Iterator[tuple[Engine, str]]:
    """(the engine, its address)."""
    with Engine(device="cpu", **engine_args) as engine:
        app, loop = FastAPI(), asyncio.new_event_loop()

        def publish(line: bytes) -> None:
            loop.call_soon_threadsafe(feed.publish, line)

        def watch(on: bool) -> None:
            # between two steps, in the thread of the scheduler
            engine._loop.submit(recorder.start if on else recorder.stop)

        recorder, feed = Recorder(engine.scheduler, publish), Feed(watch)

        @app.post("/generate")
        async def generate(request: Request) -> dict[str, Any]:
            body = await request.json()
            return await engine.async_generate(body["text"], body["sampling_params"])

        app.include_router(xray_router(feed, engine.wrapper.tokenizer))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", loop="none"))

        async def serve() -> None:
            await engine.async_generate("a", {"max_new_tokens": 1})  # the scheduler's thread is there from now on
            engine.flush_cache()
            await server.serve()

        thread = Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        while not server.started:
            thread.join(0.02)
        try:
            yield engine, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            loop.call_soon_threadsafe(feed.close)
            server.should_exit = True
            thread.join(20)
        assert not thread.is_alive()
