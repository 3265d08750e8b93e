"""What the radix tree is made of, and what it asks of the requests that use it.

Both stand below the tree (radix_cache.py), the strategies (eviction.py) and the requests (request.py), so that none of
the three has to know another.
"""

from collections.abc import Hashable
from typing import Protocol

import numpy as np


class TreeNode:
    """An edge and the node at its end: `key` token ids [n], `value` their KV slots [n]."""

    __slots__ = (
        "children", "creation_time", "extra_key", "hit_count", "key", "last_access_time", "lock_ref", "parent",
        "priority", "value",
    )  # fmt: skip

    def __init__(
        self, key: np.ndarray, value: np.ndarray, parent: "TreeNode | None", now: int, priority: int = 0,
        extra_key: Hashable = None,
    ):  # fmt: skip
        self.key, self.value, self.parent = key, value, parent  # parent is None for the root, and once evicted
        self.extra_key = extra_key  # the namespace that its tokens belong to
        self.children: dict[Hashable, TreeNode] = {}
        self.lock_ref = 0  # running requests whose prefix goes through here
        self.last_access_time = self.creation_time = now
        self.hit_count = 0  # requests that have inserted these tokens: 1 for the one that computed them
        self.priority = priority  # the highest of any request that has inserted them


class TreeUser(Protocol):
    """A request as the tree sees it: what it reads, and the fields that it moves on."""

    row: int  # of req_to_token: the slots of its tokens
    kv_len: int  # tokens whose K and V are in the pool
    allocated_len: int  # slots the row has
    extra_key: Hashable  # namespace
    priority: int
    last_node: TreeNode | None  # set by the tree: the end of the locked path
    prefix_len: int  # set by the tree: slots of the row that are the tree's
    cache_inserted_len: int  # set by the tree: tokens that this request has inserted, and that count a hit once
    sent_len: int  # taken back by the tree where slots of the row have changed

    @property
    def all_ids(self) -> np.ndarray:
        """Prompt and output so far [n]."""
        ...
