"""Solution of the project `radix_cache`."""

import heapq
from collections.abc import Hashable, Sequence
from itertools import count

import numpy as np

from ch07_sglang_radix.projects.frame import TreeFrame
from ch07_sglang_radix.radix_cache import MatchResult
from ch07_sglang_radix.tree_node import TreeNode


class RadixCache(TreeFrame):
    def reset(self) -> None:
        super().reset()
        self.line: list[tuple] = []  # (rank, number, leaf): who goes first; an entry whose rank is old has a newer one
        self.number = count()  # ranks may be equal, nodes do not compare

    def match_prefix(self, ids: Sequence[int], extra_key: Hashable = None) -> MatchResult:
        path = [] if self.disable else self.walk(self.key(ids), extra_key, self.tick())
        slots = [np.zeros(0, dtype=np.int64), *(node.value for node in path)]
        return MatchResult(np.concatenate(slots), path[-1] if path else self.root)

    def insert(
        self, ids: Sequence[int], value: np.ndarray, extra_key: Hashable = None, priority: int = 0,
        inserted_len: int = 0,
    ) -> int:  # fmt: skip
        if self.disable:
            return 0
        key = self.key(ids)
        path = self.walk(key, extra_key, self.tick())
        known = sum(len(node.key) for node in path)
        if known < len(key):
            rest, parent = key[known:], path[-1] if path else self.root
            new = TreeNode(rest.copy(), value[known : len(key)].copy(), parent, self.tick(), priority, extra_key)
            parent.children[self.name(rest, extra_key)] = new
            self.evictable_size += len(rest)
            self.inserted += len(rest)
            path.append(new)
        end = 0
        for node in path:
            end += len(node.key)
            node.priority = max(node.priority, priority)
            node.hit_count += end > inserted_len
        if path:
            self.stand_in_line(path[-1])
        return known

    def walk(self, key: np.ndarray, extra_key: Hashable, now: int) -> list[TreeNode]:
        """The nodes of the longest cached prefix, the last of them split if it matches in part."""
        node, path = self.root, []
        while len(key) and (child := node.children.get(self.name(key, extra_key))) is not None:
            child.last_access_time = now
            self.stand_in_line(child)
            n = self.alike(child.key, key)
            node = child if n == len(child.key) else self.split(child, n)
            path.append(node)
            key = key[n:]
        return path

    def alike(self, a: np.ndarray, b: np.ndarray) -> int:
        """Equal leading tokens, in whole pages."""
        n = min(len(a), len(b))
        differ = np.flatnonzero(a[:n] != b[:n])
        return n if len(differ) == 0 else int(differ[0]) // self.page_size * self.page_size

    def split(self, node: TreeNode, n: int) -> TreeNode:
        upper = TreeNode(node.key[:n], node.value[:n], node.parent, self.tick(), node.priority, node.extra_key)
        upper.lock_ref, upper.hit_count = node.lock_ref, node.hit_count
        upper.parent.children[self.name(upper.key, upper.extra_key)] = upper
        node.key, node.value, node.parent = node.key[n:], node.value[n:], upper
        upper.children[self.name(node.key, node.extra_key)] = node
        self.splits += 1
        return upper

    def evict(self, num_slots: int) -> int:
        gone = 0
        while gone < num_slots and self.line:
            rank, _, leaf = heapq.heappop(self.line)
            if not self.may_go(leaf) or rank != self.rank(leaf):
                continue
            self.pool.free(leaf.value)
            gone += len(leaf.value)
            parent, leaf.parent = leaf.parent, None
            del parent.children[self.name(leaf.key, leaf.extra_key)]
            self.stand_in_line(parent)
        self.evictable_size -= gone
        self.evicted += gone
        return gone

    def may_go(self, node: TreeNode) -> bool:
        return node.parent is not None and node.lock_ref == 0 and not node.children

    def stand_in_line(self, node: TreeNode) -> None:
        """A leaf whose rank is new: the old entry stays, and is passed over when its turn comes."""
        if not self.may_go(node):
            return
        heapq.heappush(self.line, (self.rank(node), next(self.number), node))
        if len(self.line) > 10_000 and len(self.line) > 20 * (self.evictable_size // self.page_size):  # mostly old ones
            leaves = {id(leaf): leaf for _, _, leaf in self.line if self.may_go(leaf)}.values()
            self.line = [(self.rank(leaf), next(self.number), leaf) for leaf in leaves]
            heapq.heapify(self.line)

    def inc_lock_ref(self, node: TreeNode) -> None:
        while node.parent is not None:
            if node.lock_ref == 0:
                self.evictable_size -= len(node.key)
                self.protected_size += len(node.key)
            node.lock_ref += 1
            node = node.parent

    def dec_lock_ref(self, node: TreeNode) -> None:
        while node.parent is not None:
            if node.lock_ref == 0:
                raise ValueError(f"a node of {len(node.key)} tokens is unlocked more often than it was locked")
            node.lock_ref -= 1
            if node.lock_ref == 0:
                self.evictable_size += len(node.key)
                self.protected_size -= len(node.key)
                self.stand_in_line(node)
            node = node.parent
