"""Which leaf goes first, by strategy."""

import random

import pytest

from ch07_sglang_radix.eviction import STRATEGIES
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache


def tree_of(strategy, *keys, pages=100):
    tree = RadixCache(TokenToKVPool(num_pages=pages), eviction=strategy)
    for key in keys:
        tree.insert(key, tree.pool.alloc(len(key)))
    return tree


def use(tree, key, priority=0):
    """As a request does that computes nothing new."""
    found = tree.match_prefix(key).slots
    tree.insert(key[: len(found)], found, priority=priority)


def evicted_order(tree):
    """First tokens of the leaves as they go."""
    order = []
    while tree.evictable_size:
        before = {int(node.key[0]) for node in tree.nodes()}
        tree.evict(1)
        order += sorted(before - {int(node.key[0]) for node in tree.nodes()})
    return order


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("lru", [2, 3, 1, 4]),
        ("mru", [4, 1, 3, 2]),
        ("fifo", [1, 2, 3, 4]),
        ("lfu", [2, 3, 4, 1]),
        ("filo", [4, 3, 2, 1]),
        ("slru", [2, 3, 1, 4]),
    ],
)
def test_order(strategy, expected):
    """1 is used twice, then 4 once; 2 and 3 never after they came."""
    tree = tree_of(strategy, [1, 1], [2, 2], [3, 3], [4, 4])
    for key in ([1, 1], [1, 1], [4, 4]):
        use(tree, key)
    assert evicted_order(tree) == expected


def test_priority_first_then_recency():
    tree = RadixCache(TokenToKVPool(num_pages=20), eviction="priority")
    for key, priority in (([1], 1), ([2], 0), ([3], 2), ([4], 0)):
        tree.insert(key, tree.pool.alloc(1), priority=priority)
    use(tree, [2], priority=3)
    assert evicted_order(tree) == [4, 1, 3, 2]


def test_slru_protects_what_one_request_has_come_back_for():
    """The request that computed a node is its first hit, the next one its second: then it counts as one that stays."""
    tree = tree_of("slru", [1, 1], [2, 2], [3, 3])
    use(tree, [1, 1])
    for key in ([2, 2], [3, 3]):
        tree.match_prefix(key)  # newer, but only looked at
    assert evicted_order(tree) == [2, 3, 1]


def test_a_request_counts_once_in_each_node_it_inserts():
    """It inserts its prompt after the prefill and prompt and answer at the end; both are one use of the prompt."""
    tree = tree_of("lfu", [1, 2, 3])
    tree.insert([1, 2, 3, 4, 5], tree.pool.alloc(5), inserted_len=3)
    assert {tuple(node.key.tolist()): node.hit_count for node in tree.nodes()} == {(1, 2, 3): 1, (4, 5): 1}
    tree.insert([1, 2, 9], tree.pool.alloc(3))
    hits = {tuple(node.key.tolist()): node.hit_count for node in tree.nodes()}
    assert hits == {(1, 2): 2, (3,): 1, (4, 5): 1, (9,): 1}, "both halves keep the hits, what is shared has one more"


def test_fifo_takes_the_upper_half_of_a_split_for_a_new_node():
    """1 2 was there first, but as a node it is younger than 5 6: as in SGLang."""
    tree = tree_of("fifo", [1, 2, 3], [5, 6])
    tree.match_prefix([1, 2])
    assert evicted_order(tree) == [3, 5, 1]


def test_lfu_counts_requests_and_not_looks():
    """A schedule policy matches every waiting request before every step; that is no use."""
    tree = tree_of("lfu", [1], [2])
    for _ in range(5):
        tree.match_prefix([1])
    use(tree, [2])
    assert evicted_order(tree) == [1, 2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_long_random_life_evicts_the_smallest_rank_of_all_leaves(strategy):
    """The line of leaves is kept up to date bit by bit; here it is compared with a search through all nodes."""
    rng = random.Random(1)
    tree, locked = tree_of(strategy, pages=120), []
    for _ in range(600):
        key = [rng.randrange(3) for _ in range(rng.randrange(1, 9))]
        what = rng.random()
        if what < 0.4 and tree.pool.num_free_pages >= len(key):
            slots = tree.pool.alloc(len(key))
            tree.pool.free(slots[: tree.insert(key, slots, priority=rng.randrange(3))])
        elif what < 0.6:
            use(tree, key, rng.randrange(3))
        elif what < 0.7:
            locked.append(tree.match_prefix(key).last_node)
            tree.inc_lock_ref(locked[-1])
        elif what < 0.8 and locked:
            tree.dec_lock_ref(locked.pop(rng.randrange(len(locked))))
        elif tree.evictable_size:
            leaves = [node for node in tree.nodes() if not node.children and not node.lock_ref]
            first = min(leaves, key=STRATEGIES[strategy])
            tree.evict(1)
            assert first.parent is None, "another leaf went"
            assert sum(node.parent is None for node in leaves) == 1
    assert tree.evicted > 50


def test_unknown_strategies_are_refused():
    with pytest.raises(
        ValueError, match="radix_eviction_policy='fcfs' is unknown; use lru, lfu, fifo, filo, mru, slru or priority"
    ):
        RadixCache(TokenToKVPool(num_pages=1), eviction="fcfs")


def test_namespaces_share_nothing():
    tree = tree_of("lru")
    tree.insert([1, 2, 3], tree.pool.alloc(3), extra_key="lora")
    assert len(tree.match_prefix([1, 2, 3]).slots) == 0
    assert len(tree.match_prefix([1, 2, 3], "lora").slots) == 3
    assert "lora:" in tree.pretty()
    assert tree.evict(3) == 3
    assert len(tree.match_prefix([1, 2, 3], "lora").slots) == 0


def test_a_namespace_that_is_used_once_leaves_nothing_behind():
    tree = tree_of("lru")
    for i in range(200):
        tree.match_prefix([1, 2, 3], extra_key=f"asked {i}")
        tree.insert([1, 2, 3], tree.pool.alloc(3), extra_key=f"left {i}")
        tree.evict(3)
    assert tree.root.children == {}
    assert list(tree.nodes()) == []
    tree.insert([1, 2, 3], tree.pool.alloc(3), extra_key="left")
    tree.reset()
    assert len(tree.match_prefix([1, 2, 3], extra_key="left").slots) == 0
    assert tree.root.children == {}


def test_bigram_keys_are_pairs():
    tree = RadixCache(TokenToKVPool(num_pages=20), bigram=True)
    tree.insert([1, 2, 3, 4], tree.pool.alloc(3))
    assert len(tree.match_prefix([1, 2, 3, 4]).slots) == 3
    assert len(tree.match_prefix([1, 2, 9]).slots) == 1, "(1 2) is there, (2 9) is not"
    assert len(tree.match_prefix([1]).slots) == 0
