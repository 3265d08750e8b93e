"""From a look-up to pages of the tree: how long it is waited for, and what has become of tree and host meanwhile."""

from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from ch07_sglang_radix.quantization import prefetch as module
from ch07_sglang_radix.quantization.hicache import check_host
from ch07_sglang_radix.quantization.prefetch import PREFETCH_S, PREFETCH_S_A_TOKEN, StoragePrefetch
from ch07_sglang_radix.quantization.storage_controller import READ
from common.storage.page_keys import chain, first_key
from tests.ch07.quantization.test_hiradix_cache import PAGE, Tiers

IDS = [1, 2, 3, 4, 5, 6, 7, 8]


class Disk:
    """Of one rank, without files: a look-up ends when it is told what it has found, a read when it is told how many are good."""

    def __init__(self):
        self.store, self.backlog = SimpleNamespace(seed=b""), 0
        self.asked: list[Future] = []
        self.reading: dict[int, int | None] = {}  # ticket -> good pages, once they are read
        self.pages = 0  # ordered in the last read

    def submit(self, look_up, *args) -> Future:
        self.asked.append(Future())
        return self.asked[-1]

    def obey(self, kind, words) -> None:
        if kind == READ:
            self.reading[words[0]], self.pages = None, words[1]

    def wait_for(self, pages) -> None:
        """Nothing is being written."""

    def done(self, ticket) -> bool:
        return self.reading[ticket] is not None

    def settle(self, ticket, wait) -> int:
        return self.reading.pop(ticket) or 0


class Waiting:
    """A tree whose first `known` tokens of IDS are on the host, and request 0 that waits for the rest from a disk."""

    def __init__(self, policy: str = "wait_complete", known: int = 0, host: int = 20):
        self.tiers = tiers = Tiers("write_through", host)
        self.tree, self.disk = tiers.tree, Disk()
        tiers.controller.storage = self.disk
        self.prefetch = StoragePrefetch(tiers.tree, tiers.controller, policy, 2 * PAGE, lambda extra_key: "base")
        self.prefetch._looks.shutdown()
        self.prefetch._looks = self.disk
        if known:
            tiers.request(IDS[:known])
            tiers.tree.evict(99)
        self.req = SimpleNamespace(rid=0, extra_key=None, probe=False, session=None, matchable_ids=IDS)
        self.prefetch.begin(self.req)

    def find(self, start: int) -> None:
        """The look-up ends: what lies behind `start` has files."""
        self.disk.asked[0].set_result(chain(first_key("base"), np.array(IDS).reshape(-1, PAGE))[start // PAGE :])

    def step(self) -> bool:
        """As hicache.py between two steps: may the request enter?"""
        self.prefetch.look()
        self.tiers.controller.send()
        check_host(self.tree)
        return self.prefetch.may_enter(self.req)

    def read(self, good: int) -> None:
        (ticket,) = self.disk.reading
        self.disk.reading[ticket] = good

    def on_host(self) -> int:
        return self.tree.deepest(self.tree.key(IDS), None)[1]


@pytest.fixture
def clock(monkeypatch):
    """It stands still, but for whoever adds to clock.now."""
    now = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.now))
    return now


@pytest.mark.parametrize("policy", ["best_effort", "timeout", "wait_complete"])
def test_a_look_up_that_has_ended_is_never_late(clock, policy):
    """Steps of others may be longer than all that anybody waits for."""
    waiting = Waiting(policy)
    assert not waiting.step()
    waiting.find(0)
    clock.now += 50
    assert not waiting.step()
    assert waiting.disk.pages == 4
    waiting.read(4)
    clock.now += 50
    assert waiting.step()
    assert waiting.on_host() == len(IDS) == waiting.prefetch.fetched


@pytest.mark.parametrize("policy", ["best_effort", "timeout", "wait_complete"])
def test_a_look_up_that_takes_its_time_is_waited_for_a_second(clock, policy):
    waiting = Waiting(policy)
    assert not waiting.step()
    clock.now += 0.99 * PREFETCH_S
    assert not waiting.step()
    clock.now += 0.02 * PREFETCH_S
    assert waiting.step() == (policy != "wait_complete")
    waiting.find(0)
    assert waiting.step() == (policy != "wait_complete")
    assert len(waiting.disk.reading) == (policy == "wait_complete")


def test_the_time_of_a_read_begins_with_it(clock):
    waiting = Waiting("timeout")
    waiting.find(0)
    clock.now += 50
    assert not waiting.step()
    clock.now += PREFETCH_S + 0.99 * PREFETCH_S_A_TOKEN * len(IDS)
    assert not waiting.step()
    clock.now += 0.02 * PREFETCH_S_A_TOKEN * len(IDS)
    assert waiting.step()


def test_best_effort_waits_for_no_read_once_somebody_could_enter(clock):
    waiting = Waiting("best_effort")
    waiting.find(0)
    for _ in range(3):  # in the queue, and not at the gate
        waiting.prefetch.look()
        waiting.tiers.controller.send()
        clock.now += 50
    assert waiting.prefetch.under_way
    assert not waiting.step()
    assert waiting.step()


def test_what_was_found_behind_pages_that_have_been_forgotten_is_not_read():
    waiting = Waiting(known=4, host=4)
    waiting.tree.host_pool.free(waiting.tree.take_host(4))  # somebody else had the room meanwhile
    waiting.find(4)
    assert waiting.step()
    assert not waiting.disk.reading
    assert waiting.on_host() == 0


def test_where_the_host_has_no_room_nothing_is_read_and_nothing_forgotten():
    waiting = Waiting(known=4, host=3)
    waiting.find(4)
    assert waiting.step(), "two pages are wanted, one is free, and the others are what they go on from"
    assert not waiting.disk.reading
    assert waiting.on_host() == 4


def test_room_is_made_by_others_than_those_it_goes_on_from():
    waiting = Waiting(known=4, host=4)
    waiting.tiers.request([9, 9, 8, 8])
    waiting.tree.evict(99)
    waiting.find(4)
    assert not waiting.step()
    assert waiting.on_host() == 4
    waiting.read(2)
    assert waiting.step()
    assert waiting.on_host() == len(IDS)


def test_what_others_have_computed_meanwhile_is_not_kept_twice():
    waiting = Waiting(known=4)
    waiting.find(4)
    waiting.tiers.request(IDS[:6])
    assert not waiting.step()
    assert waiting.disk.pages == 2
    waiting.read(2)
    assert waiting.step()
    assert waiting.on_host() == len(IDS)
    assert waiting.tree.host_pool.size - waiting.tree.host_pool.free_slots == len(IDS)


def test_a_read_that_ends_behind_pages_that_have_been_forgotten_is_nobodys():
    waiting = Waiting(known=4, host=4)
    waiting.find(4)
    assert not waiting.step()
    waiting.tree.host_pool.free(waiting.tree.take_host(2))
    waiting.read(2)
    assert waiting.step()
    assert waiting.on_host() == 0
    assert waiting.tree.host_pool.free_slots == waiting.tree.host_pool.size


@pytest.mark.parametrize("read", [False, True])
def test_a_flush_gives_back_what_is_being_read_for_nobody(read):
    waiting = Waiting()
    waiting.find(0)
    assert not waiting.step()
    waiting.tree.flush()
    if read:
        waiting.read(4)
    assert waiting.step()
    assert waiting.on_host() == 0
    assert waiting.tree.host_pool.free_slots == waiting.tree.host_pool.size


def test_a_look_up_that_ends_after_a_flush_reads_nothing():
    waiting = Waiting()
    waiting.tree.flush()
    waiting.find(0)
    assert waiting.step()
    assert not waiting.disk.reading
