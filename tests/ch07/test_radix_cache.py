import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from common.sampling.params import SamplingParams


def tree_with(*keys, page_size=1, pages=64):
    """A tree holding `keys`, and the pool behind it."""
    pool = TokenToKVPool(num_pages=pages, page_size=page_size)
    tree = RadixCache(pool)
    for key in keys:
        slots = pool.alloc(-(-len(key) // page_size))
        known = tree.insert(key, slots)
        whole = len(key) // page_size * page_size
        pool.free(slots[:known])
        pool.free(slots[whole:])
    return tree, pool


def test_match_of_an_empty_tree_is_the_root():
    tree, _ = tree_with()
    match = tree.match_prefix([1, 2, 3])
    assert len(match.slots) == 0
    assert match.last_node is tree.root


def test_match_splits_a_node_in_the_middle():
    tree, _ = tree_with([1, 2, 3, 4])
    whole = tree.match_prefix([1, 2, 3, 4]).slots
    match = tree.match_prefix([1, 2, 9])
    assert match.slots.tolist() == whole[:2].tolist()
    assert match.last_node.key.tolist() == [1, 2]
    assert [child.key.tolist() for child in match.last_node.children.values()] == [[3, 4]]
    assert tree.match_prefix([1, 2, 3, 4]).slots.tolist() == whole.tolist()


def test_insert_says_how_much_was_there():
    tree, pool = tree_with([1, 2, 3, 4])
    slots = pool.alloc(3)
    assert tree.insert([1, 2, 5], slots) == 2
    assert tree.match_prefix([1, 2, 5]).slots[-1] == slots[-1]


def test_keys_are_cut_to_whole_pages():
    tree, _ = tree_with([1, 2, 3, 4, 5, 6, 7], page_size=4)
    assert len(tree.match_prefix([1, 2, 3, 4, 5, 6, 7]).slots) == 4
    assert len(tree.match_prefix([1, 2, 3]).slots) == 0


def test_a_page_is_shared_as_a_whole_or_not_at_all():
    tree, _ = tree_with([1, 2, 3, 4, 5, 6, 7, 8], page_size=4)
    assert len(tree.match_prefix([1, 2, 3, 4, 5, 6, 0, 0]).slots) == 4
    assert len(tree.match_prefix([1, 2, 0, 0]).slots) == 0


def test_siblings_that_differ_inside_their_first_page_live_side_by_side():
    tree, _ = tree_with([1, 2, 3, 4], [1, 2, 3, 5], page_size=4)
    assert len(tree.root.children) == 2


def test_split_inherits_the_lock():
    tree, _ = tree_with([1, 2, 3, 4])
    node = tree.match_prefix([1, 2, 3, 4]).last_node
    tree.inc_lock_ref(node)
    tree.match_prefix([1, 2])
    assert node.parent.lock_ref == 1
    assert (tree.protected_size, tree.evictable_size) == (4, 0)
    tree.dec_lock_ref(node)
    assert (tree.protected_size, tree.evictable_size) == (0, 4)


def test_evict_takes_the_least_recently_used_leaf_and_no_locked_one():
    tree, pool = tree_with([1, 2, 3], [4, 5, 6], [7, 8, 9], pages=9)
    tree.match_prefix([1, 2, 3])
    tree.inc_lock_ref(tree.match_prefix([4, 5, 6]).last_node)
    assert tree.evict(1) == 3, "a leaf goes as a whole"
    assert len(tree.match_prefix([7, 8, 9]).slots) == 0
    assert tree.evict(100) == 3, "4 5 6 is locked"
    assert pool.num_free_pages == 6
    assert len(tree.match_prefix([4, 5, 6]).slots) == 3


def test_a_parent_goes_only_after_its_last_child():
    tree, _ = tree_with([1, 2, 3], [1, 2, 4])
    assert tree.evict(1) == 1
    assert len(tree.match_prefix([1, 2]).slots) == 2
    assert tree.evict(3) == 3
    assert tree.evictable_size == 0


def test_unlocking_too_often_is_an_error():
    tree, _ = tree_with([1, 2])
    with pytest.raises(ValueError, match="unlocked more often"):
        tree.dec_lock_ref(tree.match_prefix([1, 2]).last_node)


def test_disabled_cache_matches_nothing():
    tree = RadixCache(TokenToKVPool(num_pages=4), disable=True)
    assert tree.insert([1, 2], np.array([0, 1])) == 0, "none of them was there"
    assert len(tree.match_prefix([1, 2]).slots) == 0


def test_pretty_shows_locks():
    tree, _ = tree_with([1, 2, 3, 4], [1, 2, 5])
    tree.inc_lock_ref(tree.match_prefix([1, 2, 5]).last_node)
    text = tree.pretty()
    assert "`- [1, 2]  [2 slots]  locked by 1" in text
    assert "   `- [5]  [1 slots]  locked by 1" in text


def test_the_slower_of_two_equal_requests_takes_over_the_tree_s_slots():
    """Its own are freed, and the ranks' page tables must hear of it: they still point there."""
    pool, rows = TokenToKVPool(num_pages=8, page_size=2), ReqToTokenPool(2, 8)
    tree = RadixCache(pool, rows)
    reqs = []
    for rid in range(2):
        req = Req(rid, None, [1, 2, 3, 4, 5], SamplingParams(), 0, row=rows.alloc(), last_node=tree.root)
        rows.req_to_token[req.row, :6] = pool.alloc(3)
        req.kv_len, req.allocated_len, req.sent_len = 5, 6, 6
        reqs.append(req)
    for req in reqs:
        tree.cache_unfinished_req(req)
    first, second = (rows.req_to_token[req.row] for req in reqs)
    assert first[:4].tolist() == second[:4].tolist()
    assert first[4] != second[4], "the page that is not full stays each one's own"
    assert pool.num_free_pages == 8 - 4
    assert (reqs[0].sent_len, reqs[1].sent_len) == (6, 0)
    for req in reqs:
        tree.cache_finished_req(req)
    assert (tree.protected_size, tree.evictable_size, pool.num_free_pages) == (0, 4, 6)


class RadixAgainstDictionary(RuleBasedStateMachine):
    """Tree and pool against the plainest model: a set of all prefixes that were ever left to the tree."""

    PAGES, PAGE_SIZE = 24, 2

    def __init__(self):
        super().__init__()
        self.pool = TokenToKVPool(num_pages=self.PAGES, page_size=self.PAGE_SIZE)
        self.tree = RadixCache(self.pool)
        self.content: dict[tuple[int, ...], int] = {}  # prefix in whole pages -> page id of its last page
        self.locked: list[tuple] = []  # (node, prefix)

    keys = st.lists(st.integers(0, 2), max_size=12)

    def pages(self, key):
        p = self.PAGE_SIZE
        return [tuple(key[: (i + 1) * p]) for i in range(len(key) // p)]

    @rule(key=keys)
    def insert(self, key):
        slots = self.pool.alloc(len(key) // self.PAGE_SIZE)
        if slots is None:
            return
        known = self.tree.insert(key, slots)
        prefixes = self.pages(key)
        assert known == self.PAGE_SIZE * sum(prefix in self.content for prefix in prefixes)
        for prefix, page in zip(prefixes, (slots[:: self.PAGE_SIZE] // self.PAGE_SIZE).tolist(), strict=True):
            self.content.setdefault(prefix, page)
        self.pool.free(slots[:known])

    @rule(key=keys)
    def match(self, key):
        slots = self.tree.match_prefix(key).slots
        expected = []
        for prefix in self.pages(key):
            if prefix not in self.content:
                break
            page = self.content[prefix]
            expected += [page * self.PAGE_SIZE + i for i in range(self.PAGE_SIZE)]
        assert slots.tolist() == expected

    @rule(key=keys)
    def lock(self, key):
        match = self.tree.match_prefix(key)
        self.tree.inc_lock_ref(match.last_node)
        self.locked.append((match.last_node, tuple(key[: len(match.slots)])))

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data):
        node, _ = self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1)))
        self.tree.dec_lock_ref(node)

    @rule(n=st.integers(1, 12))
    def evict(self, n):
        before = self.tree.evictable_size
        evicted = self.tree.evict(n)
        assert evicted >= min(n, before)
        present = set(self.prefixes_in_tree())
        gone = self.content.keys() - present
        assert len(gone) * self.PAGE_SIZE == evicted
        for _, prefix in self.locked:
            assert not gone & set(self.pages(prefix)), "a locked prefix was evicted"
        self.content = {prefix: page for prefix, page in self.content.items() if prefix in present}

    def prefixes_in_tree(self):
        def walk(node, path):
            for child in node.children.values():
                whole = path + child.key.tolist()
                yield from self.pages(whole)[len(path) // self.PAGE_SIZE :]
                yield from walk(child, whole)

        yield from walk(self.tree.root, [])

    @invariant()
    def tree_holds_what_the_dictionary_holds(self):
        assert sorted(self.prefixes_in_tree()) == sorted(self.content)

    @invariant()
    def every_page_has_one_owner(self):
        owned = [*self.pool.free_pages().tolist(), *self.content.values()]
        assert sorted(owned) == list(range(self.PAGES))
        held = len(self.content) * self.PAGE_SIZE
        assert self.tree.evictable_size + self.tree.protected_size == held
        assert self.tree.inserted - self.tree.evicted == held

    @invariant()
    def locks_count_the_paths_through_a_node(self):
        protected = {prefix for _, locked in self.locked for prefix in self.pages(locked)}
        assert self.tree.protected_size == len(protected) * self.PAGE_SIZE


TestRadixAgainstDictionary = RadixAgainstDictionary.TestCase
TestRadixAgainstDictionary.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
