"""Exercise 3: Evict what is used least often (15 minutes).

Read  "Eviction strategies" in the chapter; Zheng et al. 2024 (SGLang), section 3
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 3

Two functions. `lfu` ranks a node: the one with the smallest rank goes first. Of nodes that are used equally often
the one that was used longest ago should go. `victim` picks the next node to evict, by that rank; it is called again
and again until enough slots are free. The real tree keeps a heap, a plain walk over all nodes does here. Which nodes
must stay, however rarely they are used?

    node, nodes    with hit_count (requests that used it), last_access_time (a number that grows), lock_ref (running
                   requests that use it now), children (a dict); `nodes` are all but the root, in any order
    returns        lfu: anything that compares with <; victim: one of `nodes`, None if nothing can go

    hit_count 0, last used at 7, goes before hit_count 1, last used at 2, and after hit_count 0, last used at 3
"""

from collections.abc import Iterable
from typing import Any

from ch07_sglang_radix.tree_node import TreeNode


def lfu(node: TreeNode) -> Any:
    raise NotImplementedError  # your turn


def victim(nodes: Iterable[TreeNode]) -> TreeNode | None:
    raise NotImplementedError  # your turn
