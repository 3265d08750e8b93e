"""What a request holds while it is admitted: a row, a locked path in the tree, pages of its own.

The scheduler says who gets and who gives; here is how. Slots of a row, from the left:

    0 .. prefix_len        the tree's, locked for this request
    .. kv_len              its own, with K and V in them
    .. allocated_len       its own, still empty (the rest of the last page)
    0 .. sent_len          known to every rank's page table
"""

from collections.abc import Callable, Sequence

import numpy as np

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.radix_cache import MatchResult, RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.session_memory import SessionMemory
from ch07_sglang_radix.tasks import PageUpdate


class RequestMemory:
    """Moves rows, locks and pages between the pools, the tree, the sessions and the requests."""

    def __init__(self, pool: TokenToKVPool, rows: ReqToTokenPool, tree: RadixCache):
        self.pool, self.rows, self.tree, self.page_size = pool, rows, tree, pool.page_size
        self.sessions = SessionMemory(pool, rows, tree)
        self.heirs: dict[
            Req, Callable[[Req], None]
        ] = {}  # who takes over what a request holds at its end, its row excepted

    def match(self, req: Req) -> MatchResult:
        """What need not be computed of it: its session has kept it, or the tree has it."""
        return self.sessions.match(req) or self.tree.match_prefix(req.matchable_ids, req.extra_key)

    def admit(self, req: Req, match: MatchResult) -> None:
        """Give it a row that starts with what was matched. The caller has locked `match.last_node`."""
        slots = self.sessions.take(req, match)
        req.row, req.last_node = self.rows.alloc(), match.last_node
        req.kv_len, req.allocated_len = len(match.slots), len(slots)
        req.prefix_len, req.committed_len = req.kv_len - match.kept, req.kv_len if match.kept else 0
        req.sent_len = 0
        self.rows.req_to_token[req.row, : len(slots)] = slots

    def grow(self, req: Req, length: int) -> None:
        """Slots for `length` tokens, evicting what it takes. The scheduler has seen to it that they exist."""
        pages = -(-(length - req.allocated_len) // self.page_size)
        if pages > 0:
            self._append(req, self.take(pages))

    def grow_by_a_page(self, reqs: Sequence[Req]) -> None:
        """One page more for each, taken at one go: decode steps do nothing else."""
        if reqs:
            for req, slots in zip(reqs, self.take(len(reqs)).reshape(-1, self.page_size), strict=True):
                self._append(req, slots)

    def take(self, pages: int) -> np.ndarray:
        """[pages * P] slots, evicting what it takes."""
        missing = pages - self.pool.num_free_pages
        if missing > 0:
            self.tree.evict(missing * self.page_size)
        slots = self.pool.alloc(pages)
        if slots is None:
            raise AssertionError(f"{pages} pages are needed, {self.pool.num_free_pages} are free: admission failed")
        return slots

    def _append(self, req: Req, slots: np.ndarray) -> None:
        self.rows.req_to_token[req.row, req.allocated_len : req.allocated_len + len(slots)] = slots
        req.allocated_len += len(slots)

    def give_back(self, reqs: Sequence[Req]) -> None:
        """The pages behind what is computed: a reserve for guesses (verify_step.py)."""
        for req in reqs:
            kept = self.whole_pages(req.kv_len)
            self.pool.free(self.rows.req_to_token[req.row, kept : req.allocated_len])
            req.allocated_len, req.sent_len = kept, min(req.sent_len, kept)

    def release(self, req: Req) -> None:
        """Take everything back from a request that returns to the queue, but what its session had; its outputs stay."""
        if req.committed_len:
            self.sessions.keep(req, req.committed_len)
        else:
            self.pool.free(self.rows.req_to_token[req.row, req.prefix_len : req.allocated_len])
            self.tree.dec_lock_ref(req.last_node)
        self.rows.free(req.row)
        req.row, req.last_node = -1, None
        req.prefix_len = req.cache_inserted_len = req.kv_len = req.allocated_len = req.sent_len = req.committed_len = 0

    def share(self, req: Req) -> None:
        """After a prefill, or a chunk of one: the tree gets what was computed, if the request does not go on where its session
        has ended: that is behind tokens which the tree has not."""
        if not req.committed_len:
            self.tree.cache_unfinished_req(req)

    def finish(self, req: Req) -> None:
        """Leave prompt and answer to its heir, its session, or the tree; take the rest back."""
        if req in self.heirs:
            self.heirs.pop(req)(req)
        elif req.session is not None:
            self.sessions.keep(req, req.kv_len)
        else:
            self.tree.cache_finished_req(req)
        self.rows.free(req.row)

    def flush(self) -> None:
        """Forget everything that no request uses."""
        self.sessions.forget_all()
        self.tree.flush()

    def obtainable_slots(self) -> int:
        """Free, or free after eviction."""
        return self.pool.free_slots + self.tree.evictable_size

    def slots_needed(self, reqs: Sequence[Req], steps: int) -> int:
        """Slots these requests lack for so many more tokens each (none beyond its own end)."""
        return sum(max(0, self.whole_pages(min(r.kv_len + steps, r.max_len)) - r.allocated_len) for r in reqs)

    def page_updates(self, reqs: Sequence[Req]) -> tuple[PageUpdate, ...]:
        """What the ranks' page tables do not know yet; afterwards they do."""
        updates = []
        for req in reqs:
            if req.sent_len < req.allocated_len:
                row = self.rows.req_to_token[req.row]
                pages = row[req.sent_len : req.allocated_len : self.page_size] // self.page_size
                updates.append(PageUpdate(req.row, req.sent_len // self.page_size, tuple(pages.tolist())))
                req.sent_len = req.allocated_len
        return tuple(updates)

    def tree_pages(self, req: Req) -> np.ndarray:
        """[n] page ids of its beginning that lies in the tree: no request writes to these."""
        return self.rows.req_to_token[req.row, : req.prefix_len : self.page_size] // self.page_size

    def whole_pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size) * self.page_size
