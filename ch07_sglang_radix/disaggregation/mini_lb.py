"""One front for a prefill and a decode server: clients speak to it as to one server that does both.

    python -m ch07_sglang_radix.launch_server --disaggregation-mode prefill --port 30001 &
    python -m ch07_sglang_radix.launch_server --disaggregation-mode decode --port 30002 &
    python -m ch07_sglang_radix.disaggregation.mini_lb --prefill http://127.0.0.1:30001 --decode http://127.0.0.1:30002 --port 8000
    curl http://127.0.0.1:8000/generate -d '{"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 20}}'

Servers of each side in turn, dead or alive, and one attempt: two_halves.py is all that a balancer must know, and this is the rest.
The router with --pd-disaggregation has policies for each side, health checks, circuit breakers and retries.

SGLang: mini_lb of sglang_router, whose answers wait for both halves.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from itertools import count

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from ch07_sglang_radix.disaggregation.lb_args import LbArgs, parse_args
from ch07_sglang_radix.parallelism.forwarding import TO_BOTH
from ch07_sglang_radix.parallelism.relay import ask, json_of, passed_on
from ch07_sglang_radix.parallelism.router import TO_ALL, TO_ANY
from ch07_sglang_radix.parallelism.two_halves import Asked, Meeting, Pair, bodies
from ch07_sglang_radix.parallelism.workers import UNAVAILABLE
from ch07_sglang_radix.serving.http_args import bind
from ch07_sglang_radix.serving.http_client import Client
from ch07_sglang_radix.serving.http_life import LAST_ANSWERS_S, Http
from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.logs import log, set_up_logging
from ch07_sglang_radix.serving.responses import CLIENT_HAS_GONE, ClientHasGone, as_json, unless_gone
from ch07_sglang_radix.serving.security import guarded


class Half:
    """One server."""

    def __init__(self, url: str, mode: str, args: LbArgs):
        self.url, self.mode = url, mode
        self.client = Client(url, args.api_key, args.request_timeout_secs, args.connect_timeout_secs)
        self.meeting = Meeting(url, self.client)


class MiniLb:
    """app: what it answers."""

    def __init__(self, args: LbArgs):
        self.args, self._turn = args, count()
        self.prefill = [Half(url, "prefill", args) for url in args.prefill]
        self.decode = [Half(url, "decode", args) for url in args.decode]
        self.app = FastAPI(title="ch07_sglang_radix.disaggregation.mini_lb", docs_url=None, redoc_url=None)
        self._routes()
        guarded(self.app, args)

    async def to_both(self, request: Request, path: str) -> Response:
        body, headers = json_of(await request.body()), passed_on(request.headers)
        if not isinstance(body, dict):
            raise RequestError(400, "the body: an object of JSON is expected")
        turn = next(self._turn)
        prefill, decode = self.prefill[turn % len(self.prefill)], self.decode[turn % len(self.decode)]
        room = await prefill.meeting.room(headers)
        if isinstance(room, str):
            raise RequestError(503, room, UNAVAILABLE)
        to_prefill, to_decode = bodies(body, room)
        computing = Asked(prefill, path, to_prefill, headers)
        last, fault = await Pair(computing, Asked(decode, path, to_decode, headers)).answer()
        if computing in fault:
            prefill.meeting.forget()
        if isinstance(last, str):
            raise RequestError(503, f"{decode.url}: {last}", UNAVAILABLE)
        return last

    def _routes(self) -> None:
        app = self.app

        def to_both(path: str) -> Callable[[Request], Awaitable[Response]]:
            async def forward(request: Request) -> Response:
                return await unless_gone(request.receive, self.to_both(request, path))

            return forward

        async def to_all(request: Request) -> Response:
            body, headers = await request.body(), passed_on(request.headers)
            halves = [*self.prefill, *self.decode]
            asking = [ask(half, request.method, request.url.path, body, headers) for half in halves]
            answers = await asyncio.gather(*asking)
            told = {half.url: answer for half, (_, answer) in zip(halves, answers, strict=True)}
            return as_json(told, max(status for status, _ in answers))

        async def to_decode(request: Request) -> Response:
            body, headers = await request.body(), passed_on(request.headers)
            status, answer = await ask(self.decode[0], request.method, request.url.path, body, headers)
            return as_json(answer, status)

        async def health(request: Request) -> Response:
            """200 while there is one of each half that computes."""
            headers = passed_on(request.headers)
            halves = [*self.prefill, *self.decode]
            answers = await asyncio.gather(*(ask(half, "GET", request.url.path, b"", headers) for half in halves))
            well = {half.mode for half, (status, _) in zip(halves, answers, strict=True) if status == 200}
            told = {half.url: status for half, (status, _) in zip(halves, answers, strict=True)}
            return as_json(told, 200 if len(well) == 2 else 503)

        for path in TO_BOTH:
            app.add_api_route(path, to_both(path), methods=["POST"])
        for method, paths in TO_ANY.items():
            for path in paths:
                app.add_api_route(path, to_decode, methods=[method])
        for method, paths in TO_ALL.items():
            for path in paths:
                app.add_api_route(path, to_all, methods=[method])
        for path in ("/health", "/health_generate", "/ready"):
            app.add_api_route(path, health, methods=["GET"])

        @app.exception_handler(RequestError)
        async def refused(request: Request, error: RequestError) -> Response:
            told = {"message": error.message, "type": error.kind, "param": None, "code": error.status}
            return as_json({"error": told}, error.status)

        @app.exception_handler(ClientHasGone)
        async def gone(request: Request, error: ClientHasGone) -> Response:
            return Response(status_code=CLIENT_HAS_GONE)

        @app.exception_handler(HTTPException)
        async def unknown(request: Request, error: HTTPException) -> Response:
            return as_json({"error": {"message": error.detail}}, error.status_code)


async def _serve(args: LbArgs, bound: socket.socket) -> int:
    """Until a signal; exit code."""
    set_up_logging("mini_lb", args.log_level, args.log_format)
    loop, stop, stopping = asyncio.get_running_loop(), asyncio.Event(), count(1)

    def signalled(number: int, frame: object) -> None:
        if next(stopping) > 1:
            os._exit(1)
        loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signalled)
    http = Http(MiniLb(args).app)
    serving = asyncio.create_task(http.serve([bound]))
    host, port = bound.getsockname()[:2]
    log.info("ready: %d prefill and %d decode server(s); http://%s:%d", len(args.prefill), len(args.decode), host, port)
    await stop.wait()
    http.should_exit = True
    await asyncio.wait([serving], timeout=2 * LAST_ANSWERS_S)
    return 0


def main() -> None:
    try:
        args = parse_args(sys.argv[1:])
        code = asyncio.run(_serve(args, bind(args.host, args.port)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
