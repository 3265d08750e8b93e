"""Who may enter: the prompts that the next prefill step computes.

The schedule policy says in which order to ask, the prefill adder whether there is room; a gate may say "not now" before either
is asked, for a reason of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ch07_sglang_radix.policy_names import NO_CHUNKS
from ch07_sglang_radix.prefill_adder import Answer, Gate, PrefillAdder
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler_state import SchedulerState
from common.values import whole

NO_LIMIT = 1 << 62  # tokens of a step
DEFAULT_CHUNK = {"cpu": 1024, "cuda": 8192}  # tokens a step: on a CPU what its caches like, on a GPU SGLang's default


@dataclass(frozen=True)
class PrefillBatch:
    """reqs: (request, prompt tokens to compute). decodes: running requests that take part with a token each."""

    reqs: list[tuple[Req, int]] = field(default_factory=list)
    decodes: list[Req] = field(default_factory=list)


class Admission:
    """chunked_prefill_size, enable_mixed_chunk, small_request_share: those of TPScheduler. make_room: sees to it that every
    running request can have its next slot (retraction.py). gates: asked in order for each waiting request."""

    def __init__(
        self, state: SchedulerState, chunked_prefill_size: int, enable_mixed_chunk: bool, small_request_share: float,
        make_room: Callable[[], None],
    ):  # fmt: skip
        self.state, self.make_room = state, make_room
        self.budget = chunked_prefill_size if chunked_prefill_size > 0 else NO_LIMIT
        self.enable_mixed_chunk, self.small_request_share = enable_mixed_chunk, small_request_share
        self.gates: list[Gate] = []
        self.next_chunk: Callable[[int], int] | None = None  # of a prompt computed so far; None: as long as the first

    def next_prefill(self) -> PrefillBatch | None:
        """The chunked request first, then the queue in the policy's order; None if nobody can start."""
        s = self.state
        if not s.chunked and not (s.waiting and s.req_to_token.num_free):
            return None
        room = s.room_in_lane()
        if not s.chunked and room == 0:
            return None
        decodes, budget = self._decodes()
        promised = sum([req.wanted for req in s.running]) * s.new_token_ratio
        adder = PrefillAdder(s.memory, budget, promised, s.waiting, self.small_request_share, self.gates)
        ordered = s.policy.order(s.waiting, s.running)
        if s.chunked:
            adder.add_chunk(s.chunked, s.policy.chunk_limit(s.chunked, ordered, budget))
        s.held, s.resumed = {}, s.chunked
        for req in ordered:
            if room is not None and len(adder.batch) >= room:
                break
            first = req.cached_tokens is None  # it has not been in before, and gone back
            answer = adder.add(req)
            if answer is not Answer.ADDED:
                s.held[req.rid] = answer.value
            if answer is Answer.FULL:
                break
            if answer is Answer.ADDED and first and not req.probe:
                s.policy.admitted(req.kv_len, len(req.prompt_ids))
                s.front.served["prompt"] += len(req.prompt_ids)
                s.front.served["cached"] += req.kv_len
        s.chunked = adder.chunked
        if not adder.batch:
            return None
        s.policy.computed(sum(n for _, n in adder.batch))
        self._leave_the_queue({req for req, _ in adder.batch})
        s.last_prefill = adder.batch
        return PrefillBatch(adder.batch, decodes)

    def _decodes(self) -> tuple[list[Req], int]:
        """(running requests that take part in the step, tokens left for prompts)."""
        s, budget = self.state, self.budget
        if s.chunked and self.next_chunk:
            budget = self.next_chunk(s.chunked.kv_len)
        if not self.enable_mixed_chunk or not any(req.wanted for req in s.in_lane):
            return [], budget
        self.make_room()  # decodes of the step come first
        decodes = [req for req in s.in_lane if req.wanted]
        full = [req for req in decodes if req.kv_len == req.allocated_len]
        if full:
            s.memory.grow_by_a_page(full)
            s.forget_batches()  # even if nobody can start, and they decode by themselves: its pages have moved on without it
        return decodes, max(budget - len(decodes), s.page_size)

    def _leave_the_queue(self, added: set[Req]) -> None:
        """And count for those in front of them that they have been passed over."""
        waiting = self.state.waiting
        last = max((i for i, req in enumerate(waiting) if req in added), default=-1)
        for req in waiting[: last + 1]:
            req.passed_over += req not in added
        self.state.waiting = [req for req in waiting if req not in added]


def chunk_size(size: int | None, page_size: int, default: int) -> int:
    """chunked_prefill_size, or the default in whole pages. ValueError for parts that are no whole pages."""
    if size is None:
        return max(default // page_size, 1) * page_size
    size = whole("chunked_prefill_size", size, NO_CHUNKS)
    if size < 1 and size != NO_CHUNKS:
        raise ValueError(f"chunked_prefill_size={size} must be at least 1, or {NO_CHUNKS} for no limit")
    if size > 0 and size % page_size:
        below, above = size // page_size * page_size, -(-size // page_size) * page_size
        way_out = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"page_size={page_size} does not divide chunked_prefill_size={size}; use {way_out}")
    return size


def share_of_chunk(chunk: int, page_size: int, data_ranks: int) -> int:
    """A data rank's part of a step's prompt tokens, in whole pages; all of them together compute no more. SGLang divides alike."""
    if data_ranks == 1 or chunk == NO_CHUNKS:
        return chunk
    return max(chunk // data_ranks // page_size, 1) * page_size
