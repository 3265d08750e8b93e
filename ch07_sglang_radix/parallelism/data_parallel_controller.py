"""Between one tokenizer manager and the schedulers of several replicas: which of them gets a request, and one voice for all.

    TokenizerManager        DataParallelController         scheduler 0, 1, ...          detokenizer (one for all)
    TokenizedGenerate --->  one replica, by the policy --->
    Abort             --->  the replica that has it    --->
    Control           --->  all replicas               --->
    ControlReply      <---  one, of all their replies  <---
    BatchStr          <---  counted, and handed on     <--------------------------------  ids -> text

It has the manager's two ends of the pipes, so that the manager need not know how many schedulers there are. SGLang 0.5.23 makes
it a process of its own (srt/managers/data_parallel_controller.py), which reads from shared memory, at most every 20 ms, how much
each scheduler has to do. Here main passes on every answer anyway, and so knows at each moment what is on its way: a process more
would be a hop more for each request, and would know less. What it costs is the choice, in main's event loop.

A replica that dies takes its requests with it: whoever waits may have seen a part of the answer. The next ones go to the others.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ch07_sglang_radix.lora import one_reason, one_voice
from ch07_sglang_radix.parallelism.load_balancing import LoadBalancer, Sent
from ch07_sglang_radix.serving.channels import Pull, Push
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
from ch07_sglang_radix.serving.sessions import MAX_SESSIONS
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager


@dataclass(eq=False)
class _Asked:
    """A Control that all replicas must answer. number: the manager's. replies: of those that have, by rank. told: what the
    manager will hear, once they have undone it."""

    number: int
    op: str
    arguments: dict[str, Any]
    missing: set[int] = field(default_factory=set)
    replies: dict[int, ControlReply] = field(default_factory=dict)
    told: ControlReply | None = None


@dataclass(eq=False)
class _OnItsWay:
    dp_rank: int
    sent: Sent | None  # None: a health probe, which counts nowhere


class DataParallelController:
    """For the manager it is its scheduler (Push) and its inbox (Pull). texts: to the detokenizer, None if there is none."""

    def __init__(self, method: str, schedulers: Sequence[Push], inbox: Pull, texts: Push | None = None):
        self.balancer = LoadBalancer(method, range(len(schedulers)))
        self._schedulers, self._inbox, self._texts = dict(enumerate(schedulers)), inbox, texts  # of those that live
        self._on_their_way: dict[int, _OnItsWay] = {}  # by ticket
        self._sessions: OrderedDict[str, int] = OrderedDict()  # whose K and V lie where, the newest last
        self._asked: dict[int, tuple[int, _Asked]] = {}  # by our number: of whom, what
        self._hellos: dict[int, Hello] = {}
        self._numbers, self._probes = count(), count()

    # --- from the manager

    def send(self, message: AnyMessage) -> None:
        if isinstance(message, TokenizedGenerate):
            self._send_to_one([message])
        elif isinstance(message, BatchTokenizedGenerate):
            self._send_to_one(message.requests)
        elif isinstance(message, Abort):
            if one := self._on_their_way.get(message.ticket):
                self._schedulers[one.dp_rank].send(message)
        elif isinstance(message, Control):
            self._ask(message)
        else:  # Leave
            for scheduler in self._schedulers.values():
                scheduler.send(message)

    def close(self) -> None:
        """The pipes are closed by who has opened them."""

    def _send_to_one(self, requests: Sequence[TokenizedGenerate]) -> None:
        """Those of a call that go to the same replica go together, before its next step."""
        groups: dict[int, list[TokenizedGenerate]] = {}
        for one in requests:
            rank = self._choose(one)
            sent = None if one.probe else self.balancer.sent(rank, one.input_ids)
            self._on_their_way[one.ticket] = _OnItsWay(rank, sent)
            groups.setdefault(rank, []).append(one)
        for rank, group in groups.items():
            self._schedulers[rank].send(group[0] if len(group) == 1 else BatchTokenizedGenerate(group))

    def _choose(self, one: TokenizedGenerate) -> int:
        if one.probe:  # each in turn, past the policy: a probe is nobody's prefix
            alive = list(self._schedulers)
            return alive[next(self._probes) % len(alive)]
        if one.session is None:
            return self.balancer.choose(one.input_ids)
        rank = self._sessions.get(one.session)
        if (
            rank not in self._schedulers
        ):  # it begins, or its replica has died: main has its tokens, so it goes on elsewhere
            rank = self.balancer.choose(one.input_ids)
        self._sessions[one.session] = rank
        self._sessions.move_to_end(one.session)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return rank

    def _ask(self, control: Control) -> None:
        op, ranks = control.op, list(self._schedulers)
        if op == "xray":
            ranks = ranks[:1]  # a page shows one engine
        if op == "close_session":
            self._sessions.pop(control.arguments["name"], None)  # the next of this name is another one
        arguments = control.arguments | ({"hold": True} if op in UPDATES else {})
        asked = _Asked(control.number, op, arguments)
        if op == "flush_cache" and any(one.sent for one in self._on_their_way.values()):
            op, asked.op = "ping", "busy"  # all flush, or none
        self._ask_these(ranks, asked, op, arguments)

    def _ask_these(self, ranks: Sequence[int], asked: _Asked, op: str, arguments: dict[str, Any]) -> None:
        asked.missing |= set(ranks)
        for rank in ranks:
            number = next(self._numbers)
            self._asked[number] = (rank, asked)
            self._schedulers[rank].send(Control(number, op, arguments))

    # --- for the manager

    async def receive_async(self) -> AnyMessage:
        while True:
            message = self.take(await self._inbox.receive_async())
            if message is not None:
                return message

    def take(self, message: AnyMessage) -> AnyMessage | None:
        """What the manager is told of it; None: nothing yet."""
        if isinstance(message, BatchStr):
            self._count(message)
        elif isinstance(message, ControlReply):
            return self._reply(message)
        elif isinstance(message, Hello) and message.dp_rank is not None:
            self._hellos[message.dp_rank] = message
            return together(self._hellos) if len(self._hellos) == len(self.balancer.loads) else None
        elif isinstance(message, Event) and message.dp_rank not in self._schedulers:
            return None  # the last words of one that is dead
        return message

    def _count(self, batch: BatchStr) -> None:
        for ticket, new_ids, finished in zip(batch.tickets, batch.new_ids, batch.finished, strict=True):
            if (one := self._on_their_way.get(ticket)) is None:
                continue  # its replica has died meanwhile
            if one.sent:
                self.balancer.grown(one.sent, len(new_ids))
            if finished is not None:
                self._forget(ticket)

    def _forget(self, ticket: int) -> None:
        if (one := self._on_their_way.pop(ticket)).sent:
            self.balancer.finished(one.sent)

    def _reply(self, reply: ControlReply) -> ControlReply | None:
        rank, asked = self._asked.pop(reply.number, (None, None))
        if asked is None:
            return None
        asked.missing.discard(rank)
        if asked.told is None:
            asked.replies[rank] = reply
        elif asked.op in UPDATES:
            asked.told = _added_up(asked.told, rank, reply)
        return None if asked.missing else self._together(asked)

    def _together(self, asked: _Asked) -> ControlReply | None:
        """All have replied. None if there is a second round: what some have done, and others could not, is undone; weights that
        all have looked at are written."""
        if asked.told is None:
            asked.told = merged(asked.number, asked.op, asked.replies)
            if asked.op in (LOAD, *UPDATES):
                values = {rank: one.value for rank, one in asked.replies.items() if rank in self._schedulers}
                done = [rank for rank, value in values.items() if value and value["success"]]
                if asked.op in UPDATES:
                    self._ask_these(done, asked, "finish_update", {"write": asked.told.error is None})
                elif len(done) < len(values):
                    self._ask_these(done, asked, UNLOAD, {"lora_name": asked.arguments["lora_name"]})
        return None if asked.missing else asked.told

    # --- a replica dies

    def outlives(self, dp_rank: int, what: str, manager: TokenizerManager) -> bool:
        """A replica has died. Do the others go on? Then the manager hears of it; False for the last one, and while all begin."""
        if manager.state not in ("ready", "draining") or set(self._schedulers) <= {dp_rank}:
            return False
        for message in self.lose(dp_rank, what):
            manager.take(message)
        return True

    def lose(self, dp_rank: int, what: str) -> list[AnyMessage]:
        """What the manager must hear: whose answers end, and the replies that waited for this replica alone."""
        del self._schedulers[dp_rank]
        self.balancer.remove(dp_rank)
        tickets = [ticket for ticket, one in self._on_their_way.items() if one.dp_rank == dp_rank]
        for ticket in tickets:
            self._forget(ticket)
        if self._texts:
            self._texts.send(Leave())  # in its place: the detokenizer ends when all have left
        told: list[AnyMessage] = [Lost(dp_rank, what, tickets)]
        for number in [number for number, (rank, _) in self._asked.items() if rank == dp_rank]:
            _, asked = self._asked.pop(number)
            asked.missing.discard(dp_rank)
            if not asked.missing:
                reply = self._together(asked) if asked.replies else ControlReply(asked.number, None, what)
                told += [reply] if reply else []
        return told


def together(hellos: dict[int, Hello]) -> Hello:
    """One Hello of all schedulers. Their engines are equal but for the memory that was free: what fits the smallest pool fits.

    Raises ValueError if some have found a GPU and others none.
    """
    first = hellos[0]
    devices = {rank: hello.facts["device"].partition(":")[0] for rank, hello in sorted(hellos.items())}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"replica {rank} runs on {device}" for rank, device in devices.items())
        raise ValueError(f"{found}: each of {len(devices)} replicas wants GPUs of its own; use fewer, or --device cpu")
    pools = [hello.facts["max_total_num_tokens"] for hello in hellos.values()]
    pids = [pid for rank in sorted(hellos) for pid in hellos[rank].facts["pids"]]
    facts = first.facts | {"max_total_num_tokens": min(pools), "pids": pids}
    strange = next((hello.version for hello in hellos.values() if hello.version != VERSION), VERSION)
    return Hello(strange, first.who, first.pid, facts)


def merged(number: int, op: str, replies: dict[int, ControlReply]) -> ControlReply:
    """One reply of all. One that could not do it is named if others have."""
    wrong = {rank: reply.error for rank, reply in sorted(replies.items()) if reply.error is not None}
    if wrong:
        return ControlReply(number, error=one_reason(wrong, len(replies)))
    values = {rank: reply.value for rank, reply in sorted(replies.items())}
    try:
        return ControlReply(number, MERGE.get(op, _first)(values))
    except ValueError as why:
        return ControlReply(number, error=str(why))


def _first(values: dict[int, Any]) -> Any:
    return next(iter(values.values()))


def _all(values: dict[int, Any]) -> bool:
    return all(values.values())


def _sum(values: dict[int, Any]) -> int:
    return sum(values.values())


SUMS = (
    "max_total_num_tokens", "free_tokens", "evictable_tokens", "protected_tokens", "held_tokens", "waiting", "running",
    "prompt_tokens", "cached_tokens", "evicted_tokens", "retractions",
)  # fmt: skip


def _server_info(values: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """As of one engine, with what is counted added up; `replicas` has each for itself."""
    total = {name: sum(info[name] for info in values.values()) for name in SUMS}
    steps = {kind: sum(info["steps"][kind] for info in values.values()) for kind in _first(values)["steps"]}
    hit_rate = total["cached_tokens"] / total["prompt_tokens"] if total["prompt_tokens"] else 0.0
    each = [info | {"dp_rank": rank} for rank, info in values.items()]
    return _first(values) | total | {"steps": steps, "hit_rate": hit_rate, "replicas": each}


def _one_digest(values: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Of updates that all replicas hold. Raises ValueError if they are not the same."""
    first, told = next(iter(values.items()))
    for rank, one in values.items():
        if one["digest"] != told["digest"]:
            raise ValueError(f"replica {rank} has read other weights than replica {first}; give all the same files")
    return {"num_paused_requests": 0}


def _added_up(told: ControlReply, rank: int, reply: ControlReply) -> ControlReply:
    """What is told of an update, with what one more replica says that it has written. The first error stays."""
    if told.error is not None:
        return told
    if reply.error is not None:
        return ControlReply(told.number, error=f"replica {rank}: {reply.error}; replicas differ, start anew")
    paused = told.value["num_paused_requests"] + reply.value["num_paused_requests"]
    return ControlReply(told.number, reply.value | {"num_paused_requests": paused})


LOAD, UNLOAD = "load_lora_adapter", "unload_lora_adapter"
UPDATES = ("update_weights_from_disk", "update_weights_from_tensor")  # held by each, and written once all could
MERGE: dict[str, Callable[[dict[int, Any]], Any]] = {
    "flush_cache": _all,
    "busy": lambda values: False,
    "ping": _all,
    "abort": _sum,
    "pause": _sum,
    "step": _sum,
    "server_info": _server_info,
    LOAD: one_voice,
    UNLOAD: one_voice,
} | dict.fromkeys(UPDATES, _one_digest)
