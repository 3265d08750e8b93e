"""Exercise 3: Evict what is used least often (20 minutes).

Read  ch07_sglang_radix/eviction.py; ch07_sglang_radix/radix_cache.py, evict
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 3

Two functions. `lfu` ranks a node: the one with the smallest rank goes first. Of nodes that are used equally often
the one that was used longest ago should go. `victim` picks the next node to evict, by that rank; it is called again
and again until enough slots are free. The real tree keeps a heap, a plain walk over all nodes does here. Which nodes
must stay, however rarely they are used?

    node, nodes    TreeNode: hit_count, last_access_time, lock_ref, children; `nodes` are all but the root
    returns        lfu: anything that compares with <; victim: one of `nodes`, None if nothing can go
"""

from collections.abc import Iterable
from typing import Any

from ch07_sglang_radix.tree_node import TreeNode


def lfu(node: TreeNode) -> Any:
    raise NotImplementedError  # your turn


def victim(nodes: Iterable[TreeNode]) -> TreeNode | None:
    raise NotImplementedError  # your turn
