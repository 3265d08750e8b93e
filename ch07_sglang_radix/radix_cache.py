"""The radix tree: which token prefixes have their K and V in the pool, and where.

    insert [1 2 3 4], then [1 2 5]         each edge holds tokens and as many KV slots
    root                                   root
     `- 1 2 3 4                             `- 1 2
                                                |- 3 4
                                                `- 5

A request that starts with a path from the root needs none of that path computed again. Nodes in use by
running requests are locked (lock_ref > 0); the others are a cache and are evicted leaf by leaf, in the
order of a strategy (eviction.py). RadixAttention, Zheng et al. 2024 (SGLang), section 3.

Keys are cut to whole pages: a page is shared as a whole or not at all. One root serves all namespaces: a child is filed
under its first page and, if it has one, its extra_key, so a namespace that is used once leaves nothing behind. Rank 0
alone has a tree.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from ch07_sglang_radix.eviction import EvictionLine, pick_strategy
from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.tree_node import TreeNode, TreeUser

NO_SLOTS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class MatchResult:
    """slots [n] of the longest cached prefix, and the node it ends at: lock that node before anything is evicted.

    kept: so many at the end are not the tree's, but what the request's session has kept (session_memory.py).
    host_hit_length: so many tokens behind them lie in a lower tier alone, down to last_host_node: `load_back` brings them.
    """

    slots: np.ndarray
    last_node: TreeNode
    kept: int = 0
    host_hit_length: int = 0
    last_host_node: TreeNode | None = None


class RadixCache:
    """The tree over a TokenToKVPool. `disable=True` gives the same calls without any sharing.

    eviction: a name in eviction.py. bigram: keys are pairs of neighbouring tokens, as a draft model of
    EAGLE needs them, whose K and V at a position depend on the next token too; n tokens are n - 1 pairs then.
    extra_key, wherever it is taken, is a namespace (a LoRA adapter, a salt): equal tokens in two of them share nothing.
    Times are a counter's and not the clock's, so that runs repeat exactly.
    evictable_size and protected_size count slots, as do the arguments and results of all methods.

    A tree with more tiers (quantization/hiradix_cache.py) keeps nodes that have no slots any more; it says so in what a node is
    made of, in what becomes of the slots of known tokens, and in what is left when a node's slots go: three methods.
    """

    node_class = TreeNode

    def __init__(
        self, pool: TokenToKVPool, req_to_token: ReqToTokenPool | None = None, disable: bool = False,
        eviction: str = "lru", bigram: bool = False,
    ):  # fmt: skip
        self.pool, self.page_size, self.disable, self.bigram = pool, pool.page_size, disable, bigram
        self.req_to_token = req_to_token
        self.eviction, self._rank = eviction, pick_strategy(eviction)
        self._clock = count(1)
        self.inserted = self.evicted = self.splits = 0  # since the beginning, for traces
        self.reset()

    def reset(self) -> None:
        """Forget everything; the slots are not given back (see evict for that)."""
        self.root = self.node_class(NO_SLOTS, NO_SLOTS, None, 0)
        self.evictable_size = 0
        self.protected_size = 0
        self.leaves = EvictionLine(self._rank, self._evictable, self.nodes)

    # --- the tree

    def match_prefix(self, ids: Sequence[int], extra_key: Hashable = None) -> MatchResult:
        """The longest cached prefix of `ids`, floored to whole pages.

        Changes the tree in two ways: nodes on the path count as used now, and a node that matches only in
        part is split. Cap the ids at len - 1: at least one token must be computed to get logits.
        """
        node, slots, now = self.root, [], next(self._clock)
        key = self.key(ids)
        while len(key) and not self.disable:
            child = node.children.get(self._name(key, extra_key))
            if child is None:
                break
            self._touch(child, now)
            n = self._common_length(child.key, key)
            if n < len(child.key):
                child = self._split(child, n)
            slots.append(child.value)
            node, key = child, key[n:]
        return MatchResult(np.concatenate(slots) if slots else NO_SLOTS, node)

    def insert(
        self, ids: Sequence[int], value: np.ndarray, extra_key: Hashable = None, priority: int = 0,
        inserted_len: int = 0,
    ) -> int:  # fmt: skip
        """Put `ids` with their slots into the tree; returns how many of them were there already.

        The tree takes over the slots behind that point. The ones before it are duplicates: they stay with
        the caller, who must free those that are not the tree's own. Call it after the forward pass: before,
        another request could match slots with nothing in them.

        Every node on the way counts a hit, but for the first `inserted_len` tokens, which the same request has
        inserted before: so a request counts once wherever it goes, in the node that it creates too.
        """
        if self.disable:
            return 0
        key = self.key(ids)
        value = value[: len(key)]
        node, done, known, now = self.root, 0, 0, next(self._clock)
        while len(key):
            name = self._name(key, extra_key)
            child = node.children.get(name)
            if child is None:
                new = self.node_class(key.copy(), value.copy(), node, next(self._clock), priority, extra_key)
                node.children[name], new.hit_count = new, int(done + len(key) > inserted_len)
                self.evictable_size += len(key)
                self.inserted += len(key)
                self._offer(new)
                break
            self._touch(child, now)
            n = self._common_length(child.key, key)
            if n < len(child.key):
                child = self._split(child, n)
            known += self._duplicates(child, value[:n])
            node, key, value, done = child, key[n:], value[n:], done + n
            node.priority = max(node.priority, priority)
            node.hit_count += done > inserted_len
            self._offer(node)
        return known

    def _duplicates(self, node: TreeNode, value: np.ndarray) -> int:
        """The tokens of `node` come again, with other slots: so many of these the tree has no use for."""
        return len(value)

    def _split(self, node: TreeNode, n: int) -> TreeNode:
        """Cut a node after n tokens; the new parent inherits the lock, since every lock below goes through it.

        It inherits the hits too, but not the age: it is a new node, and FIFO counts from now on.
        """
        now = next(self._clock)
        upper = self.node_class(node.key[:n], node.value[:n], node.parent, now, node.priority, node.extra_key)
        upper.lock_ref, upper.hit_count = node.lock_ref, node.hit_count
        node.parent.children[self.name_of(upper)] = upper
        node.key, node.value, node.parent = node.key[n:], node.value[n:], upper
        upper.children[self.name_of(node)] = node
        self.splits += 1
        return upper

    def inc_lock_ref(self, node: TreeNode) -> None:
        """Protect the path from `node` to the root from eviction."""
        while node.parent is not None:
            if node.lock_ref == 0:
                self.evictable_size -= len(node.value)
                self.protected_size += len(node.value)
            node.lock_ref += 1
            node = node.parent

    def dec_lock_ref(self, node: TreeNode) -> None:
        """Undo one inc_lock_ref."""
        while node.parent is not None:
            if node.lock_ref == 0:
                raise ValueError(f"node {node.key[:8].tolist()} is unlocked more often than it was locked")
            node.lock_ref -= 1
            if node.lock_ref == 0:
                self.protected_size -= len(node.value)
                self.evictable_size += len(node.value)
                self._offer(node)
            node = node.parent

    def evict(self, num_slots: int) -> int:
        """Give back at least `num_slots` slots if that many are evictable; returns how many.

        Unlocked leaves go one at a time, in the strategy's order; a parent becomes a candidate when its
        last child has gone. The last node may be larger than needed.
        """
        evicted = 0
        while evicted < num_slots and (leaf := self.leaves.next()):
            self.pool.free(leaf.value)
            evicted += len(leaf.value)
            parent = leaf.parent
            self._without_slots(leaf)
            self._offer(parent)
        self.evictable_size -= evicted
        self.evicted += evicted
        return evicted

    def _without_slots(self, leaf: TreeNode) -> None:
        """Its slots are free: nothing is left of it."""
        self._take_out(leaf)

    def _take_out(self, leaf: TreeNode) -> None:
        del leaf.parent.children[self.name_of(leaf)]
        leaf.parent = None

    def flush(self) -> None:
        """Give everything back that nobody uses, and forget the rest."""
        self._evict_all()
        self.reset()

    def set_apart(self, mark: Hashable) -> None:
        """Give everything back that nobody uses; who comes from now on does not find the rest: each namespace in it becomes
        another, (mark, extra_key). Who holds a lock finds its path under that name, and leaves there what it computes.
        """
        self._evict_all()
        nodes = list(self.nodes())
        for node in nodes:
            node.extra_key = (mark, node.extra_key)
        for node in (self.root, *nodes):
            node.children = {self.name_of(child): child for child in node.children.values()}

    def _evict_all(self) -> None:
        """No eviction: nobody needed the room."""
        flushed = self.evict(self.pool.size)
        self.evicted -= flushed

    # --- the two moments in a request's life at which it and the tree trade slots

    def cache_unfinished_req(self, req: TreeUser) -> None:
        """After a prefill (or a chunk of one): share what was computed, go on with the tree's slots.

        The row may change: where another request was faster, its slots replace this one's, which are freed.
        """
        if self.disable:
            return
        ids = req.all_ids[: req.kv_len]
        row = self.req_to_token.req_to_token[req.row]
        self._free_duplicates(req, row, self._insert_req(req, ids, row))
        match = self.match_prefix(ids, req.extra_key)
        row[: len(match.slots)] = match.slots
        self.inc_lock_ref(match.last_node)  # the new lock first: the old path must not become evictable in between
        self.dec_lock_ref(req.last_node)
        req.last_node, req.prefix_len = match.last_node, len(match.slots)

    def cache_finished_req(self, req: TreeUser) -> None:
        """At the end: leave prompt and answer to the tree, give back the rest, let go of the lock."""
        row = self.req_to_token.req_to_token[req.row]
        if self.disable:
            self.pool.free(row[: req.allocated_len])
            return
        ids = req.all_ids[: req.kv_len]
        self._free_duplicates(req, row, self._insert_req(req, ids, row))
        self.pool.free(row[len(self.key(ids)) : req.allocated_len])
        self.dec_lock_ref(req.last_node)

    def _insert_req(self, req: TreeUser, ids: np.ndarray, row: np.ndarray) -> int:
        """insert, for a request that does so at several times."""
        known = self.insert(ids, row, req.extra_key, req.priority, req.cache_inserted_len)
        req.cache_inserted_len = max(req.cache_inserted_len, len(self.key(ids)))
        return known

    def _free_duplicates(self, req: TreeUser, row: np.ndarray, known: int) -> None:
        """Free this request's own slots up to `known`; those up to prefix_len are the tree's already."""
        if known > req.prefix_len:
            self.pool.free(row[req.prefix_len : known])
            req.sent_len = min(req.sent_len, req.prefix_len)  # every rank's page table still points at freed pages

    # --- small things

    def sound(self, node: TreeNode) -> bool:
        """Has it what a node must have? For whoever looks for mistakes (invariants.py)."""
        return len(node.value) == len(node.key)

    def nodes(self) -> Iterator[TreeNode]:
        """Every node but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def pretty(self, show: Callable[[np.ndarray], str] = lambda key: str(key.tolist())) -> str:
        """The tree as text, one node a line; `show` turns a key into text."""
        lines: list[str] = []

        def walk(node: TreeNode, depth: int) -> None:
            lock = f"  locked by {node.lock_ref}" if node.lock_ref else ""
            lines.append(f"{'   ' * depth}`- {show(node.key)}  [{len(node.key)} slots]{lock}")
            for child in node.children.values():
                walk(child, depth + 1)

        top = list(self.root.children.values())
        names = dict.fromkeys(node.extra_key for node in top)
        for name in sorted(names, key=lambda name: name is not None):
            if name is not None:
                lines.append(f"{name}:")
            for node in top:
                if node.extra_key == name:
                    walk(node, 0)
        return "\n".join(lines) or "(empty)"

    def key(self, ids: Sequence[int]) -> np.ndarray:
        """Token ids -> what the tree compares, cut to whole pages."""
        ids = np.asarray(ids, dtype=np.int64)
        if self.bigram:
            ids = (ids[:-1] << 32) | ids[1:]
        return ids[: len(ids) // self.page_size * self.page_size]

    def child_key(self, key: np.ndarray) -> Hashable:
        """What tells siblings apart: the first page."""
        return int(key[0]) if self.page_size == 1 else key[: self.page_size].tobytes()

    def name_of(self, node: TreeNode) -> Hashable:
        """What its parent files a node under."""
        return self._name(node.key, node.extra_key)

    def _name(self, key: np.ndarray, extra_key: Hashable) -> Hashable:
        first = self.child_key(key)
        return first if extra_key is None else (extra_key, first)

    def _common_length(self, a: np.ndarray, b: np.ndarray) -> int:
        """Equal leading tokens, in whole pages."""
        n = min(len(a), len(b))
        differ = a[:n] != b[:n]
        at = int(differ.argmax())
        return at // self.page_size * self.page_size if differ[at] else n

    def _touch(self, node: TreeNode, now: int) -> None:
        node.last_access_time = now
        self._offer(node)

    def _evictable(self, node: TreeNode) -> bool:
        return node.parent is not None and not node.children and node.lock_ref == 0

    def _offer(self, node: TreeNode) -> None:
        self.leaves.offer(node)
