"""The radix tree: which token prefixes have their K and V in the pool, and where.

    insert [1 2 3 4], then [1 2 5]         each edge holds tokens and as many KV slots
    root                                   root
     `- 1 2 3 4                             `- 1 2
                                                |- 3 4
                                                `- 5

A request that starts with a path from the root needs none of that path computed again. Nodes in use by
running requests are locked (lock_ref > 0); the others are a cache and are evicted leaf by leaf, least
recently used first. RadixAttention, Zheng et al. 2024 (SGLang), section 3.

Keys are cut to whole pages: a page is shared as a whole or not at all. Rank 0 alone has a tree.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool

if TYPE_CHECKING:
    from ch07_sglang_radix.request import Req

NO_SLOTS = np.zeros(0, dtype=np.int64)


class TreeNode:
    """An edge and the node at its end: `key` token ids, `value` their KV slots, same length."""

    __slots__ = ("children", "creation_time", "hit_count", "key", "last_access_time", "lock_ref", "parent", "value")

    def __init__(self, key: list[int], value: np.ndarray, parent: "TreeNode | None", now: int):
        self.key, self.value, self.parent = key, value, parent
        self.children: dict[int | tuple[int, ...], TreeNode] = {}
        self.lock_ref = 0  # running requests whose prefix goes through here
        self.last_access_time = self.creation_time = now
        self.hit_count = 0

    def __lt__(self, other: "TreeNode") -> bool:  # the eviction heap: least recently used first
        return self.last_access_time < other.last_access_time


@dataclass(frozen=True)
class MatchResult:
    """slots [n] of the longest cached prefix, and the node it ends at: lock that node before anything is evicted."""

    slots: np.ndarray
    last_node: TreeNode


class RadixCache:
    """The tree over a TokenToKVPool. `disable=True` gives the same calls without any sharing.

    evictable_size and protected_size count slots, as do the arguments and results of all methods.
    """

    def __init__(self, pool: TokenToKVPool, req_to_token: ReqToTokenPool | None = None, disable: bool = False):
        self.pool, self.page_size, self.disable = pool, pool.page_size, disable
        self.req_to_token = req_to_token
        self._clock = count(1)  # a counter, not the wall clock: runs repeat exactly
        self.reset()

    def reset(self) -> None:
        """Forget everything; the slots are not given back (see evict for that)."""
        self.root = TreeNode([], NO_SLOTS, None, 0)
        self.root.lock_ref = 1  # never evicted
        self.evictable_size = 0
        self.protected_size = 0

    # --- the tree

    def match_prefix(self, key: Sequence[int]) -> MatchResult:
        """The longest cached prefix of `key`, floored to whole pages.

        Changes the tree in two ways: nodes on the path count as used now, and a node that matches only in
        part is split. Cap the key at len - 1: at least one token must be computed to get logits.
        """
        node, slots = self.root, []
        key = self._whole_pages(key)
        now = next(self._clock)
        while key and not self.disable:
            child = node.children.get(self._child_key(key))
            if child is None:
                break
            n = self._common_length(child.key, key)
            if n < len(child.key):
                child = self._split(child, n)
            child.last_access_time = now
            child.hit_count += 1
            slots.append(child.value)
            node, key = child, key[n:]
        return MatchResult(np.concatenate(slots) if slots else NO_SLOTS, node)

    def insert(self, key: Sequence[int], value: np.ndarray) -> int:
        """Put `key` with its slots into the tree; returns how many of them were there already.

        The tree takes over the slots behind that point. The ones before it are duplicates: they stay with
        the caller, who must free those that are not the tree's own. Call it after the forward pass: before,
        another request could match slots with nothing in them.
        """
        key = self._whole_pages(key)
        value = value[: len(key)]
        node, known, now = self.root, 0, next(self._clock)
        while key:
            child = node.children.get(self._child_key(key))
            if child is None:
                new = TreeNode(key, value.copy(), node, now)
                node.children[self._child_key(key)] = new
                self.evictable_size += len(key)
                break
            n = self._common_length(child.key, key)
            if n < len(child.key):
                child = self._split(child, n)
            child.last_access_time = now
            node, key, value, known = child, key[n:], value[n:], known + n
        return known

    def _split(self, node: TreeNode, n: int) -> TreeNode:
        """Cut a node after n tokens; the new parent inherits the lock, since every lock below goes through it."""
        upper = TreeNode(node.key[:n], node.value[:n], node.parent, node.last_access_time)
        upper.creation_time, upper.lock_ref, upper.hit_count = node.creation_time, node.lock_ref, node.hit_count
        node.parent.children[self._child_key(upper.key)] = upper
        node.key, node.value, node.parent = node.key[n:], node.value[n:], upper
        upper.children[self._child_key(node.key)] = node
        return upper

    def inc_lock_ref(self, node: TreeNode) -> None:
        """Protect the path from `node` to the root from eviction."""
        while node is not self.root:
            if node.lock_ref == 0:
                self.evictable_size -= len(node.key)
                self.protected_size += len(node.key)
            node.lock_ref += 1
            node = node.parent

    def dec_lock_ref(self, node: TreeNode) -> None:
        """Undo one inc_lock_ref."""
        while node is not self.root:
            if node.lock_ref == 0:
                raise ValueError(f"node {node.key[:8]} is unlocked more often than it was locked")
            node.lock_ref -= 1
            if node.lock_ref == 0:
                self.protected_size -= len(node.key)
                self.evictable_size += len(node.key)
            node = node.parent

    def evict(self, num_slots: int) -> int:
        """Give back at least `num_slots` slots if that many are evictable; returns how many.

        Unlocked leaves go one at a time, least recently used first; a parent becomes a candidate when its
        last child has gone. The last node may be larger than needed.
        """
        leaves = [node for node in self.nodes() if not node.children and node.lock_ref == 0]
        heapq.heapify(leaves)
        evicted = 0
        while leaves and evicted < num_slots:
            leaf = heapq.heappop(leaves)
            self.pool.free(leaf.value)
            evicted += len(leaf.value)
            self.evictable_size -= len(leaf.value)
            parent = leaf.parent
            del parent.children[self._child_key(leaf.key)]
            if not parent.children and parent.lock_ref == 0:
                heapq.heappush(leaves, parent)
        return evicted

    # --- the two moments in a request's life at which it and the tree trade slots

    def cache_unfinished_req(self, req: "Req") -> None:
        """After a prefill (or a chunk of one): share what was computed, go on with the tree's slots.

        The row may change: where another request was faster, its slots replace this one's, which are freed.
        """
        if self.disable:
            return
        key = req.all_ids[: req.kv_len]
        row = self.req_to_token.req_to_token[req.row]
        aligned = len(key) // self.page_size * self.page_size
        known = self.insert(key, row[:aligned])
        self._free_duplicates(req, row, known)
        match = self.match_prefix(key)
        row[: len(match.slots)] = match.slots
        self.inc_lock_ref(match.last_node)  # the new lock first: the old path must not become evictable in between
        self.dec_lock_ref(req.last_node)
        req.last_node, req.prefix_len = match.last_node, len(match.slots)

    def cache_finished_req(self, req: "Req") -> None:
        """At the end: leave prompt and answer to the tree, give back the rest, let go of the lock."""
        row = self.req_to_token.req_to_token[req.row]
        if self.disable:
            self.pool.free(row[: req.allocated_len])
            return
        aligned = req.kv_len // self.page_size * self.page_size
        known = self.insert(req.all_ids[: req.kv_len], row[:aligned])
        self._free_duplicates(req, row, known)
        self.pool.free(row[aligned : req.allocated_len])
        self.dec_lock_ref(req.last_node)

    def _free_duplicates(self, req: "Req", row: np.ndarray, known: int) -> None:
        """Free this request's own slots up to `known`; those up to prefix_len are the tree's already."""
        if known > req.prefix_len:
            self.pool.free(row[req.prefix_len : known])
            req.sent_len = min(req.sent_len, req.prefix_len)  # every rank's page table still points at freed pages

    # --- small things

    def nodes(self) -> Iterator[TreeNode]:
        """Every node but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def pretty(self, show=str) -> str:
        """The tree as text, one node a line; `show` turns a key into text."""
        lines: list[str] = []

        def walk(node: TreeNode, depth: int) -> None:
            for child in node.children.values():
                lock = f"  locked by {child.lock_ref}" if child.lock_ref else ""
                lines.append(f"{'   ' * depth}`- {show(child.key)}  [{len(child.key)} slots]{lock}")
                walk(child, depth + 1)

        walk(self.root, 0)
        return "\n".join(lines) or "(empty)"

    def _whole_pages(self, key: Sequence[int]) -> list[int]:
        return list(key[: len(key) // self.page_size * self.page_size])

    def _child_key(self, key: list[int]) -> int | tuple[int, ...]:
        """What tells siblings apart: the first page."""
        return key[0] if self.page_size == 1 else tuple(key[: self.page_size])

    def _common_length(self, a: list[int], b: list[int]) -> int:
        """Equal leading tokens, in whole pages."""
        n = min(len(a), len(b))
        if a[:n] == b[:n]:  # the usual case, and one comparison in C
            return n
        n = next(i for i in range(n) if a[i] != b[i])
        return n // self.page_size * self.page_size
