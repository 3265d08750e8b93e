"""Who gets into the next prefill step, and with how many tokens of its prompt.

SGLang's PrefillAdder: one is made for each step and asked request by request, in the order of the schedule policy.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import numpy as np

from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import MatchResult, RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory

CLIP_MAX_NEW_TOKENS = 4096  # admission does not reserve more than this for one request
IN_BATCH_PREFIX = 32  # tokens shared with a prompt of this very step that are worth a step's wait


class Answer(Enum):
    ADDED = "added"
    LATER = "later"  # not in this step, but the next request may be
    HELD = "held"  # the same, for a reason from outside: a gate is closed
    FULL = "full"  # nobody else either


class Gate(Protocol):
    """May a waiting request enter in this step? Asked before anything is reserved for it."""

    def __call__(self, req: Req, matched: int) -> bool:
        """`matched`: tokens of it that the tree has. False: not now, and the next one is asked."""
        ...


class InBatchPrefix:
    """The adder's own gate: who could share a prompt that this very step computes waits a step, and hits.

    A tree of what the step computes, without pages behind it.
    """

    def __init__(self, page_size: int, disable: bool):
        self._computing = RadixCache(TokenToKVPool(page_size=page_size), disable=disable)

    def __call__(self, req: Req, matched: int) -> bool:
        computed_now = len(self._computing.match_prefix(req.all_ids[:-1], req.extra_key).slots)
        return computed_now - matched < IN_BATCH_PREFIX

    def computes(self, req: Req, length: int) -> None:
        """The step computes `req` up to there."""
        known = req.all_ids[:length]
        self._computing.insert(known, np.zeros(len(known), dtype=np.int64), req.extra_key)


class PrefillAdder:
    """batch: [(request, tokens to compute)] so far; chunked: the one whose prompt is computed in part, if any.

    budget: tokens of the step. promised: slots that running requests will probably still need. small_share: so much of
    the budget a long prompt's chunk leaves to waiting requests that fit into it as a whole. gates: who else is asked.
    """

    def __init__(
        self, memory: RequestMemory, budget: int, promised: float, waiting: list[Req], small_share: float,
        gates: Sequence[Gate] = (),
    ):  # fmt: skip
        self.memory, self.tree, self.page_size = memory, memory.tree, memory.page_size
        self.budget, self.promised = budget, promised
        self.batch: list[tuple[Req, int]] = []
        self.chunked: Req | None = None
        share = int(budget * small_share)
        self._for_small = min(share, sum(req.seq_len for req in waiting if req.seq_len <= share)) if share else 0
        self._in_batch = InBatchPrefix(self.page_size, self.tree.disable)
        self._gates = gates

    def add_chunk(self, req: Req, limit: int | None = None) -> None:
        """The next part of a prompt that was begun before, `limit` tokens at most: it goes first.

        Its place was reserved then, but against a share of what others might need only. Where they took more, the part is
        as long as there are pages, perhaps nothing: the others go on, and leave.
        """
        self._take(req, limit)

    def add(self, req: Req) -> Answer:
        """Admit `req` if a place, tokens of the budget and, probably, the pages for its whole answer are there."""
        if self.budget <= 0 or self.memory.rows.num_free == 0:
            return Answer.FULL
        match = self.memory.match(req)
        found = len(match.slots) + match.host_hit_length
        new = req.seq_len - found
        if (self.chunked and new > self.budget) or not self._in_batch(req, found):
            return Answer.LATER  # one prompt in parts is enough; what is being computed need not be computed twice
        if not all(gate(req, found) for gate in self._gates):
            return Answer.HELD
        if new > self.budget and self.budget < self.page_size:
            return Answer.FULL  # not even a chunk of one page
        if (answer := self._reserve(req, match)) is not Answer.ADDED:
            return answer
        if req.cached_tokens is None:  # not again after a retraction: it would find its own tokens
            req.cached_tokens = req.kv_len
        self._take(req)
        return Answer.ADDED

    def _reserve(self, req: Req, match: MatchResult) -> Answer:
        """Give the request its row, if the pool will probably hold its whole answer, and all that is cached of it is there.

        SGLang's rule: what it needs against what is free or evictable, less what the running requests will
        still need, a share new_token_ratio of their worst case, and what this step has promised already.
        """
        self.tree.inc_lock_ref(match.last_node)  # first: locking may shrink what is evictable
        worst = req.seq_len + min(req.max_len - req.seq_len, CLIP_MAX_NEW_TOKENS)
        if (
            self.memory.whole_pages(worst) - self.memory.whole_pages(len(match.slots))
            > self.memory.obtainable_slots() - self.promised
        ):
            self.tree.dec_lock_ref(match.last_node)
            return Answer.FULL
        if match.host_hit_length:
            there = self.tree.load_back(match, req)
            self.tree.dec_lock_ref(match.last_node)
            return self._reserve(req, self.memory.match(req)) if there else Answer.HELD
        self.memory.admit(req, match)
        return Answer.ADDED

    def _take(self, req: Req, limit: int | None = None) -> None:
        """Slots for the next part of its prompt. A chunk ends at a page's end and leaves room for small requests."""
        n, room = req.seq_len - req.kv_len, self.memory.obtainable_slots() + req.allocated_len - req.kv_len
        most = self.budget if limit is None else limit
        if n > min(most, room):
            most = min(most, max(self.budget - self._for_small, self.page_size))
            n = max((req.kv_len + min(most, room)) // self.page_size * self.page_size - req.kv_len, 0)
            self.chunked = req
        if n == 0:
            self.budget = 0
            return
        self.memory.grow(req, req.kv_len + n)
        self.batch.append((req, n))
        self.budget -= n
        self.promised += req.max_len - req.seq_len
        self._in_batch.computes(req, req.kv_len + n)
