"""The decode side: prealloc -> transfer -> arrived -> running, and not one prompt token is computed.

    prealloc     until pages for the whole prompt are free, beside num_reserved_decode_tokens for each answer that is being written
                 here or soon will be; what the tree has of the prompt need not come. First come, first served
    transfer     reserved; the other side computes and sends
    arrived      all ranks have everything; it lacks a row, its grammar, or a place for its adapter. Who wants an adapter does not
                 overtake who waits for a place for one, so that places come free for those who came first
    running      the scheduler's own, as if a prefill step had just given it its first token

    deflected    from prealloc into the scheduler's queue: the tree lacks at most deflect_tokens of its prompt, so it is computed
                 here. Nothing travels, and who runs waits for a step that computes so many tokens. The prefill engine is told

If pages run out later, the scheduler retracts as always, and the prompt is then computed here: this engine has the model, too. Who
is retracted waits for the pages of those above: nothing is reserved meanwhile, so that they become fewer, and no adapter's place
is kept for it, so that they can go on. So it waits for no more than those who have pages at that moment.
SGLang 0.5.23: DecodePreallocQueue and DecodeTransferQueue in srt/disaggregation/decode.py; there what is retracted is copied to
the CPU and comes back.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np

from ch07_sglang_radix.disaggregation import orders
from ch07_sglang_radix.disaggregation.bootstrap import ask_route, refuse_another
from ch07_sglang_radix.disaggregation.held import Held
from ch07_sglang_radix.disaggregation.kv_manager import KVManager
from ch07_sglang_radix.disaggregation.rooms import DEFLECTED, State
from ch07_sglang_radix.disaggregation.side import Passage, Side
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler import TPScheduler
from common.sampling.logprobs import TokenLogprobs

ASKED_AT_ONCE = 8  # bootstrap servers: fewer that do not answer do not hold up the others


class Decode(Side):
    """mine: what this engine is, to be compared with a prefill engine's route (bootstrap.py). deflected: how many prompts were."""

    stages = ("prealloc", "transfer", "arrived")
    polled = ("transfer",)
    waits_in: ClassVar[dict[str, str]] = {
        "prealloc": "no pages were free for this prompt, or the prefill engine has not said where it is",
        "transfer": "not all pages of this prompt have come from the prefill engine",
    }  # fmt: skip

    def __init__(
        self, scheduler: TPScheduler, manager: KVManager, timeout: float, reserved_tokens: int, deflect_tokens: int,
        mine: dict[str, Any],
    ):  # fmt: skip
        super().__init__(scheduler, manager, timeout)
        self.reserved_tokens, self.deflect_tokens, self.mine = reserved_tokens, deflect_tokens, mine
        self.deflected = 0
        self._held_up = False  # somebody who has all pages waits for a place for an adapter
        self._asking = ThreadPoolExecutor(
            ASKED_AT_ONCE, "bootstrap"
        )  # an answer may take seconds, and a step milliseconds
        self._numbering = threading.Lock()
        self._routes: dict[tuple[str, int], Future[int]] = {}  # where a bootstrap server is -> the number of its engine
        self._engines: list[list[str]] = []  # their ranks' addresses
        self._met: set[int] = set()
        self._slots = iter(range(1 << 62))

    def begin(self, one: Passage) -> None:
        where = one.host, one.port
        known = self._routes.get(where)
        lost = known and known.done() and (known.exception() or not self._is_there(known.result()))
        if known is None or lost:
            self._routes[where] = self._asking.submit(self._meet, *where)

    def _is_there(self, engine: int) -> bool:
        return engine not in self._met or self.manager.knows(engine)

    def _meet(self, host: str, port: int) -> int:
        """In a thread. Raises ValueError if nobody is there, or somebody else than it should be."""
        route = ask_route(host, port)
        refuse_another(self.mine, route, f"{host}:{port}")
        with self._numbering:
            self._engines.append([str(address) for address in route["addresses"]])
            return len(self._engines) - 1

    def before_poll(self) -> None:
        for req in self.scheduler.waiting:
            req.passed_over = 0  # else a gate would keep it a place, and close for those who hold the pages it lacks
        for one in [one for one in self.passages.values() if one.req.ended]:
            if one.stage != "prealloc" or self._routes[one.host, one.port].done():  # else nobody could be told yet
                self.fail(one, "the request was aborted on the decode side")
        self._run_arrived()
        for one in [one for one in self.passages.values() if one.stage == "prealloc" and not one.req.ended]:
            route = self._routes[one.host, one.port]
            if not route.done():
                continue
            if error := route.exception():
                self.fail(one, str(error))
            elif self.scheduler.waiting or self.scheduler.chunked:  # retracted ones, or deflected: they came first
                break
            elif self._lacks_little(one.req):
                self._deflect(one)
            elif not self._reserve(one, route.result()):
                break

    def move(self, one: Passage, state: State) -> None:
        if state is State.SUCCESS:
            one.move("arrived")
            self._run_arrived()

    # --- prealloc

    def _reserve(self, one: Passage, engine: int) -> bool:
        """Pages for what the tree has not, and the order to all ranks; False if there are too few."""
        memory, req = self.memory, one.req
        match = memory.tree.match_prefix(req.all_ids, req.extra_key)
        memory.tree.inc_lock_ref(match.last_node)  # first: what is locked cannot be evicted for what is missing
        missing = memory.whole_pages(len(req.prompt_ids)) - len(match.slots)
        others = [
            *self.scheduler.running,
            *(other.req for other in self.passages.values() if other.room in self.held.of),
        ]
        growth = sum(map(self._will_grow, others))
        room = memory.obtainable_slots()
        if missing > room or (others and missing + growth + self._will_grow(req) > room):
            memory.tree.dec_lock_ref(match.last_node)
            return False
        own = memory.take(missing // memory.page_size)
        self.held.of[one.room] = Held(np.concatenate((match.slots, own)), len(match.slots), match.last_node)
        self._introduce(engine)
        first, digest = len(match.slots) // memory.page_size, self.digest(req)
        pages = self.held.pages(one.room)[first:]
        self.order(orders.RESERVE, one.room, engine, next(self._slots), first, digest, *pages)
        one.engine = engine
        one.move("transfer")
        return True

    def _introduce(self, engine: int) -> None:
        if engine not in self._met:
            self._met.add(engine)
            self.order(orders.MEET, engine, *orders.as_words(" ".join(self._engines[engine])))

    def _lacks_little(self, req: Req) -> bool:
        """Few tokens, and nothing else: in the queue it stands before all that are in prealloc. Who wants an adapter goes the long
        way while somebody waits for a place for one, as in `_run_arrived`."""
        if not self.deflect_tokens or (self._held_up and req.lora_id):
            return False
        match = self.memory.tree.match_prefix(req.matchable_ids, req.extra_key)
        return len(req.prompt_ids) - len(match.slots) <= self.deflect_tokens and self._passes(req)

    def _deflect(self, one: Passage) -> None:
        self.deflected += 1
        self._turn_away(one, DEFLECTED)
        self.leave(one)
        self.scheduler.elsewhere.remove(one.req)
        self.scheduler.waiting.append(one.req)

    def _turn_away(self, one: Passage, why: str) -> None:
        """What has reserved nothing has no link by which the other side would hear of it."""
        engine = self._routes[one.host, one.port].result()
        self._introduce(engine)
        self.order(orders.TURN_AWAY, one.room, engine, *orders.as_words(why))

    def fail(self, one: Passage, why: str) -> None:
        route = self._routes[one.host, one.port]
        if one.stage == "prealloc" and route.done() and not route.exception():
            self._turn_away(one, why)
        super().fail(one, why)

    def _will_grow(self, req: Req) -> int:
        return min(req.max_len - req.seq_len, self.reserved_tokens)

    # --- arrived

    def _run_arrived(self) -> None:
        """Whoever can."""
        self._held_up = False
        for one in [one for one in self.passages.values() if one.stage == "arrived"]:
            req = one.req
            if not self.memory.rows.num_free:
                return
            if (req.params.grammar and not req.grammar) or (self._held_up and req.lora_id):
                continue
            if self._passes(req):
                self._run(one)
            else:
                self._held_up = True

    def _passes(self, req: Req) -> bool:
        """Its grammar is there, and a place for its adapter."""
        return all(gate(req, 0) for gate in self.scheduler.admission.gates)

    def _run(self, one: Passage) -> None:
        """What a prefill step would have left behind, without one: a row, pages, the first token."""
        s, memory, req = self.scheduler, self.memory, one.req
        metadata, held = self.manager.metadata_of(one.room), self.held.of.pop(one.room)
        s.elsewhere.remove(req)
        req.row, req.last_node, req.prefix_len = memory.rows.alloc(), held.last_node, held.prefix_len
        req.kv_len, req.allocated_len, req.sent_len = len(req.prompt_ids), len(held.slots), 0
        req.cached_tokens, req.seed = metadata.cached_tokens, metadata.seed
        memory.rows.req_to_token[req.row, : len(held.slots)] = held.slots
        memory.share(req)
        self.order(
            orders.BEGIN, req.row, metadata.token, req.pictures.shift(len(req.prompt_ids)) if req.pictures else 0
        )
        self.leave(one)
        self._tell_all([])  # before a step that feeds the token in
        req.wanted -= 1
        req.prompt_logprobs += map(_told, metadata.prompt_logprobs)
        s.running.append(req)
        s.outcome.take([(req, metadata.token, _told(metadata.logprobs[0]) if metadata.logprobs else None)])

    def counts(self) -> dict[str, Any]:
        return super().counts() | {"deflected": self.deflected}


def _told(values: Sequence[Any]) -> TokenLogprobs:
    return TokenLogprobs(*values)
