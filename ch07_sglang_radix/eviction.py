"""Eviction strategies: of the leaves that nobody uses, which goes first?

Each is a function node -> number or tuple; the leaf with the smallest goes, as in SGLang 0.5.23,
srt/mem_cache/evict_policy.py. (FCFS, LPM and their like are schedule policies, which order requests and not leaves:
schedule_policy.py.)
"""

from collections.abc import Callable
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
