"""Rank 0's loop in a server: take in what has come, one step, one message out.

    the tokenizer manager            this loop                        detokenizer        other ranks
    TokenizedGenerate  ---------->   enqueue
    Abort, Control     ---------->   do it, between two steps
                                     scheduler.step()      --- task ------------------>  execute
                                     BatchTokenIDs         ------->   text
    ControlReply       <----------

It has the in-process Engine inside, with its ranks, and adds what it takes to be talked to: nothing here decides about
requests. With nothing to do it waits on the socket, and says so to the other ranks from time to time.
SGLang: srt/managers/scheduler.py, event_loop_normal, where every rank runs such a loop; here rank 0 alone has sockets.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from ch07_sglang_radix.engine import Engine
from ch07_sglang_radix.handoff import Handoff
from ch07_sglang_radix.images.wire import unpacked
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.serving.channels import Pull, Push
from ch07_sglang_radix.serving.messages import (
    VERSION,
    Abort,
    BatchStr,
    BatchTokenIDs,
    BatchTokenizedGenerate,
    Begin,
    Control,
    ControlReply,
    Event,
    Hello,
    Leave,
    TokenizedGenerate,
    ToScheduler,
    encode,
)  # fmt: skip
from ch07_sglang_radix.serving.step_state import StepTeller
from ch07_sglang_radix.serving.watch import Watch
from ch07_sglang_radix.serving.xray.recorder import Recorder
from ch07_sglang_radix.tasks import StopTask
from ch07_sglang_radix.weight_calls import EXCHANGES
from common.distributed.spawn import lost_node
from common.parallel_state import RankFailure
from common.sampling.logprobs import TokenLogprobs
from common.sampling.params import SamplingParams
from common.text.detokenizer import context_of

HEARTBEAT_S = 10.0  # a collective that waits longer than a minute counts as a dead peer
UNKNOWN = -2  # a number that no request has: it has ended meanwhile
NOTHING = msgspec.Raw(encode([]))
FACTS = ("model", "tp_size", "pp_size", "device", "dtype", "kv_cache_dtype", "page_size")


@dataclass(eq=False)
class Told:
    """How much of a request has been sent."""

    request: TokenizedGenerate
    begun: bool = False
    tokens: int = 0
    prompt_logprobs: int = 0


class SchedulerProcess:
    """inbox: from main; texts: to the detokenizer; main: replies, and everything if there is no tokenizer (texts=None).

    ops: what a Control may ask for; a wing adds its own. at_rest: called before it waits for work. While the scheduler is paused,
    no step runs but those that `step` asks for; none while an update of weights is held.
    """

    def __init__(self, engine: Engine, inbox: Pull, main: Push, texts: Push | None = None, dp_rank: int | None = None):
        self.engine, self.scheduler, self.inbox, self.main, self.texts = engine, engine.scheduler, inbox, main, texts
        self.dp_rank = dp_rank
        self.requests: dict[int, Told] = {}  # by the scheduler's own number
        self.numbers: dict[int, int] = {}  # of each ticket
        self.steps_asked_for = 0
        self.working = False  # in a step
        self.teller = StepTeller(self.scheduler, main, dp_rank)
        self.at_rest: list[Callable[[], None]] = []
        self.ops: dict[str, Callable[..., Any]] = {
            "flush_cache": engine.flush_cache, "server_info": engine.get_server_info, "ping": lambda: True,
            "pause": self.scheduler.pause, "resume": self.resume, "step": self.step, "abort": engine.abort_request,
            "start_profile": engine.start_profile, "stop_profile": engine.stop_profile,
            "tell_steps": self.teller.switch_on, "close_session": self.close_session,
            "load_lora_adapter": engine.loaded_lora_adapter, "unload_lora_adapter": engine.unloaded_lora_adapter,
            "lora_adapters": engine.lora_adapters,
        } | {op: partial(self.exchange, op) for op in EXCHANGES}  # fmt: skip

    def run(self) -> None:
        """Until Leave. A step that fails for all ranks raises; one that fails for its requests ends those."""
        busy = True
        while self.take_in(wait=not busy):
            busy = self.turn()
        if self.texts:
            self.texts.send(Leave())

    def turn(self) -> bool:
        """A step, if there is one to do, and what has come of it and of aborts; False if there is nothing more to do."""
        busy = False
        if not self.scheduler.weights_held and (not self.scheduler.paused or self.steps_asked_for):
            self.teller.begin()
            self.working = True
            busy = self.scheduler.step()
            self.working = False
            self.steps_asked_for = max(0, self.steps_asked_for - 1) if busy else 0
        self.give_out()
        self.teller.turn()
        return busy

    # --- in

    def take_in(self, wait: bool) -> bool:
        """Do what has come, all of it; False if that was the end."""
        while True:
            for call in self.at_rest if wait else ():
                call()
            message = self.inbox.receive(HEARTBEAT_S if wait else 0)
            if message is None:
                if not wait:
                    return True
                self.scheduler.control.send_task(StopTask(self.scheduler.step_number))
            elif isinstance(message, Leave):
                return False
            else:
                self.take(message)
                wait = False

    def take(self, message: ToScheduler) -> None:
        if isinstance(message, TokenizedGenerate):
            self.enqueue(message)
        elif isinstance(message, BatchTokenizedGenerate):
            for one in message.requests:
                self.enqueue(one)
        elif isinstance(message, Abort):
            self.scheduler.abort(self.numbers.get(message.ticket, UNKNOWN))
        elif (reply := self.obey(message)) is not None:
            self.main.send(reply)

    def enqueue(self, one: TokenizedGenerate) -> None:
        """The manager's intake has looked at everything: what is wrong here is wrong with this program."""
        number = self.scheduler.enqueue(
            None, one.input_ids, SamplingParams(**one.params), words=one.words, extra_key=one.extra_key,
            priority=one.priority, name=one.rid, routing_key=one.routing_key, shows_text=False, probe=one.probe,
            session=one.session if one.pinned else None, handoff=one.handoff and Handoff(*one.handoff),
            pictures=one.pictures and unpacked(one.pictures, self.scheduler.wrapper.images.processor.block),
            lora_path=one.lora_path,
        )  # fmt: skip
        self.requests[number], self.numbers[one.ticket] = Told(one), number
        if not one.probe:
            self.teller.queued(number)

    def obey(self, control: Control) -> ControlReply | None:
        """What an op returns; of a future the reply comes when it is done, between two later steps."""
        try:
            if control.op not in self.ops:
                raise ValueError(f"unknown operation {control.op}")
            value = self.ops[control.op](**control.arguments)
            if isinstance(value, Future):
                value.add_done_callback(lambda done: self.main.send(ControlReply(control.number, done.result())))
                return None
            return ControlReply(control.number, value)
        except RankFailure:  # the ranks are out of step
            raise
        except Exception as error:  # an operator's wish is no reason to end everybody's requests
            return ControlReply(control.number, error=str(error) or type(error).__name__)

    # --- control

    def resume(self) -> None:
        self.scheduler.resume()
        self.steps_asked_for = 0

    def step(self, steps: int) -> int:
        """While paused. Returns how many requests there are to do something for."""
        if not self.scheduler.paused:
            raise ValueError("steps one by one are for a paused engine; POST /pause_generation first")
        self.steps_asked_for += steps
        return len(self.scheduler.everybody)

    def exchange(self, op: str, **arguments: Any) -> Any:
        """Of weights and memory (weight_calls.py). What was computed before is told before, with the version that computed it."""
        self.scheduler.settle_all()
        self.give_out()
        return getattr(self.engine, op)(**arguments)

    def close_session(self, name: str) -> None:
        """What a streaming session keeps is free."""
        for rank in self.scheduler.data_ranks:
            rank.memory.sessions.close(name, rank.unfinished)

    # --- out

    def give_out(self) -> None:
        """One message for all that has come of a step. Who does not stream is told of twice: it has begun, it has ended."""
        scheduler = self.scheduler
        grown, scheduler.grown, scheduler.results = scheduler.grown, {}, {}
        news = [(self.requests[number], req) for number, req in grown.items() if number in self.requests]
        news = [(told, req) for told, req in news if req.ended or told.request.stream or not told.begun]
        if not news:
            return
        drafts = [req.drafts for _, req in news]
        details = [req.cached_tokens_details for _, req in news]
        rows = map(list, zip(*(self._news(*one) for one in news), strict=True))
        batch = BatchTokenIDs(
            scheduler.step_number, *rows, dp_rank=self.dp_rank, drafts=drafts if any(drafts) else [],
            weight_version=scheduler.weight_version, cached_details=details if any(details) else [],
        )  # fmt: skip
        if self.texts:
            self.texts.send(batch)
        else:
            self.main.send(without_text(batch))

    def _news(self, told: Told, req: Req) -> tuple:
        """The row of a BatchTokenIDs."""
        begin = None
        if not told.begun and self.texts:
            words = told.request.words
            skip = words.get("skip_special_tokens", True)
            begin = Begin(context_of(self.scheduler.wrapper.tokenizer, req.prompt_ids, skip), words)
        logprobs, prompt_logprobs = req.answer.logprobs, req.prompt_logprobs
        row = (
            told.request.ticket, begin, req.output_ids[told.tokens :], req.finish_reason, req.cached_tokens or 0,
            _raw(logprobs[told.tokens :]) if logprobs else NOTHING,
            _raw(prompt_logprobs[told.prompt_logprobs :]) if prompt_logprobs else NOTHING,
        )  # fmt: skip
        told.begun, told.tokens, told.prompt_logprobs = True, len(req.output_ids), len(prompt_logprobs)
        if req.ended:
            del self.requests[req.rid], self.numbers[told.request.ticket]
        return row


def schedule(
    engine_args: dict[str, Any], inbox: Pull, main: Push, texts: Push | None, watch: Watch | None = None,
    dp_rank: int | None = None,
) -> None:  # fmt: skip
    """What the process does, or the thread. The watch learns whom rank 0 must not lose, and whether a step gets on."""
    if watch:
        watch.lost = lambda: next(filter(None, lost_node()), None)
    with Engine(**engine_args) as engine:
        process = SchedulerProcess(engine, inbox, main, texts, dp_rank)
        scheduler = engine.scheduler
        recorder = Recorder(scheduler, lambda line: main.send(Event("xray", line, dp_rank)), replica=dp_rank)
        process.ops["xray"] = recorder.watch
        process.at_rest.append(recorder.at_rest)
        if watch:
            peers = scheduler.replica.peers
            ranks = {f"rank {r}": pid for r, (host, pid) in enumerate(peers) if r > 0 and host == peers[0][0]}
            watch.processes = watch.processes | ranks
            watch.step = lambda: scheduler.step_number if process.working else None
        main.send(Hello(VERSION, "scheduler", os.getpid(), facts_of(engine), dp_rank))
        process.run()
        if watch:
            watch.leave()


def facts_of(engine: Engine) -> dict[str, Any]:
    """What main must know: for the intake, for the banner, and for whoever asks what is served here."""
    info, intake = engine.get_server_info(), engine.scheduler.intake
    facts = {name: info[name] for name in FACTS}
    return facts | {
        "sees": intake.see is not None,
        "vocab_size": intake.vocab_size, "context_length": intake.model_limit, "shortened_by": intake.shortened_by,
        "max_total_num_tokens": intake.pool_tokens,
        "max_running_requests": engine.wrapper.max_running_requests,
        "pids": [pid for _, pid in engine.scheduler.replica.peers] or [os.getpid()],
    }  # fmt: skip


def without_text(batch: BatchTokenIDs) -> BatchStr:
    """What the detokenizer would have made of it, had there been one."""
    return BatchStr(
        batch.step, batch.tickets, [""] * len(batch.tickets), batch.new_ids, batch.finished, batch.cached_tokens,
        batch.logprobs, batch.prompt_logprobs, batch.dp_rank, batch.drafts, batch.weight_version,
        batch.cached_details,
    )  # fmt: skip


def _raw(told: list[TokenLogprobs]) -> msgspec.Raw:
    return msgspec.Raw(encode([(one.token, one.logprob, one.rank, one.top, one.wanted) for one in told]))
