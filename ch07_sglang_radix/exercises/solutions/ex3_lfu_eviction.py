"""Solution of exercise 3: Evict what is used least often."""

from collections.abc import Iterable
from typing import Any

from ch07_sglang_radix.tree_node import TreeNode


def lfu(node: TreeNode) -> Any:
    return node.hit_count, node.last_access_time


def victim(nodes: Iterable[TreeNode]) -> TreeNode | None:
    # a node with children is the beginning of what they hold: without it nobody would find them
    candidates = [node for node in nodes if not node.children and node.lock_ref == 0]
    return min(candidates, key=lfu, default=None)
