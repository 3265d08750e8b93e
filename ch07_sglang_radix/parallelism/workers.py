"""The servers behind a router: who there is, who is well, and what each is doing.

    starts             -> looked at once; who does not answer is named, and looked at again every health_check_interval_secs
    well               -> health_failure_threshold checks fail in a row           -> not well: it gets nothing
    not well           -> health_success_threshold checks pass in a row           -> well
    has another model  -> refused, by name: who asks one router expects one model

A check sees a server that is down or hangs while nobody asks it; the circuit breaker (circuit_breaker.py) sees one that fails while
it is asked, and does not wait for the next check. Both must say yes.
"""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from ch07_sglang_radix.parallelism.circuit_breaker import CircuitBreaker
from ch07_sglang_radix.parallelism.load_balancing import LoadBalancer
from ch07_sglang_radix.parallelism.router_args import RouterArgs, worker_url
from ch07_sglang_radix.parallelism.two_halves import Meeting
from ch07_sglang_radix.serving.http_client import Client
from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.logs import log
from common.values import shown

UNAVAILABLE = "service_unavailable"


class Worker:
    """One server. kind: prefill or decode, of a half. why: what is wrong with it, "" if nothing is."""

    def __init__(self, url: str, args: RouterArgs, kind: str | None = None):
        self.url, self.kind, self._args = url, kind, args
        self.client = Client(url, args.api_key, args.request_timeout_secs, args.connect_timeout_secs)
        self.breaker = CircuitBreaker(
            args.cb_failure_threshold, args.cb_success_threshold, args.cb_timeout_duration_secs
        )
        self.meeting = Meeting(url, self.client)
        self.model: str | None = None  # unknown until it has answered
        self.mode: str | None = None  # of a half: what it says it is
        self.well, self.why = False, "nobody has looked at it yet"
        self._in_a_row = 0  # checks that said otherwise

    @property
    def available(self) -> bool:
        return self.well and self.breaker.allows()

    async def look(self) -> str:
        """What is wrong with it now."""
        try:
            asking = self.client.call("GET", self._args.health_check_endpoint)
            status, _ = await asyncio.wait_for(asking, self._args.health_check_timeout_secs)
        except asyncio.TimeoutError:
            return f"no answer within {self._args.health_check_timeout_secs:g} s"
        except OSError as error:
            return f"does not answer ({error.strerror or error})"
        return "" if status == 200 else f"{self._args.health_check_endpoint} says {status}"

    async def ask_model(self) -> None:
        """Its name of the model; a server that has no such route, or wants a key that we have not, keeps it to itself."""
        with suppress(OSError, asyncio.TimeoutError):
            status, info = await asyncio.wait_for(
                self.client.call("GET", "/model_info"), self._args.health_check_timeout_secs
            )
            name = info.get("served_model_name") if status == 200 and isinstance(info, dict) else None
            if isinstance(name, str):
                self.model = name
            if self.kind:
                self.mode = await asyncio.wait_for(self.meeting.mode(), self._args.health_check_timeout_secs)

    def note(self, why: str) -> bool:
        """The outcome of a look; True if it has changed what is thought of the worker."""
        if not why and self.breaker.state == "half_open":
            self.breaker.succeeded()
        if (not why) == self.well:
            self._in_a_row, self.why = 0, why
            return False
        self._in_a_row += 1
        unknown = self.why.startswith("nobody")
        needed = self._args.health_failure_threshold if self.well else self._args.health_success_threshold
        self.why = why or self.why
        if self._in_a_row < needed and not (unknown and not why):
            return False
        self.well, self.why, self._in_a_row = not why, why, 0
        return True

    def shown(self) -> dict[str, Any]:
        return ({"worker_type": self.kind} if self.kind else {}) | {
            "url": self.url,
            "model": self.model,
            "healthy": self.well,
            "circuit_breaker": self.breaker.state,
            "why": self.why,
        }


class Workers:
    """All of one kind, by URL. balancer: chooses among those that are available. beside: the other half, of the same model."""

    def __init__(self, args: RouterArgs, kind: str | None = None):
        self._args, self.kind = args, kind
        self.beside: Workers | None = None
        self._urls: tuple[str, ...] = getattr(args, kind or "worker_urls")
        self.policy = getattr(args, f"{kind}_policy", None) or args.policy
        options = {}
        if self.policy == "cache_aware":
            names = ("cache_threshold", "balance_abs_threshold", "balance_rel_threshold", "max_tree_size")
            options = {name: getattr(args, name) for name in names}
        elif self.policy == "prefix_hash":
            options = {"prefix_length": 1024}  # characters: some 256 tokens
        self.balancer = LoadBalancer(self.policy, **options)
        self.all: dict[str, Worker] = {}
        self._looking: dict[str, asyncio.Task] = {}

    @property
    def model(self) -> str | None:
        """Of the first that has told its own."""
        return next((worker.model for worker in self.all.values() if worker.well and worker.model), None)

    @property
    def available(self) -> int:
        return sum(worker.available for worker in self.all.values())

    async def start(self) -> None:
        """Those that the flags name. Who is not there is named; the others serve."""
        for url in self._urls:
            self.all[url] = Worker(url, self._args, self.kind)
            self.balancer.add(url)
        there = list(self.all.values())
        for worker, why in zip(there, await asyncio.gather(*map(self._first_look, there)), strict=True):
            if self.all.get(worker.url) is worker:  # nobody has removed it meanwhile
                self._say(worker, why or self._unfit(worker))
                self._looking[worker.url] = asyncio.create_task(self._keep_looking(worker))

    async def add(self, url: str) -> Worker:
        """While it runs. Raises RequestError if it is there already, does not answer, or serves another model."""
        try:
            url = worker_url(url)
        except ValueError as error:
            raise RequestError(400, str(error)) from None
        if url in self.all or (self.beside and url in self.beside.all):
            raise RequestError(400, f"{url} is a worker already")
        worker = Worker(url, self._args, self.kind)
        why = await self._first_look(worker) or self._unfit(worker)
        if not why and url in self.all:  # somebody else was quicker
            why = "it is a worker by now"
        if why:
            await worker.client.close()
            raise RequestError(400, f"{url}: {why}; it is not added")
        self.all[url] = worker
        self.balancer.add(url)
        self._say(worker, "")
        self._looking[url] = asyncio.create_task(self._keep_looking(worker))
        return worker

    async def remove(self, url: str) -> None:
        """It gets nothing more; what runs there goes on. Raises RequestError if it is none."""
        url = url.rstrip("/")
        if url not in self.all:
            raise RequestError(400, f"{shown(url)} is no worker; GET /list_workers has them")
        if looking := self._looking.pop(url, None):  # none before the first look is over
            looking.cancel()
        del self.all[url]
        self.balancer.remove(url)
        log.info("%s is removed; %d left", url, len(self.all))

    async def close(self) -> None:
        there, self.all = list(self.all.values()), {}
        for task in self._looking.values():
            task.cancel()
        await asyncio.gather(*self._looking.values(), return_exceptions=True)
        for worker in there:
            await worker.client.close()

    def choose(self, prompt: str, but: Iterable[str] = ()) -> Worker:
        """Raises RequestError if nobody is available besides `but`."""
        there = [worker.url for worker in self.all.values() if worker.available and worker.url not in set(but)]
        if not there:
            raise RequestError(503, self.nobody(), UNAVAILABLE)
        return self.all[self.balancer.choose(prompt, there)]

    def nobody(self) -> str:
        """Why nobody can be asked, in one line."""
        if not self.all:
            which, add = (f"{self.kind} ", f"&worker_type={self.kind}") if self.kind else ("", "")
            return f"the router has no {which}worker; POST /add_worker?url=...{add}"
        told = (
            f"{worker.url}: {worker.why or 'its circuit breaker is ' + worker.breaker.state}"
            for worker in self.all.values()
        )
        return (
            f"none of {len(self.all)} {self.kind + ' ' if self.kind else ''}worker(s) can be asked: {'; '.join(told)}"[
                :500
            ]
        )

    # --- checks

    async def _first_look(self, worker: Worker) -> str:
        why = await worker.look()
        if not why:
            await worker.ask_model()
        return why

    async def _keep_looking(self, worker: Worker) -> None:
        # asked each time, as wait_for before Python 3.12 may lose a cancellation that comes together with its answer
        while self.all.get(worker.url) is worker:
            await asyncio.sleep(self._args.health_check_interval_secs)
            why = await worker.look()
            if not why and not worker.well:
                await worker.ask_model()  # it may be another server by now
                why = self._unfit(worker)
            self._say(worker, why)

    def _unfit(self, worker: Worker) -> str:
        if worker.mode not in (None, self.kind):
            return f"is no {self.kind} server: disaggregation_mode={worker.mode}"
        there = [*self.all.values(), *(self.beside.all.values() if self.beside else ())]
        ours = next((w.model for w in there if w is not worker and w.well and w.model), None)
        if ours is None or worker.model in (None, ours):
            return ""
        return f"serves {shown(worker.model)}, the other workers {shown(ours)}; give each model a router of its own"

    def _say(self, worker: Worker, why: str) -> None:
        first = worker.why.startswith("nobody")
        changed = worker.note(why)
        if not worker.well and (changed or first):
            log.error("%s gets no requests: %s", worker.url, why)
            self.balancer.policy.forget(worker.url)  # whoever comes back there has an empty cache
        elif changed:
            log.info("%s is there: %s", worker.url, worker.model or "its model is not known")
