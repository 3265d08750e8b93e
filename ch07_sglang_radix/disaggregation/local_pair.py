"""Both halves in one process, one rank each, stepped in turn over a real TCP link: for demos and tests, which look inside.

`gate` holds the bytes of pages back while it is closed; the messages between them wait with them, as on a slow wire.
`bytes_per_s` makes the wire slow: a link's thread carries one payload after another, and holds each back for as long as its
bytes take. So it is this host's real connection, slowed; without that a host has one speed, that of its memory.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from math import inf
from typing import Any

from ch07_sglang_radix.disaggregation.attach import Disaggregation
from ch07_sglang_radix.disaggregation.tcp import TcpLink, TcpTransport
from ch07_sglang_radix.disaggregation.transport import Handler, Transport
from ch07_sglang_radix.handoff import Handoff
from ch07_sglang_radix.invariants import check_invariants
from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.models.lora_manager import LoRAOptions
from common.sampling.params import SamplingParams
from common.vision.pictures import Pictures

ROWS = 4
PATIENCE_S = 30.0
FIRST_ROOM = 1001

Asked = tuple[int, dict[str, int]]  # the room, and each half's number of the request


@cache
def _wrapper(
    mode: str, folder: str | None, page_size: int, pool: int, kv_cache_dtype: str, lora: LoRAOptions | None
) -> TPRadixAttentionModelWrapper:
    """Loaded once: a new scheduler finds all pages free, whatever lies on them."""
    return TPRadixAttentionModelWrapper(
        folder, "cpu", page_size, max_total_tokens=pool, max_running_requests=ROWS, kv_cache_dtype=kv_cache_dtype, lora=lora,
        skip_tokenizer_init=folder is not None,
    )  # fmt: skip


class Half:
    """One engine. Conservation is checked after each of its steps. reserved, deflect: num_reserved_decode_tokens and
    disaggregation_deflect_tokens. transport: another one, which has no gate and no slow wire. folder, lora: another model, with
    room for adapters. attach: what other wings have to do with the scheduler. options: TPScheduler's."""

    def __init__(
        self, mode: str, gate: threading.Event, page_size: int = 4, pool: int = 512, timeout: float = 20.0,
        reserved: int = 8, deflect: int = 0, kv_cache_dtype: str = "auto", transport: Callable[[Handler], Transport] | None = None,
        folder: str | None = None, lora: LoRAOptions | None = None,
        attach: Callable[[TPScheduler], Any] = lambda scheduler: None, **options: Any,
    ):  # fmt: skip
        half = self
        self.bytes_per_s = inf  # of the wire by which its pages leave

        class Link(TcpLink):
            def _give_payload(self, payload: memoryview) -> None:
                gate.wait(PATIENCE_S)
                time.sleep(payload.nbytes / half.bytes_per_s)
                super()._give_payload(payload)

        class Gated(TcpTransport):
            link = Link

        self.mode = mode
        self.scheduler = TPScheduler(
            _wrapper(mode, folder, page_size, pool, kv_cache_dtype, lora), check=True, **options
        )
        attach(self.scheduler)
        args = ServerArgs(
            disaggregation_mode=mode, disaggregation_timeout=timeout, num_reserved_decode_tokens=reserved,
            disaggregation_deflect_tokens=deflect,
        )  # fmt: skip
        self.half = Disaggregation(self.scheduler, args, transport or Gated)
        self.manager, self.side = self.half.manager, self.half.side
        self.manager.log = []
        self.results: dict[int, RequestOutput] = {}

    def enqueue(
        self, handoff: Handoff, prompt: Sequence[int], *, lora_path: str | None = None, pictures: Pictures | None = None,
        **params: Any,
    ) -> int:  # fmt: skip
        params = {"max_new_tokens": 6, "ignore_eos": True} | params
        if self.mode == "prefill":
            params["max_new_tokens"] = 1
        sampling = SamplingParams(**params)
        handoff, more = handoff._replace(mode=self.mode), {"lora_path": lora_path, "pictures": pictures}
        return self.scheduler.enqueue(None, list(prompt), sampling, handoff=handoff, **more)

    def step(self) -> None:
        self.scheduler.step()
        self.results |= self.scheduler.results
        self.scheduler.results = {}

    def stage(self, room: int) -> str | None:
        """The queue in which it stands; None: in none."""
        one = self.side.passages.get(room)
        return one.stage if one else None

    @property
    def busy(self) -> bool:
        return bool(self.side.passages or self.scheduler.everybody or self.manager.rooms())

    def at_rest(self) -> bool:
        """Raises AssertionError if anything is on its way, or a page is neither free nor in the tree, unlocked."""
        s = self.scheduler
        check_invariants(s)
        left = (len(self.side.held.of), s.tree.protected_size, s.pool.size - s.pool.free_slots - s.tree.evictable_size)
        assert not self.busy, self.side.counts()
        assert left == (0, 0, 0), f"rooms that hold pages, locked slots, lost slots: {left}"
        assert s.req_to_token.num_free == ROWS
        return True


class Pair:
    """prefill, decode: Half's arguments."""

    def __init__(self, prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None):
        self.gate = threading.Event()
        self.gate.set()
        self.prefill = Half("prefill", self.gate, **(prefill or {}))
        self.decode = Half("decode", self.gate, **(decode or {}))
        self.halves: dict[str, Half] = {"prefill": self.prefill, "decode": self.decode}
        self._room = FIRST_ROOM

    def ask(
        self,
        prompt: Sequence[int],
        halves: Sequence[str] = ("prefill", "decode"),
        room: int | None = None,
        **params: Any,
    ) -> Asked:
        """A request to both halves, or to some, as a balancer would send it; in a room of its own if none is given."""
        if room is None:
            room, self._room = self._room, self._room + 1
        handoff = Handoff("", "127.0.0.1", self.prefill.half.bootstrap.port, room)
        return room, {name: self.halves[name].enqueue(handoff, prompt, **params) for name in halves}

    def sent(self, room: int) -> int:
        """Pages that prefill has sent so far."""
        one = self.prefill.side.passages.get(room)
        return one.sent if one else 0

    def step(self) -> None:
        for half in self.halves.values():
            half.step()

    def until(self, what: Callable[[], Any]) -> None:
        """Step both until it is so."""
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < deadline, (self.prefill.side.counts(), self.decode.side.counts())
            self.step()

    def ended(self, asked: Asked, half: str) -> RequestOutput:
        """What has become of it there."""
        return self.halves[half].results[asked[1][half]]

    def answer(self, asked: Asked) -> RequestOutput:
        """Decode's, when both halves are done with it."""
        self.until(lambda: all(number in self.halves[name].results for name, number in asked[1].items()))
        return self.ended(asked, "decode")

    def in_transfer(self, asked: Asked) -> None:
        """Close the gate before: the prompt is computed, and its pages do not leave."""
        room = asked[0]
        self.until(lambda: self.prefill.stage(room) == "inflight" and self.decode.stage(room) == "transfer")

    def at_rest(self) -> bool:
        """Both, once nothing is left to do."""
        self.until(lambda: not any(half.busy for half in self.halves.values()))
        return all(half.at_rest() for half in self.halves.values())

    def close(self) -> None:
        self.gate.set()
        for half in self.halves.values():
            half.half.close()
