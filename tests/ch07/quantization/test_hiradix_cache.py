"""The tree with a host tier, against a dictionary of what every page must hold."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.quantization import hiradix_cache
from ch07_sglang_radix.quantization.cache_controller import HiCacheController
from ch07_sglang_radix.quantization.hicache import check_host
from ch07_sglang_radix.quantization.hiradix_cache import HITS, HiRadixCache
from tests.ch07.quantization.copies import Copies

PAGE, DEVICE = 2, 8
NO_REQUEST = SimpleNamespace(count_cached=lambda tier, tokens: None)


class Tiers:
    """A tree over `device` and `host` pages, and somebody who computes."""

    def __init__(self, policy: str, host: int, device: int = DEVICE, idle=lambda: True):
        self.copies = Copies()
        self.pool = TokenToKVPool(device, PAGE)
        self.tree = HiRadixCache(self.pool)
        self.controller = HiCacheController(self.copies, self.copies)
        self.tree.connect(self.controller, host, policy, idle)

    def compute(self, pages: np.ndarray, ids: list[int], first: int, salt) -> None:
        """K and V of a page depend on all tokens before it: what it holds is all of them. As in a step: orders are sent first."""
        self.controller.send()
        for i, page in enumerate(pages.tolist()):
            self.copies.device[page] = self.held(ids, first + i, salt)

    def held(self, ids: list[int], page: int, salt) -> bytes:
        return repr((salt, ids[: (page + 1) * PAGE])).encode()

    def read(self, slots: np.ndarray, ids: list[int], salt) -> None:
        """A step that attends to these slots."""
        self.controller.send()
        for i, page in enumerate((slots[::PAGE] // PAGE).tolist()):
            assert self.copies.device[page] == self.held(ids, i, salt), f"page {i} of {ids}"

    def match(self, ids: list[int], salt=None):
        """As an admission does it: with what is on the host, which is waited for. Returns the match, locked."""
        match = self.tree.match_prefix(ids, salt)
        self.tree.inc_lock_ref(match.last_node)
        room = self.pool.free_slots + self.tree.evictable_size
        if match.host_hit_length and match.host_hit_length <= room:
            there = self.tree.load_back(match, NO_REQUEST)
            self.tree.dec_lock_ref(match.last_node)
            if not there:
                self.controller.look(idle=True)
            match = self.tree.match_prefix(ids, salt)
            self.tree.inc_lock_ref(match.last_node)
        return match

    def request(self, ids: list[int], salt=None) -> int | None:
        """Match, compute the rest, leave it to the tree: how many tokens were found; None if there is no room."""
        match = self.match(ids, salt)
        found = len(match.slots)
        self.read(match.slots, ids, salt)
        pages = len(ids) // PAGE - found // PAGE
        if (missing := pages - self.pool.num_free_pages) > 0:
            self.tree.evict(missing * PAGE)
        own = self.pool.alloc(pages)
        if own is not None:
            self.compute(own[::PAGE] // PAGE, ids, found // PAGE, salt)
            slots = np.concatenate((match.slots, own))
            known = self.tree.insert(ids, slots, salt, inserted_len=0)
            self.pool.free(slots[found : max(known, found)])
            self.controller.send()
        self.tree.dec_lock_ref(match.last_node)
        return None if own is None else found

    def check(self) -> None:
        tree, owners = self.tree, {}
        check_host(tree)
        for page in self.pool.free_pages().tolist():
            owners[page] = "free"
        evictable = protected = 0
        for node in tree.nodes():
            assert tree.sound(node), node.key
            for page in (node.value[::PAGE] // PAGE).tolist():
                assert page not in owners, page
                owners[page] = node
            evictable += 0 if node.lock_ref else len(node.value)
            protected += len(node.value) if node.lock_ref else 0
        assert len(owners) == self.pool.num_pages
        assert (evictable, protected) == (tree.evictable_size, tree.protected_size)


class AgainstADictionary(RuleBasedStateMachine):
    """Any order of requests, evictions, flushes and locks, with copies that take as long as they may."""

    ids = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(
        lambda pages: [t for page in pages for t in (page, 7)]
    )

    @initialize(policy=st.sampled_from(sorted(HITS)), host=st.sampled_from([9, 200]), idle=st.booleans())
    def begin(self, policy, host, idle):
        hiradix_cache.LOAD_BACK_THRESHOLD = 1
        self.tiers = Tiers(policy, host, idle=lambda: idle)
        self.keeps_all = host == 200 and policy != "write_through_selective"
        self.inserted, self.locked = [], []

    @rule(ids=ids, salt=st.sampled_from([None, "a"]))
    def request(self, ids, salt):
        known = [len(_common(ids, other)) for other, of in self.inserted if of == salt]
        found = self.tiers.request(ids, salt)
        if found is None:
            return
        if self.keeps_all and not self.locked:
            assert found == max(known, default=0), "what was computed once is in one of the tiers"
        self.inserted.append((ids, salt))

    @rule(ids=ids)
    def lock(self, ids):
        match = self.tiers.match(ids)
        self.locked.append((match.last_node, match.slots, ids))

    @precondition(lambda self: self.locked)
    @rule()
    def unlock(self):
        node, slots, ids = self.locked.pop()
        self.tiers.read(slots, ids, None)  # it was there all the time
        self.tiers.tree.dec_lock_ref(node)

    @rule(slots=st.integers(1, 12))
    def evict(self, slots):
        self.tiers.tree.evict(slots)

    @rule()
    def pass_time(self):
        self.tiers.controller.send()
        if self.tiers.copies.waiting:
            self.tiers.copies.pass_time()

    @rule(idle=st.booleans())
    def look(self, idle):
        self.tiers.controller.look(idle)

    @precondition(lambda self: not self.locked)
    @rule()
    def flush(self):
        self.tiers.tree.flush()
        self.inserted = []
        assert self.tiers.tree.host_pool.free_slots == self.tiers.tree.host_pool.size

    @precondition(lambda self: not self.locked)
    @rule()
    def set_apart(self):
        self.tiers.tree.set_apart("old")
        self.inserted = []

    @invariant()
    def nothing_is_lost(self):
        self.tiers.check()

    def teardown(self):
        hiradix_cache.LOAD_BACK_THRESHOLD = 10


def _common(a, b):
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[: n // PAGE * PAGE]


TestAgainstADictionary = AgainstADictionary.TestCase
TestAgainstADictionary.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def any_length(monkeypatch):
    monkeypatch.setattr(hiradix_cache, "LOAD_BACK_THRESHOLD", 1)


@pytest.mark.parametrize(
    ("policy", "copied"), [("write_through", 4), ("write_through_selective", 0), ("write_back", 0)]
)
def test_when_a_node_is_copied(policy, copied):
    tiers = Tiers(policy, 20)
    tiers.request([1, 2, 3, 4])
    assert tiers.tree.stored == copied
    tiers.request([1, 2, 3, 4])
    assert tiers.tree.stored == (0 if policy == "write_back" else 4)
    tiers.tree.evict(99)
    assert tiers.tree.stored == 4
    assert tiers.tree.match_prefix([1, 2, 3, 4]).slots.size == 0
    assert tiers.pool.free_slots == tiers.pool.size


def test_a_few_tokens_are_not_worth_a_copy():
    tiers = Tiers("write_through", 20)
    ids = list(range(12))
    tiers.request(ids)
    tiers.tree.evict(99)
    assert tiers.tree.match_prefix(ids[:8]).host_hit_length == 0
    assert tiers.tree.match_prefix(ids).host_hit_length == 12


def test_what_is_on_its_way_is_waited_for(any_length):
    busy = [True]
    tiers = Tiers("write_through", 20, idle=lambda: not busy[0])
    tiers.request([1, 2, 3, 4])
    tiers.tree.evict(99)
    match = tiers.tree.match_prefix([1, 2, 3, 4])
    tiers.tree.inc_lock_ref(match.last_node)
    assert not tiers.tree.load_back(match, NO_REQUEST)
    asked = SimpleNamespace(matchable_ids=[1, 2, 3, 4], extra_key=None)
    assert not tiers.tree.is_there(asked)
    tiers.controller.look(idle=False)
    assert not tiers.tree.is_there(asked), "nothing is done yet"
    tiers.copies.join(tiers.copies.newest)
    tiers.controller.look(idle=False)
    assert tiers.tree.is_there(asked)
    tiers.read(tiers.tree.match_prefix([1, 2, 3, 4]).slots, [1, 2, 3, 4], None)


def test_a_node_that_is_being_copied_may_be_evicted_at_once(any_length):
    """Its pages are computed anew after the copy, however long that takes."""
    tiers = Tiers("write_through", 20, device=2)
    tiers.request([1, 2, 3, 4])
    tiers.request([5, 6, 7, 8])
    assert tiers.request([1, 2, 3, 4]) == 4


def test_the_host_forgets_what_was_used_least_recently(any_length):
    tiers = Tiers("write_through", 4, device=2)
    for ids in ([1, 1], [2, 2], [3, 3], [4, 4], [1, 1], [5, 5]):
        tiers.request(ids)
    assert tiers.request([1, 1]) == 2
    assert tiers.request([2, 2]) == 0


def test_where_there_is_no_room_the_host_forgets_nothing(any_length):
    tiers = Tiers("write_through", host=4)
    tiers.request([1, 2, 3, 4])
    tiers.request([5, 6, 7, 8])
    tiers.tree.evict(8)
    held = tiers.tree.match_prefix([1, 2, 3, 4]).last_host_node
    tiers.tree.inc_lock_ref(held)
    assert tiers.tree.take_host(3) is None, "two are locked, and two may go"
    assert tiers.tree.host_evicted == 0
    assert tiers.tree.match_prefix([5, 6, 7, 8]).host_hit_length == 4
    assert len(tiers.tree.take_host(2)) == 2 * PAGE
    assert tiers.tree.host_evicted == 4
    assert tiers.tree.match_prefix([5, 6, 7, 8]).host_hit_length == 0


def test_what_the_host_has_behind_a_node_that_is_lost_goes_with_it(any_length):
    """write_back: the leaf is copied, and then its parent finds no room."""
    tiers = Tiers("write_back", 1, device=4)
    tiers.request([1, 1, 1, 1])
    tiers.request([1, 1, 2, 2])
    tiers.tree.evict(99)
    tiers.check()
    assert sum(len(node.key) for node in tiers.tree.nodes()) <= 2


def _on_its_way(ids: list[int]) -> Tiers:
    """A tree that has begun to load `ids`, while others run."""
    tiers = Tiers("write_through", 20, idle=lambda: False)
    tiers.request(ids)
    tiers.tree.evict(99)
    match = tiers.tree.match_prefix(ids)
    tiers.tree.inc_lock_ref(match.last_node)
    assert not tiers.tree.load_back(match, NO_REQUEST)
    return tiers


def test_whoever_computes_what_is_on_its_way_comes_after_it(any_length):
    ids = [1, 2, 3, 4]
    tiers = _on_its_way(ids)
    own = tiers.pool.alloc(2)
    tiers.compute(own[::PAGE] // PAGE, ids, 0, None)
    assert tiers.tree.insert(ids, own) == 4
    tiers.read(tiers.tree.match_prefix(ids).slots, ids, None)


def test_a_part_of_what_is_on_its_way_is_waited_for_too(any_length):
    tiers = _on_its_way([1, 2, 3, 4])
    tiers.tree.match_prefix([1, 2])  # splits the node
    assert not tiers.tree.is_there(SimpleNamespace(matchable_ids=[1, 2], extra_key=None))
