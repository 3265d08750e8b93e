import random
from operator import lt
from types import ModuleType

import numpy as np

from ch07_sglang_radix.exercises.checks.trees import tree_with
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.tree_node import TreeNode
from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    class Tree(RadixCache):
        """Evicts whom `victim` names."""

        def evict(self, num_slots: int) -> int:
            evicted = 0
            while evicted < num_slots and (leaf := _victim(m, list(self.nodes()))) is not None:
                self.pool.free(leaf.value)
                evicted += len(leaf.value)
                del leaf.parent.children[self.child_key(leaf.key)]
                leaf.parent = None
            self.evictable_size -= evicted
            return evicted

    _check_ranks(m)
    expect("victim of no nodes", ask(m.victim, []), None)
    tree = tree_with([1, 2, 3], [4, 5, 6], [7, 8, 9], tree=Tree(TokenToKVPool(num_pages=9)))
    for key, hits in (([1, 2, 3], 2), ([7, 8, 9], 1), ([4, 5, 6], 0)):  # the last one is the newest, but nobody uses it
        node = tree.match_prefix(key).last_node
        node.hit_count = hits
    expect("slots evicted when one is wanted: a leaf of 3 goes as a whole", tree.evict(1), 3)
    expect("tokens of 4 5 6, which was used least often, that are left", len(tree.match_prefix([4, 5, 6]).slots), 0)
    tree.inc_lock_ref(tree.match_prefix([7, 8, 9]).last_node)
    expect("slots evicted when all are wanted, and 3 of 6 are locked", tree.evict(99), 3)
    expect("tokens of 7 8 9, which is locked, that are left", len(tree.match_prefix([7, 8, 9]).slots), 3)
    tree = tree_with([1, 2, 3], tree=Tree(TokenToKVPool(num_pages=9)))
    end = tree.match_prefix([1, 2, 3]).last_node
    beginning = tree.match_prefix([1, 2]).last_node  # two nodes now
    beginning.hit_count, end.hit_count = 0, 5
    expect("slots evicted of 1 2, used seldom, with 3, used often, behind it: 3 is the leaf", tree.evict(1), 1)
    _check_at_random(Tree)


def _victim(m: ModuleType, nodes: list[TreeNode]) -> TreeNode | None:
    """Whom the answer names, if it may go and it is its turn."""
    able = [node for node in nodes if not node.children and node.lock_ref == 0]
    leaf = ask(m.victim, nodes)
    if leaf is None or not able:
        expect("victim", leaf, min(able, key=_rank, default=None))
        return None
    name = leaf.key.tolist() if isinstance(leaf, TreeNode) else leaf
    expect(f"is {name}, which victim names, one of the nodes", any(leaf is node for node in nodes), True)
    expect(f"lock_ref of {name}, which victim names: nobody may use it", leaf.lock_ref, 0)
    expect(f"children of {name}, which victim names: they could never be found again", len(leaf.children), 0)
    first = min(able, key=_rank)
    expect("victim: (hit_count, last_access_time)", _rank(leaf), _rank(first))
    return leaf


def _rank(node: TreeNode) -> tuple[int, int]:
    return node.hit_count, node.last_access_time


def _check_ranks(m: ModuleType) -> None:
    for what, first, then in (
        ("fewer uses go first, however recent they are", (0, 2), (5, 1)),
        ("used equally often: the one that was used longest ago goes first", (0, 1), (0, 2)),
        ("2 uses go before 10", (2, 9), (10, 1)),
    ):
        ranks = []
        for hits, used in (first, then):
            node = TreeNode(np.arange(3), np.arange(3), None, used)
            node.hit_count = hits
            ranks.append(ask(m.lfu, node))
        less = ask(lt, *ranks, why=f"{what}: two ranks that compare with <")
        expect(f"{what}: is lfu of (hit_count, last_access_time) {first} < that of {then}", bool(less), True)


def _check_at_random(tree_class: type[RadixCache]) -> None:
    rng, tree = random.Random(0), tree_class(TokenToKVPool(num_pages=40))
    for _ in range(150):
        ids, evict, hits = [rng.randrange(3) for _ in range(rng.randint(1, 8))], rng.randint(1, 6), rng.randrange(3)
        match = tree.match_prefix(ids)
        match.last_node.hit_count += hits
        tree.inc_lock_ref(match.last_node)
        tree.evict(max(evict, len(ids) - tree.pool.num_free_pages))  # `_victim` looks at everyone who goes
        tree.dec_lock_ref(match.last_node)
        if tree.pool.num_free_pages >= len(ids):
            tree_with(ids, tree=tree)
