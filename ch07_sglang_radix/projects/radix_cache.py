"""Project: write the radix tree's match, insert, split and evict. README.md says how it is graded, and has hints.

The constructor is there, and gives you (see frame.py, memory_pool.py, tree_node.py):

    self.root                TreeNode without tokens; its parent is None
    self.pool                free(slots) gives evicted slots back
    self.disable             nothing is found, nothing is kept
    self.key(ids)            int64 [n]: what the tree compares, cut to whole pages of self.page_size
    self.name(key, extra)    under which `children` of a node file the one that begins as `key` does, in the namespace `extra`;
                             equal exactly if the first pages are, and the namespaces
    self.rank(node)          of the eviction strategy: of the leaves that may go, the one with the smallest goes first. It
                             changes when the node is used
    self.tick()              the next time: a counter
    reset()                  called by the constructor too; extend it (super().reset() first) if you keep something of your own

    TreeNode(key, value, parent, now, priority, extra_key)    value: as many slots as key has tokens. Further fields:
                             children {}, lock_ref 0, hit_count 0, last_access_time and creation_time now

You keep these numbers, all in slots (= tokens), `splits` in nodes:

    self.evictable_size      of nodes with lock_ref 0
    self.protected_size      of the others
    self.inserted            that the tree took over since the beginning
    self.evicted             that it gave back
    self.splits              nodes that were cut in two

Time in match_prefix and insert: `now` is one tick at the beginning. A node on the path gets last_access_time = now, before
it is split, if it is.

Splitting, when only the first n tokens of a node match: a new node takes the upper half: parent, the first n tokens and slots,
the old one's priority, extra_key, lock_ref (every lock below goes through it) and hit_count; its time is a new tick, it is young.
The old node stays the lower half, with all its children: whoever holds it as the end of a locked path must find the
same tokens above it. The path goes on, or ends, at the new node.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from ch07_sglang_radix.projects.frame import TreeFrame
from ch07_sglang_radix.radix_cache import MatchResult
from ch07_sglang_radix.tree_node import TreeNode


class RadixCache(TreeFrame):
    def match_prefix(self, ids: Sequence[int], extra_key: Hashable = None) -> MatchResult:
        """MatchResult(slots int64 [n] of the longest cached prefix of `ids`, in whole pages; the node it ends at).

        Nothing found: no slots (an int64 array too), and the root.
        """
        raise NotImplementedError  # your turn

    def insert(
        self, ids: Sequence[int], value: np.ndarray, extra_key: Hashable = None, priority: int = 0,
        inserted_len: int = 0,
    ) -> int:  # fmt: skip
        """Put `ids` with their slots (`value`, at least as many) into the tree; returns how many of them were there already.

        The tree takes over the slots behind that point, as one node, with copies of tokens and slots; its time is a new tick.
        Slots before it stay the caller's. Every node on the way, the new one included, counts a hit if it ends behind
        the first `inserted_len` tokens, and has at least `priority`. Returns 0, and keeps nothing, if disabled.
        """
        raise NotImplementedError  # your turn

    def evict(self, num_slots: int) -> int:
        """Give back at least `num_slots` slots, if that many can go; returns how many.

        Leaves with lock_ref 0 go one at a time, whole, the smallest rank first; a parent may go once its last child has. The
        parent of a node that has gone is None. With 10,000 leaves it must not look at all of them each time.
        """
        raise NotImplementedError  # your turn

    def inc_lock_ref(self, node: TreeNode) -> None:
        """One request more uses the path from `node` to the root: nothing of it may go."""
        raise NotImplementedError  # your turn

    def dec_lock_ref(self, node: TreeNode) -> None:
        """Undo one inc_lock_ref. Raises ValueError, "... unlocked more often than it was locked", if there was none."""
        raise NotImplementedError  # your turn
