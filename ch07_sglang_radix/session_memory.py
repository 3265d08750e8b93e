"""K and V that a streaming session keeps between its turns: pinned, and not the tree's.

    turn 1 ends         all of it but the last token   -> the session's: a locked path of the tree, and pages of its own
    turn 2 begins       its prompt is all of that, and more: it goes on where the session's tokens end, in the middle of a page
    turn 2 is aborted   back to where turn 1 ended: what it computed is given up, the rest is the session's again

The tree gives a later turn what has not been evicted by then, and whole pages of it. A session keeps all of it, also with a
disabled tree, for a price: nobody else can have these pages, however long the next turn does not come. But nobody starves:
where no request could go on otherwise, the session that is idle for longest loses what it keeps, and its next turn computes
it again. SGLang 0.5.23: srt/session/streaming_session.py, SessionSlot; there a session also keeps its row of req_to_token, and
an aborted turn costs it all its K and V.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.radix_cache import MatchResult, RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.tree_node import TreeNode


@dataclass(frozen=True, eq=False)
class SessionSlot:
    """ids [n]: tokens whose K and V are there, of the namespace extra_key. slots [n, filled up to whole pages]: the first
    prefix_len of them are the tree's, on the path to last_node, which is locked; the others are the session's own."""

    ids: np.ndarray
    extra_key: Hashable
    slots: np.ndarray
    prefix_len: int
    last_node: TreeNode


class SessionMemory:
    """Between two turns a session has a slot, in a turn the request has all of it."""

    def __init__(self, pool: TokenToKVPool, rows: ReqToTokenPool, tree: RadixCache):
        self.pool, self.rows, self.tree, self.page_size = pool, rows, tree, pool.page_size
        self.slots: dict[str, SessionSlot] = {}  # by the session's name, the longest idle first

    def match(self, req: Req) -> MatchResult | None:
        """What its session keeps of its tokens; None if that is no more than the tree has. Nothing changes."""
        slot = self.slots.get(req.session)
        if slot is None or slot.extra_key != req.extra_key:
            return None
        ids = req.matchable_ids[: len(slot.ids)]
        differ = np.flatnonzero(ids != slot.ids[: len(ids)])
        n = int(differ[0]) if len(differ) else len(ids)
        return MatchResult(slot.slots[:n], slot.last_node, n - slot.prefix_len) if n > slot.prefix_len else None

    def take(self, req: Req, match: MatchResult) -> np.ndarray:
        """Its turn begins with what was matched, and has a lock of its own: returns the slots, filled up to whole pages."""
        slot = self.slots.pop(req.session, None)
        if slot is None:
            return match.slots
        end = self._whole_pages(len(match.slots)) if match.kept else slot.prefix_len
        self._let_go(slot, end)
        return slot.slots[:end] if match.kept else match.slots

    def keep(self, req: Req, length: int) -> None:
        """Its turn is over, or goes back to where it began: the first `length` tokens are the session's, the rest is free."""
        self.forget(req.session)
        row, end = self.rows.req_to_token[req.row], self._whole_pages(length)
        self.pool.free(row[end : req.allocated_len])
        ids = req.all_ids[:length].copy()
        self.slots[req.session] = SessionSlot(ids, req.extra_key, row[:end].copy(), req.prefix_len, req.last_node)

    def close(self, name: str, unfinished: Sequence[Req]) -> None:
        """A turn that still runs goes on, as a request of no session."""
        self.forget(name)
        for req in unfinished:
            if req.session == name:
                req.session, req.committed_len = None, 0

    def forget(self, name: str) -> None:
        """What it keeps is free, or evictable."""
        if slot := self.slots.pop(name, None):
            self._let_go(slot, slot.prefix_len)

    def forget_oldest(self) -> bool:
        """Make room at the cost of the session that is idle for longest; False if none keeps anything."""
        name = next(iter(self.slots), None)
        if name is not None:
            self.forget(name)
        return name is not None

    def forget_all(self) -> None:
        for name in list(self.slots):
            self.forget(name)

    def _let_go(self, slot: SessionSlot, end: int) -> None:
        """Of the path in the tree, and of the pages from `end` on."""
        self.pool.free(slot.slots[end:])
        self.tree.dec_lock_ref(slot.last_node)

    # --- for whoever counts

    def owners(self) -> Iterator[tuple[str, np.ndarray]]:
        """(who it is, [pages it owns]); what is not in the tree alone."""
        for name, slot in self.slots.items():
            yield f"session {name}", slot.slots[slot.prefix_len :: self.page_size] // self.page_size

    @property
    def held_slots(self) -> int:
        """SGLang's session_held."""
        return sum(len(slot.slots) - slot.prefix_len for slot in self.slots.values())

    def _whole_pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size) * self.page_size
