"""One front for several servers: requests go to the worker that a policy chooses, and answers stream back.

    python -m ch07_sglang_radix.launch_server --port 30001 &
    python -m ch07_sglang_radix.launch_server --port 30002 &
    python -m ch07_sglang_radix.parallelism.router --worker-urls http://127.0.0.1:30001 http://127.0.0.1:30002
    curl http://127.0.0.1:30000/generate -d '{"text": "What is a radix cache?"}'

    /generate, /v1/completions, /v1/chat/completions    one worker, by the policy (forwarding.py)
                                                        with --pd-disaggregation: a prefill and a decode worker (two_halves.py)
    /v1/models, /model_info, /tokenize, ...             any
    /server_info, /flush_cache, /abort_request, ...     all
    /list_workers, /add_worker?url=, /remove_worker?url=       of halves, /add_worker?url=&worker_type=prefill or decode
    /health, /ready                                     200 while anybody can be asked; else 503 and why
    /metrics                                            the router's own

It has no model and no tokenizer: a worker may be on any host, and may be SGLang itself, whose routes have these names. SIGTERM: no
new requests, those that run have --shutdown-grace-period-secs; again: ends now.
SGLang 0.5.23: sgl-model-gateway (in Rust); its /add_worker and /list_workers are /workers by now.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from ch07_sglang_radix.parallelism.forwarding import TO_BOTH, Forwarding
from ch07_sglang_radix.parallelism.router_args import RouterArgs, parse_args
from ch07_sglang_radix.parallelism.router_metrics import RouterMetrics
from ch07_sglang_radix.parallelism.workers import Workers
from ch07_sglang_radix.serving.exposition import metrics_router
from ch07_sglang_radix.serving.http_args import bind
from ch07_sglang_radix.serving.http_life import LAST_ANSWERS_S, Http
from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.logs import log, set_up_logging
from ch07_sglang_radix.serving.responses import CLIENT_HAS_GONE, ClientHasGone, as_json
from ch07_sglang_radix.serving.security import guarded
from common.values import shown

TO_ANY = {
    "GET": ("/v1/models", "/v1/models/{model:path}", "/model_info", "/get_model_info"),
    "POST": ("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"),
}
TO_ALL = {
    "GET": ("/server_info", "/get_server_info"),
    "POST": ("/flush_cache", "/abort_request", "/pause_generation", "/continue_generation"),
}


class Router:
    """app: what it answers, once `workers.start()` has looked who is there."""

    def __init__(self, args: RouterArgs):
        self.args = args
        self.prefill = Workers(args, "prefill") if args.pd_disaggregation else None
        self.workers = Workers(args, "decode" if self.prefill else None)
        self.groups = [self.prefill, self.workers] if self.prefill else [self.workers]
        if self.prefill:
            self.prefill.beside, self.workers.beside = self.workers, self.prefill
        self.metrics = RouterMetrics(self.groups)
        self.forwarding = Forwarding(args, self.workers, self.prefill, self.metrics)
        self.app = FastAPI(title="ch07_sglang_radix.parallelism.router", docs_url=None, redoc_url=None)
        self._forwarded_routes()
        self._own_routes()
        self._errors()
        guarded(self.app, args)

    async def start(self) -> None:
        for group in self.groups:
            await group.start()

    async def close(self) -> None:
        for group in self.groups:
            await group.close()

    def _forwarded_routes(self) -> None:
        forwarding, app = self.forwarding, self.app

        def to_one(path: str) -> Callable[[Request], Awaitable[Response]]:
            async def forward(request: Request) -> Response:
                return (await forwarding.to_one(request, path))[0]

            return forward

        async def to_all(request: Request) -> Response:
            answers = await forwarding.to_all(request)
            worst = max(status for status, _ in answers.values())
            return as_json({url: answer for url, (_, answer) in answers.items()}, worst)

        for path in TO_BOTH:
            app.add_api_route(path, to_one(path), methods=["POST"])
        for method, paths in TO_ANY.items():
            for path in paths:
                app.add_api_route(path, to_one(path), methods=[method])
        for method, paths in TO_ALL.items():
            for path in paths:
                app.add_api_route(path, to_all, methods=[method])
        app.add_api_route("/open_session", forwarding.open_session, methods=["POST"])
        app.add_api_route("/close_session", forwarding.close_session, methods=["POST"])

    def _own_routes(self) -> None:
        app, groups = self.app, self.groups

        @app.get("/health")
        @app.get("/health_generate")
        @app.get("/ready")
        async def ready() -> Response:
            if self.forwarding.draining:
                return as_json({"status": "draining"}, 503)
            lacking = next((group for group in groups if not group.available), None)
            there, all_there = sum(group.available for group in groups), sum(len(group.all) for group in groups)
            told = {"status": "no worker" if lacking else "ready", "workers": all_there, "available": there}
            return as_json(told | {"why": lacking.nobody()} if lacking else told, 503 if lacking else 200)

        @app.get("/list_workers")
        async def list_workers() -> Response:
            told = [
                worker.shown() | {"requests": group.balancer.loads[url].requests}
                for group in groups
                for url, worker in group.all.items()
            ]
            policies = {f"{group.kind}_policy" if group.kind else "policy": group.policy for group in groups}
            return as_json(policies | {"model": next((g.model for g in groups if g.model), None), "workers": told})

        @app.post("/add_worker")
        async def add_worker(url: str = "", worker_type: str = "") -> Response:
            kinds = {group.kind or "": group for group in groups}
            if worker_type not in kinds:
                raise RequestError(
                    400, f"worker_type={shown(worker_type)} is none of {', '.join(map(repr, kinds))} here"
                )
            worker = await kinds[worker_type].add(url)
            return as_json({"added": worker.url, "model": worker.model})

        @app.post("/remove_worker")
        async def remove_worker(url: str = "") -> Response:
            await next((group for group in groups if url.rstrip("/") in group.all), self.workers).remove(url)
            return as_json({"removed": url})

        app.include_router(metrics_router(self.metrics))

    def _errors(self) -> None:
        @self.app.exception_handler(RequestError)
        async def refused(request: Request, error: RequestError) -> Response:
            told = {"message": error.message, "type": error.kind, "param": None, "code": error.status}
            return as_json({"error": told}, error.status)

        @self.app.exception_handler(ClientHasGone)
        async def gone(request: Request, error: ClientHasGone) -> Response:
            return Response(status_code=CLIENT_HAS_GONE)

        @self.app.exception_handler(HTTPException)
        async def unknown(request: Request, error: HTTPException) -> Response:
            return as_json({"error": {"message": error.detail}}, error.status_code)


class _Life:
    """From a bound socket to the end. `run` returns the exit code."""

    def __init__(self, args: RouterArgs, bound: socket.socket):
        self.args, self.socket = args, bound
        set_up_logging("router", args.log_level, args.log_format)

    async def run(self) -> int:
        self.router, loop, stop, stopping = Router(self.args), asyncio.get_running_loop(), asyncio.Event(), 0

        def signalled(number: int, frame: object) -> None:
            nonlocal stopping
            stopping += 1
            if stopping > 1:
                os._exit(1)
            loop.call_soon_threadsafe(stop.set)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signalled)
        http = Http(self.router.app)
        serving = asyncio.create_task(http.serve([self.socket]))
        await self.router.start()
        host, port = self.socket.getsockname()[:2]
        told = ", ".join(
            f"{sum(worker.well for worker in group.all.values())} of {len(group.all)} "
            f"{group.kind + ' ' if group.kind else ''}worker(s), {group.policy}"
            for group in self.router.groups
        )
        log.info("ready: %s; http://%s:%d", told, host, port)
        await stop.wait()
        await self._drain()
        http.should_exit = True
        await asyncio.wait([serving], timeout=2 * LAST_ANSWERS_S)
        await self.router.close()
        return 0

    async def _drain(self) -> None:
        forwarding, patience = self.router.forwarding, self.args.shutdown_grace_period_secs
        forwarding.draining = True
        log.info("no new requests; %d that run have %g s", forwarding.in_flight, patience)
        deadline = asyncio.get_running_loop().time() + patience
        while forwarding.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        if forwarding.in_flight:
            log.warning("%d request(s) were not done in time", forwarding.in_flight)


def main() -> None:
    try:
        args = parse_args(sys.argv[1:])
        code = asyncio.run(_Life(args, bind(args.host, args.port)).run())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
