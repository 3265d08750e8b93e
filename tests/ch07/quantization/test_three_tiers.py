"""Device, host and disk in any order of events, against two dictionaries: what each page must hold, and which files there are.

Tree, prefetch and orders are the real ones; copies and files are done as late as they may be, or in between.
"""

from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ch07_sglang_radix.quantization import hiradix_cache
from ch07_sglang_radix.quantization.hicache import check_host
from ch07_sglang_radix.quantization.hiradix_cache import HITS
from ch07_sglang_radix.quantization.prefetch import StoragePrefetch
from ch07_sglang_radix.quantization.storage_controller import READ, WRITE
from common.storage.page_keys import chain, first_key, from_words
from tests.ch07.quantization.test_hiradix_cache import PAGE, Tiers


class Disk:
    """Of one engine, over files that many share. Look-ups, writes and reads wait until somebody lets them run."""

    def __init__(self, files: dict[bytes, bytes | None], copies):
        self.files, self.copies = files, copies  # None: a damaged one
        self.store = SimpleNamespace(seed=b"", leading=self.leading)
        self.looks: list = []
        self.writes: dict[int, tuple[int, bytes]] = {}  # host page -> (copies before it, name)
        self.reads: dict[
            int, tuple[int, list, list[bool]]
        ] = {}  # ticket -> (copies before it, pages and names, which are good)

    def leading(self, keys, seed) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.files), len(keys))

    @property
    def backlog(self) -> int:
        return len(self.writes)

    def submit(self, look_up, *args) -> Future:
        self.looks.append((found := Future(), look_up, args))
        return found

    def obey(self, kind, words) -> None:
        ticket, words = (None, words) if kind == WRITE else (words[0], words[1:])
        pages, keys = words[1 : 1 + words[0]], from_words(words[1 + words[0] :])
        if kind == READ:
            self.wait_for(pages)
            self.reads[ticket] = (self.copies.newest, list(zip(pages, keys, strict=True)), [])
            return
        for page, key in zip(pages, keys, strict=True):
            self.writes[page] = (self.copies.newest, key)

    def wait_for(self, pages) -> None:
        for page in pages:
            self.write(page)

    def done(self, ticket) -> bool:
        return len(self.reads[ticket][2]) == len(self.reads[ticket][1])

    def settle(self, ticket, wait) -> int:
        *_, good = self.reads.pop(ticket)
        return next((i for i, one in enumerate(good) if not one), len(good))

    # --- what threads do

    def look(self) -> None:
        found, look_up, args = self.looks.pop(0)
        found.set_result(look_up(*args))

    def write(self, page) -> None:
        if page in self.writes:
            behind, key = self.writes.pop(page)
            self.copies.join(behind)
            if self.files.get(key) is None:  # what is damaged is written anew
                self.files[key] = self.copies.host[page]

    def read(self, ticket) -> None:
        """The next page of that read."""
        behind, pages, good = self.reads[ticket]
        self.copies.join(behind)
        page, key = pages[len(good)]
        held = self.files.get(key)
        good.append(held is not None)
        if held is not None:
            self.copies.host[page] = held
        elif key in self.files:
            del self.files[key]

    def unread(self) -> list[int]:
        return [ticket for ticket in self.reads if not self.done(ticket)]

    def run(self) -> None:
        """All that is on its way."""
        while self.looks:
            self.look()
        self.wait_for(list(self.writes))
        for ticket in self.unread():
            while not self.done(ticket):
                self.read(ticket)


class ThreeTiers(Tiers):
    """An engine over files that others have written, too."""

    def __init__(self, policy: str, host: int, files: dict, prefetch: str = "wait_complete"):
        super().__init__(policy, host)
        self.disk = self.controller.storage = Disk(files, self.copies)
        self.prefetch = StoragePrefetch(self.tree, self.controller, prefetch, PAGE, namespace)
        self.prefetch._looks.shutdown()
        self.prefetch._looks = self.disk
        self.rids = 0

    def queue(self, ids, salt) -> SimpleNamespace:
        self.rids += 1
        req = SimpleNamespace(rid=self.rids, extra_key=salt, probe=False, session=None, matchable_ids=ids)
        self.prefetch.begin(req)
        return req

    def step(self) -> None:
        """As hicache.py between two steps."""
        self.prefetch.look()
        self.controller.send()

    def check(self) -> None:
        self.controller.send()
        super().check()


def namespace(extra_key) -> str:
    return "base" if extra_key is None else f"salt {extra_key}"


def names_of(ids, salt) -> list[bytes]:
    return chain(first_key(namespace(salt)), np.array(ids).reshape(-1, PAGE))


def files_of(files, ids, salt) -> int:
    """Tokens of the leading pages that have good files."""
    keys = names_of(ids, salt)
    return PAGE * next((i for i, key in enumerate(keys) if files.get(key) is None), len(keys))


class AgainstTwoDictionaries(RuleBasedStateMachine):
    """Whatever is read holds its own tokens and all before them; what has a good file is found by an engine that has nothing."""

    ids = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(
        lambda pages: [t for page in pages for t in (page, 7)]
    )
    salt = st.sampled_from([None, "a"])

    @initialize(policy=st.sampled_from(sorted(HITS)), host=st.sampled_from([9, 200]), prefetch=st.sampled_from(
        ["wait_complete", "best_effort"]))  # fmt: skip
    def begin(self, policy, host, prefetch):
        hiradix_cache.LOAD_BACK_THRESHOLD = 1
        self.options, self.files = (policy, host), {}
        self.tiers = ThreeTiers(*self.options, self.files, prefetch)
        self.prefetch, self.waiting, self.named = prefetch, [], {}

    def compute(self, tiers: ThreeTiers, ids, salt) -> int | None:
        for page, key in enumerate(names_of(ids, salt)):
            self.named[key] = tiers.held(ids, page, salt)
        return tiers.request(ids, salt)

    @rule(ids=ids, salt=salt)
    def queue(self, ids, salt):
        self.waiting.append((self.tiers.queue(ids, salt), ids, salt))

    @precondition(lambda self: self.waiting)
    @rule()
    def enter(self):
        """The first of those that wait, if it may."""
        self.tiers.step()
        if self.tiers.prefetch.may_enter(self.waiting[0][0]):
            _, ids, salt = self.waiting.pop(0)
            self.compute(self.tiers, ids, salt)

    @rule(ids=ids, salt=salt)
    def request(self, ids, salt):
        """One that nobody has looked up."""
        self.compute(self.tiers, ids, salt)

    @rule(slots=st.integers(1, 12))
    def evict(self, slots):
        self.tiers.tree.evict(slots)

    @rule(pages=st.integers(1, 3))
    def forget_host(self, pages):
        """Others need room there."""
        tree = self.tiers.tree
        if (slots := tree.take_host(tree.host_pool.num_free_pages + pages)) is not None:
            tree.host_pool.free(slots)

    @rule()
    def pass_time(self):
        self.tiers.controller.send()
        if self.tiers.copies.waiting:
            self.tiers.copies.pass_time()

    @rule(data=st.data())
    def a_thread_runs(self, data):
        disk = self.tiers.disk
        if disk.looks:
            disk.look()
        if disk.writes:
            disk.write(data.draw(st.sampled_from(sorted(disk.writes))))
        if disk.unread():
            disk.read(disk.unread()[0])

    @precondition(lambda self: self.files)
    @rule(data=st.data(), damaged=st.booleans())
    def lose_a_file(self, data, damaged):
        key = data.draw(st.sampled_from(sorted(self.files)))
        if damaged:
            self.files[key] = None
        else:
            del self.files[key]

    @rule()
    def flush(self):
        self.tiers.tree.flush()
        self.tiers.step()

    @rule(ids=ids, salt=salt)
    def another_engine_asks(self, ids, salt):
        """It has nothing but the files, and finds all that are good."""
        self.tiers.controller.send()
        self.tiers.disk.run()
        there = files_of(self.files, ids, salt)
        other = ThreeTiers(self.options[0], 200, self.files)
        req = other.queue(ids, salt)
        for _ in range(3):  # names, pages, the tree
            other.disk.run()
            other.step()
        assert other.prefetch.may_enter(req)
        assert self.compute(other, ids, salt) == there
        other.disk.run()
        other.check()
        check_host(other.tree)

    @rule()
    def begin_anew(self):
        """The engine ends: what is ordered is written."""
        self.tiers.controller.send()
        self.tiers.disk.run()
        self.tiers = ThreeTiers(*self.options, self.files, self.prefetch)
        self.waiting = []

    @invariant()
    def nothing_is_lost(self):
        self.tiers.check()

    @invariant()
    def a_file_holds_what_its_name_says(self):
        for key, held in self.files.items():
            assert held in (None, self.named.get(key))

    def teardown(self):
        hiradix_cache.LOAD_BACK_THRESHOLD = 10


TestAgainstTwoDictionaries = AgainstTwoDictionaries.TestCase
TestAgainstTwoDictionaries.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
