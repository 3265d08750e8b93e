"""Between the routes and the scheduler: text -> token ids, requests out, answers in, and who waits for which.

    a route: generate(request)       GenerateCall (the engine's own validation), TokenizedGenerate ->   scheduler
    a route: async for answer ...    <- in_flight.py adds up                       <- BatchStr          detokenizer
    a route: flush_cache()           Control -> scheduler -> ControlReply

It lives in the process of the HTTP server, on its event loop; nothing here computes or blocks, but for the tokenizer,
which long texts meet in a thread. All who wait are in one file, however they end. SGLang's is srt/managers/tokenizer_manager.py.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from importlib import import_module
from itertools import count
from typing import Any, Literal
from uuid import uuid4

from ch07_sglang_radix.generate_request import GenerateCall
from ch07_sglang_radix.scheduler import WORDS
from ch07_sglang_radix.serving.channels import Pull, Push
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.in_flight import InFlight, News
from ch07_sglang_radix.serving.io_struct import Answer, GenerateRequest, RequestError, SessionParams
from ch07_sglang_radix.serving.logs import log
from ch07_sglang_radix.serving.messages import (
    VERSION,
    Abort,
    AnyMessage,
    BatchStr,
    BatchTokenizedGenerate,
    Control,
    ControlReply,
    Event,
    Hello,
    Leave,
    Lost,
    TokenizedGenerate,
)  # fmt: skip
from ch07_sglang_radix.serving.prepare import Preparation, changed, is_several
from ch07_sglang_radix.serving.probe import PROBE_S, Probe
from ch07_sglang_radix.serving.sessions import Continuation, Node, Sessions
from common.request.intake import Intake
from common.text.tokenizer import Tokenizer
from common.values import shown

State = Literal["starting", "ready", "draining", "failed"]
# of a model that sees, from a wing that comes when it is asked for
EYES, PICTURES_ON_THE_WIRE = "ch07_sglang_radix.images.intake", "ch07_sglang_radix.images.wire"
FAILED = {"type": "abort", "status_code": 500, "err_type": "InternalServerError"}


class TokenizerManager:
    """scheduler, inbox: the ends of the pipes that are main's. tokenizer: None with skip_tokenizer_init, or if there is none.

    facts: what the scheduler said of its engine when it was ready. lost: replicas that have died, and how; the others serve.
    on_event: what wings hear of the scheduler, by name, with the replica whose scheduler it is.
    at_start: ops that the scheduler is told when it is ready. on_tokens: called with each answer that has grown, and by how
    many tokens. on_end: with each that has ended, or whose caller has gone.
    """

    def __init__(self, args: HttpArgs, tokenizer: Tokenizer | None, scheduler: Push, inbox: Pull):
        self.args, self.tokenizer, self._scheduler, self._inbox = args, tokenizer, scheduler, inbox
        self.state: State = "starting"
        self.failure = ""
        self.facts: dict[str, Any] = {}
        self.paused = False
        self.away: list[str] = []  # memory of the engine that was released (weights.py)
        self.lost: dict[int, str] = {}
        self.on_event: dict[str, Callable[[Any, int | None], None]] = {}
        self.at_start: list[str] = []
        self.on_tokens: list[Callable[[InFlight, int], None]] = []
        self.on_end: list[Callable[[InFlight], None]] = []
        self.ready, self.idle = asyncio.Event(), asyncio.Event()  # idle: nothing is in flight
        self.idle.set()
        self.sessions = Sessions(lambda name: self._tell("close_session", name=name))
        self._missing = {"scheduler"} | ({"detokenizer"} if tokenizer else set())
        self._in_flight: dict[int, InFlight] = {}
        self._rids: set[str] = set()  # of those in flight
        self._replies: dict[int, asyncio.Future] = {}
        self._numbers = count()
        self._probe = Probe(scheduler, self._numbers.__next__, lambda: self.state == "failed")
        self.intake: Intake | None = None  # until the scheduler has said what it holds
        self._prepare: Preparation | None = None

    # --- what comes from the scheduler and the detokenizer

    async def listen(self) -> None:
        """A task of the event loop, for as long as the server lives."""
        while True:
            self.take(await self._inbox.receive_async())

    def take(self, message: AnyMessage) -> None:
        if isinstance(message, BatchStr):
            self._probe.heard()
            for i, ticket in enumerate(message.tickets):
                if one := self._in_flight.get(ticket):  # else its caller has gone
                    one.take(message, i)
                    for call in self.on_tokens:
                        call(one, len(message.new_ids[i]))
                    if one.finish_reason is not None:
                        self._forget(one)
                elif message.finished[i] is not None:
                    self._probe.ended(ticket)
        elif isinstance(message, ControlReply):
            if reply := self._replies.pop(message.number, None):
                reply.set_result(message)
        elif isinstance(message, Event):
            if message.name in self.on_event:
                self.on_event[message.name](message.value, message.dp_rank)
        elif isinstance(message, Hello):
            self._welcome(message)
        elif isinstance(message, Lost):
            self._lose(message)

    def _welcome(self, hello: Hello) -> None:
        if hello.version != VERSION:
            raise ValueError(
                f"{hello.who} speaks version {hello.version}, this process {VERSION}; start all from one checkout"
            )
        self._missing.discard(hello.who)
        self.facts |= hello.facts
        if not self._missing:
            names = ("vocab_size", "context_length", "max_total_num_tokens", "page_size")
            see = None
            if self.facts.get("sees"):
                see = import_module(EYES).of_a_server(self.args.engine)
            self.intake = Intake(self.tokenizer, *map(self.facts.get, names), WORDS, self.facts["shortened_by"], see)
            self._prepare = Preparation(self.args, self.intake, self.sessions)
            for op in self.at_start:
                self._tell(op)
            self.state = "ready"
            self.ready.set()

    def _lose(self, message: Lost) -> None:
        """A replica has died: its requests end, and those that come go to the others."""
        self.lost[message.dp_rank] = message.what
        log.error("replica %d is lost: %s; the others go on", message.dp_rank, message.what)
        for ticket in message.tickets:
            self._probe.ended(ticket)
        self._end(filter(None, map(self._in_flight.get, message.tickets)), message.what)

    def fail(self, message: str) -> None:
        """A process has died, or everything ends: whoever waits hears why, and nothing is served any more."""
        if self.state == "failed":
            return
        self.state, self.failure = "failed", message
        self._end(self._in_flight.values(), message)
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(RequestError(503, message, "service_unavailable"))
        self._replies = {}
        self.ready.set()

    def _end(self, these: Iterable[InFlight], why: str) -> None:
        for one in list(these):
            one.end(FAILED | {"message": why})
            self._forget(one)

    def drain(self) -> None:
        """No new requests; those there are go on."""
        if self.state != "failed":
            self.state = "draining"

    def leave(self) -> None:
        """Tell the other processes that there is no more work. Whoever asks now would wait for an answer that never comes."""
        self._scheduler.send(Leave())
        self.fail("the server has ended")

    # --- answers

    async def generate(
        self, request: GenerateRequest, is_disconnected: Callable[[], Awaitable[bool]] | None = None
    ) -> AsyncIterator[Answer]:
        """The answers of a request, each with `index`, which of them it is (n > 1, or a batch).

        With `stream` what each has so far, CUMULATIVE, whenever it has grown; else each once, when it has ended. A
        dictionary is what Engine.generate returns: text, output_ids, meta_info with SGLang's finish_reason object or None.

        Raises RequestError before the first answer for bad input (400), a full queue and a server that is not ready (503).
        Afterwards an error is a finish_reason {"type": "abort", "message", "status_code", "err_type"}. Whoever closes the
        iterator, or is cancelled, or says yes to is_disconnected, has the request aborted.
        """
        self._check_ready()
        call, continuation = await self._prepare(request)
        async with aclosing(self.answers(call, request.stream, continuation, is_disconnected)) as answers:
            async for answer in answers:
                yield answer

    async def answers(
        self, call: GenerateCall, stream: bool, continuation: Continuation | None = None,
        is_disconnected: Callable[[], Awaitable[bool]] | None = None,
    ) -> AsyncIterator[Answer]:  # fmt: skip
        """The same of a call that is known to be right."""
        self._check_ready()  # tokenizing may have taken a while
        mine = self._send(call, stream, continuation)
        news = mine[0].news
        unfinished = set(range(len(mine)))
        try:
            while unfinished:
                grown = await news.take(is_disconnected)
                if not grown:
                    return
                for index in grown:
                    if index not in unfinished:
                        continue  # its end came while its caller took what was before, and was told with that
                    if mine[index].finish_reason is not None:
                        unfinished.discard(index)
                    yield mine[index].answer()
        finally:
            for one in mine:
                if self._forget(one):
                    self._scheduler.send(Abort(one.ticket))

    async def answer(
        self, request: GenerateRequest, is_disconnected: Callable[[], Awaitable[bool]] | None = None
    ) -> dict[str, Any] | list[dict[str, Any]] | None:
        """What Engine.generate returns: a dictionary, or a list for a batch or n > 1. None if the client has gone."""
        last: dict[int, Answer] = {}
        async for one in self.generate(request, is_disconnected):
            last[one.pop("index")] = one
        answers = [last[index] for index in sorted(last)]
        return answers if is_several(request) else answers[0] if answers else None

    def _send(self, call: GenerateCall, stream: bool, continuation: Continuation | None) -> list[InFlight]:
        """All of a call, or nothing of it. Raises RequestError for an rid in use and a full queue."""
        for one in call.requests:
            if one.name in self._rids:
                raise RequestError(400, f"rid={shown(one.name)} is in use: a request of that name is still running")
        self._check_queue(len(call.requests))
        news, now, parser = News(), time.monotonic(), self.args.reasoning_parser
        mine = [
            InFlight(next(self._numbers), one.name or uuid4().hex, i, call, news, stream, now, parser)
            for i, one in enumerate(call.requests)
        ]
        if continuation is not None:
            mine[0].node = Node(mine[0].rid, call.requests[0].ids, mine[0].output_ids)
            self.sessions.add(continuation, mine[0].node)
            for one in self._in_flight.values():
                if one.rid in continuation.ended:
                    self._scheduler.send(Abort(one.ticket))
        wanted = [
            TokenizedGenerate(
                flying.ticket, flying.rid, one.ids, changed(one.params), dict(one.words), stream, one.extra_key,
                one.priority, one.routing_key, session=continuation.session if continuation else None,
                pinned=continuation is not None and continuation.streaming, handoff=one.handoff,
                lora_path=one.lora_path, pictures=one.pictures and import_module(PICTURES_ON_THE_WIRE).packed(one.pictures),
            )
            for flying, one in zip(mine, call.requests, strict=True)
        ]  # fmt: skip
        self._scheduler.send(wanted[0] if len(wanted) == 1 else BatchTokenizedGenerate(wanted))
        self._in_flight |= {flying.ticket: flying for flying in mine}
        self._rids |= {flying.rid for flying in mine}
        self.idle.clear()
        return mine

    def _forget(self, one: InFlight) -> bool:
        """It has ended, or nobody waits for it any more; False if it was forgotten already."""
        if self._in_flight.pop(one.ticket, None) is None:
            return False
        self._rids.discard(one.rid)
        if one.node:
            one.node.end(one.finish_reason)
        if not self._in_flight:
            self.idle.set()
        log.request_ended(one)
        for call in self.on_end:
            call(one)
        return True

    def _check_ready(self) -> None:
        if self.state != "ready":
            why = f": {self.failure}" if self.failure else ""
            raise RequestError(503, f"the server is {self.state}{why}", "service_unavailable")
        if self.away:
            why = f"the server is asleep, without its {' and '.join(self.away)}; POST /resume_memory_occupation first"
            raise RequestError(503, why, "service_unavailable")

    def _check_queue(self, more: int) -> None:
        most = self.args.max_queued_requests
        if most is not None and self.num_queued + more > most:
            raise RequestError(503, "The request queue is full.", "service_unavailable")

    @property
    def num_queued(self) -> int:
        """Requests of which nothing has come yet."""
        return sum(not one.begun for one in self._in_flight.values())

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def room_for(self, ids: Sequence[int], session: SessionParams | None = None) -> int:
        """The most tokens that can follow. Raises RequestError while the engine is not known, and as `generate` for a session."""
        self._check_ready()
        return self._prepare.room_for(ids, session)

    # --- control

    def _tell(self, op: str, **arguments: Any) -> None:  # as `control`, and nobody waits for the reply
        self._scheduler.send(Control(next(self._numbers), op, arguments))

    async def control(self, op: str, **arguments: Any) -> Any:
        """Have the scheduler do it between two steps (scheduler_process.py, ops). Raises RequestError if it cannot."""
        if self.state not in ("ready", "draining"):
            self._check_ready()
        number = next(self._numbers)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        self._scheduler.send(Control(number, op, arguments))
        try:
            said: ControlReply = await reply
        finally:
            self._replies.pop(number, None)
        if said.error is not None:
            raise RequestError(400, said.error)
        return said.value

    async def abort(self, rid: str | None = None, abort_all: bool = False) -> int:
        """End a request by its rid, or all; returns how many were there to end. They come back with finish_reason abort."""
        if not abort_all and not rid:
            raise RequestError(400, "give the rid of a request, or abort_all")
        return await self.control("abort", rid=rid, abort_all=abort_all)

    async def flush_cache(self) -> bool:
        """Forget every cached prefix; False, and nothing is done, while requests wait or run."""
        return await self.control("flush_cache")

    async def server_info(self) -> dict[str, Any]:
        """What the engine is, with pool, tree, queue and hit rate as they stand (Engine.get_server_info), and this server."""
        engine = await self.control("server_info")
        return {"status": self.state, "paused": self.paused, **self.replicas(), **engine, **self.args.shown()}

    def replicas(self) -> dict[str, Any]:
        """{} if there is only one; else how many there are, and who has died of what."""
        size = self.args.engine.dp_size
        return {"dp_size": size, "lost_replicas": self.lost} if size > 1 else {}

    async def model_info(self) -> dict[str, Any]:
        """What is known without asking the scheduler."""
        context_length, has_tokenizer = self.facts.get("context_length"), self.tokenizer is not None
        return self.args.model() | {"max_model_len": context_length, "has_tokenizer": has_tokenizer}

    async def pause(self, mode: str = "abort") -> int:
        """No step runs until `resume`. abort: all requests end; retract: they give their pages back and wait; in_place: they
        keep them. Returns how many it met.
        """
        met = await self.control("pause", mode=mode)
        self.paused = True
        return met

    async def resume(self) -> None:
        await self.control("resume")
        self.paused = False

    async def step(self, steps: int = 1) -> int:
        """While paused: so many steps more; returns how many requests there are to do something for."""
        return await self.control("step", steps=steps)

    async def start_profile(self, **options: Any) -> str:
        """torch.profiler on every rank; returns what the names of their files begin with. `stop_profile` returns rank 0's."""
        return await self.control("start_profile", output_dir=self.args.profile_dir, **options)

    async def stop_profile(self) -> str:
        return await self.control("stop_profile")

    async def healthy(self, timeout_s: float = PROBE_S) -> bool:
        """Does anything come back? See probe.py. Paused, nothing is computed, but the loop turns."""
        if self.state != "ready":
            return False
        try:
            sign = self.control("ping") if self.paused or self.away else self._probe.sign_of_life()
            return await asyncio.wait_for(sign, timeout_s)
        except asyncio.TimeoutError:
            return False
