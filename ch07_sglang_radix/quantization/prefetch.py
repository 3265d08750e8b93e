"""What rank 0 decides about the disk: which nodes are written, and for whom pages are fetched before it may enter.

    a node gets a host copy     its pages are written to files, too
    a request is queued         what no tier of the tree has of it: how many pages have files? A thread makes their names and looks
    they are there              they are read into host pages
    it asks to enter            it waits for their names, 1 s at most but with wait_complete, and for what is read: best_effort
                                enters with what has been read by the next step; wait_complete when all has been; timeout
                                when 1 s and 0.25 s for each 1024 tokens have gone by since reading began
    pages have been read        they are nodes of the tree, with a host copy: from here on as if the host had never lost them

Reading goes on while the request waits in the queue, and others run. Names and their order: common/storage/page_keys.py.
SGLang 0.5.23: HiRadixCache.prefetch_from_storage, check_prefetch_progress.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ch07_sglang_radix.quantization.cache_controller import HiCacheController
from ch07_sglang_radix.quantization.hiradix_cache import HiRadixCache, TieredNode
from ch07_sglang_radix.quantization.storage_controller import READ, SETTLE, WRITE, page_words
from ch07_sglang_radix.radix_cache import NO_SLOTS
from ch07_sglang_radix.request import Req
from common.storage.page_keys import as_words, chain, first_key

MAX_BACKLOG = 4096  # pages that wait to be written; more are not written, or the host would be full of them
PREFETCH_S, PREFETCH_S_A_TOKEN = 1.0, 0.25 / 1024  # of the policy timeout; SGLang's. A look-up has the first


@dataclass(eq=False)
class Prefetch:
    """ids[start : start + len(slots)] are being read into `slots` of the host; before that (ticket 0), it is looked up which of
    them have files: `found`, their names. deadline: of the look-up, and then of the reading. wanted: somebody could enter."""

    ids: np.ndarray
    extra_key: Hashable
    start: int
    first: bytes
    rids: set[int]
    found: Future[list[bytes]]
    deadline: float
    slots: np.ndarray = field(default_factory=lambda: NO_SLOTS)
    ticket: int = 0
    wanted: bool = False
    void: bool = False  # what it reads is nobody's any more


class StoragePrefetch:
    """namespace: what an extra_key is called on the disk, the same in every engine; None if it is this engine's alone."""

    def __init__(
        self, tree: HiRadixCache, controller: HiCacheController, policy: str, threshold: int,
        namespace: Callable[[Hashable], str | None],
    ):  # fmt: skip
        self.tree, self.controller, self.storage = tree, controller, controller.storage
        self.policy, self.threshold, self.namespace = policy, threshold, namespace
        self.under_way: list[Prefetch] = []
        self._looks = ThreadPoolExecutor(1, "hicache-names")
        self.mixed = False  # may the tree hold what earlier weights have computed? Then nothing of it is written
        self.fetched = 0  # tokens
        tree.backed_up.append(self._write)
        tree.dropped.append(self._give_up)
        tree.more_host_owners.append(self._owners)

    # --- down

    def _write(self, node: TieredNode) -> None:
        if self.mixed or self.namespace(node.extra_key) is None or self.storage.backlog > MAX_BACKLOG:
            return
        pages = node.host_value[:: self.tree.page_size] // self.tree.page_size
        self.controller.order(WRITE, *page_words(pages, as_words(self._keys(node))))

    def _keys(self, node: TieredNode) -> list[bytes]:
        """Of a node's pages; a path is named from its beginning on."""
        path = []
        while node.parent is not None and node.hashes is None:
            path.append(node)
            node = node.parent
        last = first_key(self.namespace(path[0].extra_key)) if path and node.parent is None else node.hashes[-1]
        for one in reversed(path):
            one.hashes = chain(last, one.key.reshape(-1, self.tree.page_size))
            last = one.hashes[-1]
        return path[0].hashes if path else node.hashes

    # --- up

    def begin(self, req: Req) -> None:
        """It has just been queued."""
        tree, P = self.tree, self.tree.page_size
        name = self.namespace(req.extra_key)
        if name is None or req.probe or req.session is not None:
            return
        key = tree.key(req.matchable_ids)
        node, start = tree.deepest(key, req.extra_key)
        if len(key) - start < self.threshold:
            return
        last = self._keys(node)[-1] if start else first_key(name)
        first = chain(last, key[start : start + P].reshape(1, P))[0]
        for other in self.under_way:
            if other.first == first and not other.void:  # a second one with the same beginning waits for the same pages
                other.rids.add(req.rid)
                return
        found = self._looks.submit(self._look_up, last, key[start:].reshape(-1, P), self.storage.store.seed)
        self.under_way.append(
            Prefetch(key, req.extra_key, start, first, {req.rid}, found, time.monotonic() + PREFETCH_S)
        )

    def _look_up(self, last: bytes, pages: np.ndarray, seed: bytes) -> list[bytes]:
        """In a thread: a long prompt has a thousand names, and the disk may take its time to say what it has."""
        keys = chain(last, pages)
        return keys[: self.storage.store.leading(keys, seed)]

    def _read(self, one: Prefetch, keys: list[bytes]) -> bool:
        """Have them read. False: there is nothing to read, or no room for it."""
        tree, P = self.tree, self.tree.page_size
        node, known = tree.deepest(one.ids, one.extra_key)
        if len(keys) * P < self.threshold or known < one.start:  # what they go on from has been forgotten
            return False
        tree.inc_lock_ref(node)  # and is not, for their room
        slots = tree.take_host(len(keys))
        tree.dec_lock_ref(node)
        if slots is None:
            return False
        self.controller.newest += 1
        one.slots, one.ticket = slots, self.controller.newest
        one.deadline = time.monotonic() + PREFETCH_S + PREFETCH_S_A_TOKEN * len(slots)  # a long step may lie behind
        self.controller.order(READ, one.ticket, *page_words(slots[::P] // P, as_words(keys)))
        return True

    def may_enter(self, req: Req) -> bool:
        for one in self.under_way:
            if req.rid in one.rids:
                one.wanted = True
                return False
        return True

    def look(self) -> None:
        """Between two steps: what has been found is read, and what has been read becomes the tree's. What this orders is sent
        before the next look."""
        for one in list(self.under_way):
            if one.ticket:
                goes_on = self._goes_on_reading(one)
            elif (
                one.found.done() and not one.void
            ):  # before it is asked whether it is late: steps are longer than look-ups
                goes_on = self._read(one, one.found.result())
            else:
                goes_on = not (one.void or self._late(one))
            if not goes_on:
                self.under_way.remove(one)

    def _late(self, one: Prefetch) -> bool:
        """Has been waited for it as long as the policy allows?"""
        past = time.monotonic() > one.deadline
        if self.policy == "best_effort":  # without names nothing would ever be read
            return one.wanted and (past or one.ticket > 0)
        return self.policy == "timeout" and past

    def _goes_on_reading(self, one: Prefetch) -> bool:
        done = self.storage.done(one.ticket)
        if not (done or one.void or self._late(one)):
            return True
        good = self.controller.ask(SETTLE, one.ticket, int(done)) * self.tree.page_size
        self.tree.host_pool.free(one.slots[good:])
        if one.void:
            self.tree.host_pool.free(one.slots[:good])
        else:
            self.fetched += good
            self.tree.insert_host(one.ids, one.start, one.slots[:good], one.extra_key)
        return False

    def at_new_weights(self, holders: Iterable[Any]) -> None:
        """holders: of what is cached. Where the old weights' pages may still be found, since nobody has flushed the tree, they and
        all that is computed behind them would get names of the new weights."""
        self._give_up()
        self.mixed = any(self.namespace(one.extra_key) is not None for one in holders)

    def _give_up(self) -> None:
        self.controller.forget(WRITE)
        self.mixed = False
        for one in self.under_way:
            one.void = True

    def close(self) -> None:
        self._looks.shutdown(cancel_futures=True)

    def _owners(self) -> Iterator[tuple[str, np.ndarray]]:
        for one in self.under_way:
            yield f"prefetch {one.ticket}", one.slots[:: self.tree.page_size] // self.tree.page_size
