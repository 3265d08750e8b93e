"""The radix tree: which token prefixes have their K and V in the pool, and where.

    insert [1 2 3 4], then [1 2 5]         each edge holds tokens and as many KV slots
    root                                   root
     `- 1 2 3 4                             `- 1 2
                                                |- 3 4
                                                `- 5

A request that starts with a path from the root needs none of that path computed again. Nodes in use by
running requests are locked (lock_ref > 0); the others are a cache and are evicted leaf by leaf, in the
order of a strategy (eviction.py). RadixAttention, Zheng et al. 2024 (SGLang), section 3.

Keys are cut to whole pages: a page is shared as a whole or not at all. Rank 0 alone has a tree.
"""

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from ch07_sglang_radix.eviction import pick_strategy
from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.tree_node import TreeNode, TreeUser

NO_SLOTS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class MatchResult:
    """slots [n] of the longest cached prefix, and the node it ends at: lock that node before anything is evicted."""

    slots: np.ndarray
    last_node: TreeNode


class RadixCache:
    """The tree over a TokenToKVPool. `disable=True` gives the same calls without any sharing.

    eviction: lru, lfu, fifo, mru, slru or priority. bigram: keys are pairs of neighbouring tokens, as a draft model of
    EAGLE needs them, whose K and V at a position depend on the next token too; n tokens are n - 1 pairs then.
    extra_key, wherever it is taken, is a namespace (a LoRA adapter, a salt): equal tokens in two of them share nothing.
    evictable_size and protected_size count slots, as do the arguments and results of all methods.
    """

    def __init__(
        self, pool: TokenToKVPool, req_to_token: ReqToTokenPool | None = None, disable: bool = False,
        eviction: str = "lru", bigram: bool = False,
    ):  # fmt: skip
        self.pool, self.page_size, self.disable, self.bigram = pool, pool.page_size, disable, bigram
        self.req_to_token = req_to_token
        self.eviction, self._rank = eviction, pick_strategy(eviction)
        self._clock = count(1)  # a counter, not the wall clock: runs repeat exactly
        self.inserted = self.evicted = self.splits = 0  # since the beginning, for traces
        self.reset()

    def reset(self) -> None:
        """Forget everything; the slots are not given back (see evict for that)."""
        self._roots: dict[Hashable, TreeNode] = {}
        self.root = self._root(None)
        self.evictable_size = 0
        self.protected_size = 0
        self._num_nodes = 0
        # (rank, number, node): leaves to evict. An entry is stale once its node's rank has changed; there is a newer one then
        self._leaves: list[tuple] = []
        self._number = count()

    # --- the tree

    def match_prefix(self, ids: Sequence[int], extra_key: Hashable = None) -> MatchResult:
        """The longest cached prefix of `ids`, floored to whole pages.

        Changes the tree in two ways: nodes on the path count as used now, and a node that matches only in
        part is split. Cap the ids at len - 1: at least one token must be computed to get logits.
        """
        node, slots, now = self._root(extra_key), [], next(self._clock)
        key = self.key(ids)
        while len(key) and not self.disable:
            child = node.children.get(self.child_key(key))
            if child is None:
                break
            n = self._common_length(child.key, key)
            if n < len(child.key):
                child = self._split(child, n)
            self._touch(child, now)
            slots.append(child.value)
            node, key = child, key[n:]
        return MatchResult(np.concatenate(slots) if slots else NO_SLOTS, node)

    def insert(self, ids: Sequence[int], value: np.ndarray, extra_key: Hashable = None, priority: int = 0) -> int:
        """Put `ids` with their slots into the tree; returns how many of them were there already.

        The tree takes over the slots behind that point. The ones before it are duplicates: they stay with
        the caller, who must free those that are not the tree's own. Call it after the forward pass: before,
        another request could match slots with nothing in them.
        """
        key = self.key(ids)
        value = value[: len(key)]
        node, known, now = self._root(extra_key), 0, next(self._clock)
        while len(key):
            child = node.children.get(self.child_key(key))
            if child is None:
                new = node.children[self.child_key(key)] = TreeNode(key.copy(), value.copy(), node, now, priority)
                self.evictable_size += len(key)
                self.inserted += len(key)
                self._num_nodes += 1
                self._offer(new)
                break
            n = self._common_length(child.key, key)
            if n < len(child.key):
                child = self._split(child, n)
            child.priority = max(child.priority, priority)
            self._touch(child, now)
            node, key, value, known = child, key[n:], value[n:], known + n
        return known

    def _split(self, node: TreeNode, n: int) -> TreeNode:
        """Cut a node after n tokens; the new parent inherits the lock, since every lock below goes through it."""
        upper = TreeNode(node.key[:n], node.value[:n], node.parent, node.last_access_time, node.priority)
        upper.creation_time, upper.lock_ref, upper.hit_count = node.creation_time, node.lock_ref, node.hit_count
        node.parent.children[self.child_key(upper.key)] = upper
        node.key, node.value, node.parent = node.key[n:], node.value[n:], upper
        upper.children[self.child_key(node.key)] = node
        self._num_nodes += 1
        self.splits += 1
        return upper

    def count_hit(self, node: TreeNode, priority: int = 0) -> None:
        """A request starts from `node`: what LFU, SLRU and priority eviction go by."""
        while node.parent is not None:
            node.hit_count += 1
            node.priority = max(node.priority, priority)
            self._offer(node)
            node = node.parent

    def inc_lock_ref(self, node: TreeNode) -> None:
        """Protect the path from `node` to the root from eviction."""
        while node.parent is not None:
            if node.lock_ref == 0:
                self.evictable_size -= len(node.key)
                self.protected_size += len(node.key)
            node.lock_ref += 1
            node = node.parent

    def dec_lock_ref(self, node: TreeNode) -> None:
        """Undo one inc_lock_ref."""
        while node.parent is not None:
            if node.lock_ref == 0:
                raise ValueError(f"node {node.key[:8].tolist()} is unlocked more often than it was locked")
            node.lock_ref -= 1
            if node.lock_ref == 0:
                self.protected_size -= len(node.key)
                self.evictable_size += len(node.key)
                self._offer(node)
            node = node.parent

    def evict(self, num_slots: int) -> int:
        """Give back at least `num_slots` slots if that many are evictable; returns how many.

        Unlocked leaves go one at a time, in the strategy's order; a parent becomes a candidate when its
        last child has gone. The last node may be larger than needed.
        """
        evicted = 0
        while self._leaves and evicted < num_slots:
            rank, _, leaf = heapq.heappop(self._leaves)
            if not self._evictable(leaf) or rank != self._rank(leaf):
                continue
            self.pool.free(leaf.value)
            evicted += len(leaf.value)
            parent, leaf.parent = leaf.parent, None
            del parent.children[self.child_key(leaf.key)]
            self._num_nodes -= 1
            self._offer(parent)
        self.evictable_size -= evicted
        self.evicted += evicted
        return evicted

    # --- the two moments in a request's life at which it and the tree trade slots

    def cache_unfinished_req(self, req: TreeUser) -> None:
        """After a prefill (or a chunk of one): share what was computed, go on with the tree's slots.

        The row may change: where another request was faster, its slots replace this one's, which are freed.
        """
        if self.disable:
            return
        ids = req.all_ids[: req.kv_len]
        row = self.req_to_token.req_to_token[req.row]
        known = self.insert(ids, row, req.extra_key, req.priority)
        self._free_duplicates(req, row, known)
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
        known = self.insert(ids, row, req.extra_key, req.priority)
        self._free_duplicates(req, row, known)
        self.pool.free(row[len(self.key(ids)) : req.allocated_len])
        self.dec_lock_ref(req.last_node)

    def _free_duplicates(self, req: TreeUser, row: np.ndarray, known: int) -> None:
        """Free this request's own slots up to `known`; those up to prefix_len are the tree's already."""
        if known > req.prefix_len:
            self.pool.free(row[req.prefix_len : known])
            req.sent_len = min(req.sent_len, req.prefix_len)  # every rank's page table still points at freed pages

    # --- small things

    def nodes(self) -> Iterator[TreeNode]:
        """Every node but the roots, parents first."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def pretty(self, show: Callable[[np.ndarray], str] = lambda key: str(key.tolist())) -> str:
        """The tree as text, one node a line; `show` turns a key into text."""
        lines: list[str] = []

        def walk(node: TreeNode, depth: int) -> None:
            for child in node.children.values():
                lock = f"  locked by {child.lock_ref}" if child.lock_ref else ""
                lines.append(f"{'   ' * depth}`- {show(child.key)}  [{len(child.key)} slots]{lock}")
                walk(child, depth + 1)

        for name, root in self._roots.items():
            if name is not None and root.children:
                lines.append(f"{name}:")
            walk(root, 0)
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

    def _root(self, extra_key: Hashable) -> TreeNode:
        if extra_key not in self._roots:
            self._roots[extra_key] = TreeNode(NO_SLOTS, NO_SLOTS, None, 0)
        return self._roots[extra_key]

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
        """Put a leaf that can be evicted in line, at its present rank."""
        if not self._evictable(node):
            return
        heapq.heappush(self._leaves, (self._rank(node), next(self._number), node))
        if len(self._leaves) > 4 * self._num_nodes + 64:  # mostly stale
            leaves = [node for node in self.nodes() if self._evictable(node)]
            self._leaves = [(self._rank(node), next(self._number), node) for node in leaves]
            heapq.heapify(self._leaves)
