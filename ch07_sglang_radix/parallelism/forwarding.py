"""One request through the router: to which worker, what if that fails, and the answer on its way back.

    choose -> send -> head of the answer  -> 200 and a stream: its first event -> out, and the rest as it comes
                                          -> else: all of the body             -> out
          a connection that fails, 429, 5xx, before anything went out: another worker, up to --retry-max-retries times
          a stream that breaks off: the client has a part already, and gets an event that says so

A retry is safe because a request changes nothing at a worker but its cache. It is possible only as long as the client has nothing:
another worker's answer would not go on where this one broke off. A client that goes away closes the worker's connection, and the
worker aborts the request.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response

from ch07_sglang_radix.parallelism.load_balancing import Sent
from ch07_sglang_radix.parallelism.relay import answered, ask, json_of, passed_on, why
from ch07_sglang_radix.parallelism.router_args import RouterArgs
from ch07_sglang_radix.parallelism.router_metrics import RouterMetrics
from ch07_sglang_radix.parallelism.two_halves import Pair, bodies
from ch07_sglang_radix.parallelism.workers import UNAVAILABLE, Worker, Workers
from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.logs import log
from ch07_sglang_radix.serving.responses import EventStream, unless_gone
from ch07_sglang_radix.serving.sessions import MAX_SESSIONS

TO_BOTH = (
    "/generate",
    "/v1/completions",
    "/v1/chat/completions",
)  # with --pd-disaggregation: a prefill and a decode worker
RETRYABLE = (408, 429, 500, 502, 503, 504)  # SGLang's


@dataclass(eq=False)
class _Try:
    """A request at a worker. It counts there until `over`."""

    worker: Worker
    workers: Workers
    sent: Sent
    pieces: AsyncIterator[Any]
    open: bool = True

    @property
    def url(self) -> str:
        return self.worker.url

    def over(self, well: bool | None) -> None:
        if not self.open:
            return
        self.open = False
        self.workers.balancer.finished(self.sent)
        breaker = self.worker.breaker
        (breaker.left if well is None else breaker.succeeded if well else breaker.failed)()


class Forwarding:
    """workers: whose answers clients get. prefill: who computes their prompts, if that is somebody else. sessions: which worker an
    open one lies on."""

    def __init__(self, args: RouterArgs, workers: Workers, prefill: Workers | None, metrics: RouterMetrics):
        self.args, self.workers, self.prefill, self.metrics = args, workers, prefill, metrics
        self.groups = [group for group in (prefill, workers) if group is not None]
        self.sessions: OrderedDict[str, str] = OrderedDict()
        self.in_flight = 0
        self.draining = False

    async def to_one(self, request: Request, endpoint: str, session: str | None = None) -> tuple[Response, str]:
        """The answer, and whose it is. session: whose worker it must be, if the body does not say it.

        Raises RequestError (503) if nobody can be asked, ClientHasGone.
        """
        if self.draining:
            raise RequestError(503, "the router is draining", UNAVAILABLE)
        began, body = time.monotonic(), await request.body()
        self.in_flight += 1
        left = False

        def leave(status: int | None) -> None:
            nonlocal left
            if not left:
                left, self.in_flight = True, self.in_flight - 1
                self.metrics.requests.labels(endpoint, "gone" if status is None else str(status)).inc()
                self.metrics.duration.labels(endpoint).observe(time.monotonic() - began)

        try:
            wanted = json_of(body)
            asking = self._answer(request, endpoint, body, prompt_of(wanted), session or session_of(wanted))
            response, url = await unless_gone(request.receive, asking)
        except RequestError as error:
            leave(error.status)
            raise
        except BaseException:
            leave(None)
            raise
        if isinstance(response, EventStream):
            response.events.on_end = lambda: leave(200)
        else:
            leave(response.status_code)
        return response, url

    async def _answer(
        self, request: Request, endpoint: str, body: bytes, prompt: str, session: str | None
    ) -> tuple[Response, str]:
        tried: list[str] = []
        last: Response | str | None = None
        wait_s, asked, url = self.args.retry_initial_backoff_ms / 1000, 0, ""
        both = self.prefill is not None and endpoint in TO_BOTH
        for attempt in range(1 + self.args.retry_max_retries):
            worker = self._choose(self.workers, prompt, session, tried)
            prefill = self._choose(self.prefill, prompt, None, tried) if both and worker else None
            if worker is None or (both and prefill is None):
                break
            chosen = [(self.prefill, prefill), (self.workers, worker)][0 if both else 1 :]
            if attempt:
                self.metrics.retries.labels(endpoint).inc()
            if any(one.url in tried for _, one in chosen):  # everybody has been asked: give them time
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * self.args.retry_backoff_multiplier, self.args.retry_max_backoff_ms / 1000)
            for group, one in chosen:
                self.metrics.selected.labels(one.url, group.policy).inc()
            asked += 1
            if both:
                last, fault = await self._try_both(prefill, worker, request, body, prompt)
            else:
                last, fault = await self._try(worker, request, body, prompt), [worker.url]
            if isinstance(last, Response) and last.status_code not in RETRYABLE:
                return last, worker.url
            url = fault[0]
            tried += fault
            for one in fault:
                self.metrics.errors.labels(one).inc()
            said = last if isinstance(last, str) else f"status {last.status_code}"
            log.warning("%s: %s%s", url, said, "" if attempt == self.args.retry_max_retries else "; trying again")
        if isinstance(last, Response):
            return last, url
        if last is None:
            lacking = self.prefill if both and not self.prefill.available else self.workers
            raise RequestError(503, lacking.nobody(), UNAVAILABLE)
        raise RequestError(503, f"asked {asked} time(s), and nobody has answered; at last {url}: {last}", UNAVAILABLE)

    def _choose(self, among: Workers, prompt: str, session: str | None, tried: list[str]) -> Worker | None:
        """Somebody who has not been asked yet, if there is such a one; None if nobody can be asked."""
        if session in self.sessions:  # its tokens lie with one worker alone
            worker = among.all.get(self.sessions[session])
            if worker is None or not worker.available:
                raise RequestError(
                    503, f"session {session[:80]!r} lies on {self.sessions[session]}, which is gone", UNAVAILABLE
                )
            return worker
        for but in (tried, ()):
            try:
                return among.choose(prompt, but)
            except RequestError:
                continue
        return None

    async def _try(self, worker: Worker, request: Request, body: bytes, prompt: str) -> Response | str:
        """The answer, or why there is none. A stream has begun: what breaks off now cannot be tried again."""
        one = self._begun(
            worker, self.workers, prompt, request.method, path_of(request), body, passed_on(request.headers)
        )
        streams = False
        try:
            response = await answered(one)
            streams = isinstance(response, EventStream)
            if not streams:
                one.over(response.status_code < 500)
            return response
        except OSError as error:
            one.over(False)
            return why(error)
        finally:
            if not streams:
                one.over(None)  # of a client that has gone; else it is over already
                await one.pieces.aclose()

    async def _try_both(
        self, prefill: Worker, decode: Worker, request: Request, body: bytes, prompt: str
    ) -> tuple[Response | str, list[str]]:
        """The same of a pair, and the URLs of those whose fault it may be."""
        if not isinstance(wanted := json_of(body), dict):
            raise RequestError(400, "the body: an object of JSON is expected")
        headers, path = passed_on(request.headers), path_of(request)
        room = await prefill.meeting.room(headers)
        if isinstance(room, str):
            prefill.breaker.begin()
            prefill.breaker.failed()
            return room, [prefill.url]
        to_prefill, to_decode = bodies(wanted, room)
        computing = self._begun(prefill, self.prefill, prompt, "POST", path, to_prefill, headers)
        writing = self._begun(decode, self.workers, prompt, "POST", path, to_decode, headers)
        last, fault = await Pair(computing, writing).answer()
        if computing in fault:
            prefill.meeting.forget()
        return last, [one.url for one in fault]

    def _begun(
        self, worker: Worker, among: Workers, prompt: str, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> _Try:
        pieces = worker.client.exchange(method, path, body, headers)
        worker.breaker.begin()
        return _Try(worker, among, among.balancer.sent(worker.url, prompt), pieces)

    async def to_all(self, request: Request) -> dict[str, Any]:
        """The same to every worker that is well: {url: [status, answer]}."""
        body, headers = await request.body(), passed_on(request.headers)
        there = [worker for group in self.groups for worker in group.all.values() if worker.well]
        if not there:
            raise RequestError(503, self.workers.nobody(), UNAVAILABLE)
        asking = (ask(worker, request.method, request.url.path, body, headers) for worker in there)
        answers = await asyncio.gather(*asking)
        return {worker.url: answer for worker, answer in zip(there, answers, strict=True)}

    async def open_session(self, request: Request) -> Response:
        """On one worker, which is remembered."""
        response, url = await self.to_one(request, "/open_session")
        if response.status_code == 200 and isinstance(name := json_of(response.body), str):
            self.sessions[name] = url
            if len(self.sessions) > MAX_SESSIONS:
                self.sessions.popitem(last=False)
        return response

    async def close_session(self, request: Request) -> Response:
        wanted = json_of(await request.body())
        name = wanted.get("session_id") if isinstance(wanted, dict) else None
        response, _ = await self.to_one(request, "/close_session", name if isinstance(name, str) else None)
        if response.status_code == 200:
            self.sessions.pop(name, None)
        return response


def path_of(request: Request) -> str:
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def prompt_of(wanted: Any) -> str:
    """What a policy looks at: the text of /generate, /v1/completions or a conversation, or its ids as a text."""
    if not isinstance(wanted, dict):
        return ""
    if isinstance(messages := wanted.get("messages"), list):
        return "\n".join(f"{one.get('role')}: {_text(one.get('content'))}" for one in messages if isinstance(one, dict))
    for name in ("text", "prompt", "input_ids"):
        if wanted.get(name) is not None:
            return _text(wanted[name])
    return ""


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):  # a part of a message
        return _text(value.get("text", ""))
    if isinstance(value, list):
        numbers = all(isinstance(one, int) for one in value)
        return (" " if numbers else "\n").join(map(str, value) if numbers else map(_text, value))
    return str(value)


def session_of(wanted: Any) -> str | None:
    params = wanted.get("session_params") if isinstance(wanted, dict) else None
    name = params.get("id") if isinstance(params, dict) else None
    return name if isinstance(name, str) else None
