"""Eviction strategies: of the leaves that nobody uses, which goes first?

Each is a function node -> number or tuple; the leaf with the smallest goes, as in SGLang 0.5.23,
srt/mem_cache/evict_policy.py. (FCFS, LPM and their like are schedule policies, which order requests and not leaves:
schedule_policy.py.)
"""

import heapq
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from ch07_sglang_radix.tree_node import TreeNode
from common.values import choice

PROTECTED_HITS = 2  # SLRU: the request that computed a node, and one that came back for it


def lru(node: TreeNode) -> Any:
    """Least recently used first: what was used last will be used next."""
    return node.last_access_time


def mru(node: TreeNode) -> Any:
    """Most recently used first: right for a loop that is a little longer than the cache."""
    return -node.last_access_time


def fifo(node: TreeNode) -> Any:
    """First in, first out: the oldest first, used or not."""
    return node.creation_time


def filo(node: TreeNode) -> Any:
    """First in, last out: the newest first."""
    return -node.creation_time


def lfu(node: TreeNode) -> Any:
    """Least frequently used first; of equals the least recently used."""
    return node.hit_count, node.last_access_time


def slru(node: TreeNode) -> Any:
    """Segmented LRU: first those on trial, that nobody has come back for, then the protected ones; each part by recency."""
    return node.hit_count >= PROTECTED_HITS, node.last_access_time


def priority(node: TreeNode) -> Any:
    """Lowest request priority first; of equals the least recently used."""
    return node.priority, node.last_access_time


STRATEGIES: dict[str, Callable[[TreeNode], Any]] = {
    "lru": lru, "lfu": lfu, "fifo": fifo, "filo": filo, "mru": mru, "slru": slru, "priority": priority,
}  # fmt: skip


def pick_strategy(name: str) -> Callable[[TreeNode], Any]:
    """Raises ValueError for an unknown name."""
    return STRATEGIES[choice("radix_eviction_policy", name, tuple(STRATEGIES))]


class EvictionLine:
    """Nodes in the order in which they go. A heap: offering and taking one cost O(log n), however large the tree is.

    rank: of the strategy. may_go: asked when a node is offered, and again when it is its turn. nodes: all there are.
    A node is offered anew whenever its rank may have changed; the older entry is stale, and thrown away when its turn comes.
    """

    def __init__(
        self,
        rank: Callable[[TreeNode], Any],
        may_go: Callable[[TreeNode], bool],
        nodes: Callable[[], Iterable[TreeNode]],
    ):
        self.rank, self._may_go, self._nodes = rank, may_go, nodes
        self._heap: list[tuple[Any, int, TreeNode]] = []  # (rank, number, node)
        self._number = count()
        self._most = 64

    def __len__(self) -> int:
        """Entries, the stale ones too."""
        return len(self._heap)

    def offer(self, node: TreeNode) -> None:
        """Put it in line at its present rank, if it may go."""
        if not self._may_go(node):
            return
        heapq.heappush(self._heap, (self.rank(node), next(self._number), node))
        if len(self._heap) > self._most:  # mostly stale
            self._heap = [(self.rank(node), next(self._number), node) for node in self._nodes() if self._may_go(node)]
            heapq.heapify(self._heap)
            self._most = 4 * len(self._heap) + 64

    def next(self) -> TreeNode | None:
        """Take out the first one; None if nobody may go."""
        while self._heap:
            rank, _, node = heapq.heappop(self._heap)
            if self._may_go(node) and rank == self.rank(node):
                return node
        return None
