"""A radix tree whose nodes may lie on the device, in the host's memory, or in both: what is evicted stays to be found.

    root
     `- 1 2 3 4     device 8 9 10 11    host 0 1 2 3     a copy in each tier: eviction costs nothing
         |- 5 6     device 12 13        host -           only computed so far
         `- 7 8     device -            host 4 5         evicted: a request that comes this way has it copied back

`value` are slots of the device, `host_value` slots of the host; a node without slots of a tier has none (length 0) there, and a
node without any is no node. The device's part of every path comes first: a child is never on the device without its parent.

    write_through              a node is copied to the host as soon as it is computed
    write_through_selective    once a second request has come for it
    write_back                 when the device evicts it

Only rank 0 has a tree. What it decides, all ranks do (cache_controller.py), in its order; so the tree may count a copy as done when
it is ordered: whoever uses its pages next is sent after it. SGLang 0.5.23: srt/mem_cache/hiradix_cache.py; there every rank has a
tree, nodes are locked while they are copied, and ranks ask each other which copies are done.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ch07_sglang_radix.eviction import EvictionLine
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.quantization.cache_controller import LOAD, STORE, HiCacheController
from ch07_sglang_radix.radix_cache import NO_SLOTS, MatchResult, RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.tree_node import TreeNode

LOAD_BACK_THRESHOLD = 10  # fewer tokens are computed; SGLang's
HITS = {"write_through": 1, "write_through_selective": 2, "write_back": None}  # after which a node is copied


class TieredNode(TreeNode):
    """load, store: tickets of the newest copies to and from its device pages, 0 for none. from_storage: its host copy was read
    from a disk."""

    __slots__ = ("from_storage", "hashes", "host_value", "load", "store")

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.host_value = NO_SLOTS
        self.load = self.store = 0
        self.from_storage = False
        self.hashes: list[bytes] | None = None  # of its pages, once somebody has asked (storage.py)


class HiRadixCache(RadixCache):
    """`connect` it to the host's pages before anything is inserted."""

    node_class = TieredNode

    def connect(
        self, controller: HiCacheController, num_host_pages: int, write_policy: str, idle: Callable[[], bool]
    ) -> None:
        """idle: is nobody running who would wait for a copy?"""
        self.controller, self.host_pool = controller, TokenToKVPool(num_host_pages, self.page_size)
        self.write_policy, self._idle = write_policy, idle
        self.backed_up: list[Callable[[TieredNode], None]] = []  # called with each node that has just got a host copy
        self.more_host_owners: list[
            Callable[[], Iterator[tuple[str, np.ndarray]]]
        ] = []  # who owns host pages besides nodes
        self.dropped: list[Callable[[], None]] = []  # called when every host copy is forgotten
        self.host_evicted = self.loaded = self.stored = 0  # slots since the beginning
        self._dropping = False
        self._host_leaves = EvictionLine(self._rank, self._host_evictable, self.nodes)

    # --- what is found

    def match_prefix(self, ids: Sequence[int], extra_key: Hashable = None) -> MatchResult:
        """slots and last_node are the device's; what the host alone has of it comes behind them."""
        match = super().match_prefix(ids, extra_key)
        below = list(self._below(match.last_node))
        length = sum(len(node.key) for node in below)
        if length == 0:
            return match
        on_device = below[-1].parent
        if length < LOAD_BACK_THRESHOLD:
            return replace(match, last_node=on_device)
        return replace(match, last_node=on_device, host_hit_length=length, last_host_node=match.last_node)

    def _below(self, node: TieredNode) -> Iterator[TieredNode]:
        """From `node` upwards, those without slots on the device."""
        while node.parent is not None and not len(node.value):
            yield node
            node = node.parent

    def load_back(self, match: MatchResult, req: Req) -> bool:
        """Have the host's part of a match on the device again. True: match again. False: it is on its way.

        The caller has locked match.last_node and seen to it that there is room.
        """
        nodes = list(self._below(match.last_host_node))[::-1]
        self.inc_lock_ref(match.last_host_node)  # first: what is evicted for it may need room in the host, too
        missing = match.host_hit_length // self.page_size - self.pool.num_free_pages
        if missing > 0:
            self.evict(missing * self.page_size)
        slots = self.pool.alloc(match.host_hit_length // self.page_size)
        self.dec_lock_ref(match.last_host_node)
        if slots is None:
            raise AssertionError(f"{match.host_hit_length} slots are needed for a load: admission failed")
        ticket = self.controller.load(self._pages([node.host_value for node in nodes]), self._pages([slots]))
        for node in nodes:
            own, slots = slots[: len(node.key)], slots[len(node.key) :]
            self._fill(node, own)
            node.load = ticket
            req.count_cached("storage" if node.from_storage else "host", len(own))
        self.loaded += match.host_hit_length
        if self._idle():
            self.controller.join(ticket)
        return ticket <= self.controller.joined

    def is_there(self, req: Req) -> bool:
        """Of what the device has of a request, is nothing still being copied there?"""
        if not self.controller.loading:
            return True
        node = self.match_prefix(req.matchable_ids, req.extra_key).last_node
        while node.parent is not None:
            if node.load > self.controller.joined:
                return False
            node = node.parent
        return True

    # --- what is kept

    def insert(
        self, ids: Sequence[int], value: np.ndarray, extra_key: Hashable = None, priority: int = 0,
        inserted_len: int = 0,
    ) -> int:  # fmt: skip
        known = super().insert(ids, value, extra_key, priority, inserted_len)
        hits = HITS[self.write_policy]
        if hits and not self.disable:
            for node in self._path(ids, extra_key):
                if not len(node.host_value) and (node.hit_count < hits or not self._back_up(node)):
                    break  # nor what is behind it: a copy is of use with all that comes before it alone
        return known

    def _path(self, ids: Sequence[int], extra_key: Hashable) -> Iterator[TieredNode]:
        """The nodes of what has just been inserted."""
        node, key = self.root, self.key(ids)
        while len(key):
            node = node.children[self._name(key, extra_key)]
            yield node
            key = key[len(node.key) :]

    def _duplicates(self, node: TieredNode, value: np.ndarray) -> int:
        """What the host alone had is computed again, and is the tree's."""
        if len(node.value):
            self._join(node.load)  # whoever inserts goes on with these slots
            return len(value)
        self._fill(node, value)
        return 0

    def _fill(self, node: TieredNode, slots: np.ndarray) -> None:
        node.value = slots.copy()
        if node.lock_ref:
            self.protected_size += len(slots)
        else:
            self.evictable_size += len(slots)
        self._offer(node)

    def _split(self, node: TieredNode, n: int) -> TieredNode:
        upper = super()._split(node, n)
        upper.load, upper.store, upper.from_storage = node.load, node.store, node.from_storage
        upper.host_value, node.host_value = node.host_value[:n], node.host_value[n:]
        if node.hashes is not None:
            pages = n // self.page_size
            upper.hashes, node.hashes = node.hashes[:pages], node.hashes[pages:]
        return upper

    def _back_up(self, node: TieredNode) -> bool:
        """Copy it to the host; False if there is no room."""
        slots = self.take_host(len(node.key) // self.page_size)
        if slots is None:
            return False
        node.host_value, node.from_storage = slots, False
        node.store = self.controller.store(self._pages([node.value]), self._pages([slots]))
        self.stored += len(slots)
        for call in self.backed_up:
            call(node)
        return True

    def deepest(self, key: np.ndarray, extra_key: Hashable) -> tuple[TieredNode, int]:
        """Where the longest prefix ends that any tier has, and how long it is."""
        node = last = super().match_prefix(key, extra_key).last_node
        length = 0
        while node.parent is not None:
            node, length = node.parent, length + len(node.key)
        return last, length

    def insert_host(self, key: np.ndarray, start: int, slots: np.ndarray, extra_key: Hashable) -> None:
        """slots [n] of the host hold key[start : start + n] now, read from a disk: the tree's, as far as it has them not."""
        key = key[: start + len(slots)]
        node, known = self.deepest(key, extra_key)
        if known < start:  # what they go on from has been forgotten
            known = start + len(slots)
        self.host_pool.free(slots[: known - start])
        if known < len(key):
            new = TieredNode(key[known:].copy(), NO_SLOTS, node, next(self._clock), 0, extra_key)
            new.host_value, new.from_storage = slots[known - start :].copy(), True
            node.children[self.name_of(new)] = new
            self._offer(new)

    # --- what goes

    def _without_slots(self, leaf: TieredNode) -> None:
        """The device has evicted it: the host's copy stays; without one it goes, and what the host has behind it."""
        if HITS[self.write_policy] is None and not len(leaf.host_value) and not self._dropping:
            self._back_up(leaf)
        self._join(max(leaf.load, leaf.store))  # whoever gets its pages comes after these copies
        leaf.value = NO_SLOTS
        if len(leaf.host_value):
            self._offer(leaf)
        else:
            self._drop(leaf)

    def _join(self, ticket: int) -> None:
        if ticket > self.controller.joined:
            self.controller.join(ticket)

    def take_host(self, pages: int) -> np.ndarray | None:
        """[pages * P] slots of the host, for which others are forgotten; None, and nothing is, if too few may go."""
        if not self._may_go(pages - self.host_pool.num_free_pages):
            return None
        while self.host_pool.num_free_pages < pages and (leaf := self._host_leaves.next()):
            self.host_evicted += len(leaf.host_value)
            parent = leaf.parent
            self._drop(leaf)
            self._offer(parent)
        return self.host_pool.alloc(pages)

    def _may_go(self, pages: int) -> bool:
        """Does the host alone hold so many that nobody has locked? Who holds a node holds all above it, and the device's part of a
        path comes first: so what is below such a node may go before it."""
        for node in self.nodes() if pages > 0 else ():
            if not len(node.value) and node.lock_ref == 0:
                pages -= len(node.host_value) // self.page_size
                if pages <= 0:
                    break
        return pages <= 0

    def _drop(self, node: TieredNode) -> None:
        """Out of the tree, and all below it: nothing of it is on the device."""
        self._take_out(node)
        going = [node]
        while going:
            one = going.pop()
            going += one.children.values()
            one.children, one.parent = {}, None
            self.host_pool.free(one.host_value)
            one.host_value = NO_SLOTS

    def flush(self) -> None:
        self.drop_host()
        self.controller.forget(
            LOAD
        )  # nobody is left who waits for it, and the device's pages may go (memory_occupation.py)
        super().flush()

    def set_apart(self, mark: Hashable) -> None:
        self.drop_host()
        super().set_apart(mark)

    def drop_host(self) -> None:
        """Every host copy is forgotten, also one that is only ordered, and what has no other."""
        self.controller.forget(STORE)
        self._join(self.controller.newest)
        for call in self.dropped:
            call()
        for node in list(self.nodes()):
            self.host_pool.free(node.host_value)
            node.host_value = NO_SLOTS
        for node in list(self.nodes()):  # parents first: with one goes all below it
            if node.parent is not None and not len(node.value):
                self._drop(node)

    def _evict_all(self) -> None:
        self._dropping = True  # nothing is written back that nobody may find
        super()._evict_all()
        self._dropping = False

    # --- small things

    def host_owners(self) -> Iterator[tuple[str, np.ndarray]]:
        """(who it is, [host pages it owns]), but for the free list."""
        for node in self.nodes():
            yield f"node {node.key[:4].tolist()}...", self._pages([node.host_value])
        for more in self.more_host_owners:
            yield from more()

    def sound(self, node: TieredNode) -> bool:
        """Of each tier all its tokens or none, and the device's part of a path comes first."""
        here, there, all_of_it = len(node.value), len(node.host_value), len(node.key)
        above = node.parent is self.root or len(node.parent.value) > 0
        return {here, there} <= {0, all_of_it} and here + there > 0 and (above or not here)

    def _evictable(self, node: TieredNode) -> bool:
        return (
            node.parent is not None and len(node.value) > 0 and node.lock_ref == 0
            and not any(len(child.value) for child in node.children.values())
        )  # fmt: skip

    def _host_evictable(self, node: TieredNode) -> bool:
        return node.parent is not None and not len(node.value) and not node.children and node.lock_ref == 0

    def _offer(self, node: TieredNode) -> None:
        super()._offer(node)
        self._host_leaves.offer(node)

    def _pages(self, slots: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(slots)[:: self.page_size] // self.page_size
