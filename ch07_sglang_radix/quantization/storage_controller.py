"""The disk below the host's memory, on one rank: threads that write and read its pages' files while steps go on.

    rank 0                                                  every rank
    WRITE n, host pages, keys                      ->       threads write, once the copy to the host is done
    READ  ticket, n, host pages, keys              ->       threads read
    SETTLE ticket, wait                            ->       how many pages are good, from the first one on?
                                             <- all-gather [1] ->    the MINIMUM over all ranks counts

A page is of use where all ranks have it: a rank whose file is missing, damaged or late says so, and rank 0 counts what is behind
it as not there, for all of them. wait=0 gives up what has not been read yet. A host page that a thread still reads or writes is not
written over: whoever wants to, waits for the thread, on this rank and without asking another. Readers and writers are threads of
their own, so a page that is asked for before this rank has written it is missing. SGLang 0.5.23:
srt/managers/cache_controller.py (prefetch_thread_func and its all_reduce of the minimum).
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as futures_wait
from itertools import takewhile

import numpy as np
import torch

from common.attention.host_pool import HostKVPool
from common.parallel_state import TPGroup, all_gather
from common.storage.page_keys import from_words
from common.storage.page_store import PageStore

WRITE, READ, SETTLE = 4, 5, 6
# Readers at most; checksums and files let Python's other threads run, and somebody waits for what is read. On H200s 940 MB came
# from files after 172 ms with sixteen, and after 237 with eight and a later form of the reading
READERS = 16
# The thread that queues steps waits for Python's lock behind every thread that is between two calls of the system: steps took
# 19.1 ms with sixteen writers, done after 219 ms, and 4.1 with four, after 236, as without any (bench_tiers --part beside, H200s)
WRITERS = 4


class Reading:
    """Pages on their way from files. Thread i of n reads pages i, i + n, ...: those in front come first, and a thread is begun once
    and not for each page. good: of each page, once it is known."""

    def __init__(self, count: int):
        self.good: list[bool | None] = [None] * count
        self.given_up = False
        self.threads: list[Future] = []

    def read(self, one: Callable[[int], bool], first: int, step: int) -> None:
        for i in range(first, len(self.good), step):
            if self.given_up:
                return
            self.good[i] = one(i)

    @property
    def done(self) -> bool:
        return all(thread.done() for thread in self.threads)

    def end(self) -> int:
        """Wait for what runs: it writes into pages that others will get. Good pages, from the first one on."""
        for thread in self.threads:
            if not thread.cancel():
                thread.result()
        return sum(takewhile(bool, self.good))


class StorageController:
    """writes: whether this rank has to; of latent rows, which are alike on all ranks, rank 0's files serve everybody."""

    def __init__(self, store: PageStore, pool: HostKVPool, group: TPGroup, writes: bool = True):
        self.store, self.pool, self.group, self.writes = store, pool, group, writes
        self._size = min(READERS, os.cpu_count() or 1)
        self._readers = ThreadPoolExecutor(self._size, "hicache-reads")
        self._writers = ThreadPoolExecutor(WRITERS, "hicache-writes")
        self._writing: dict[int, Future] = {}  # by host page
        self._reading: dict[int, Reading] = {}  # by ticket

    @property
    def backlog(self) -> int:
        """Pages that are still to be written."""
        self._writing = {page: one for page, one in self._writing.items() if not one.done()}
        return len(self._writing)

    def obey(self, kind: int, words: Sequence[int]) -> None:
        if kind == SETTLE:
            self.settle(*words)
            return
        ticket, words = (None, words) if kind == WRITE else (words[0], words[1:])
        count = words[0]
        pages, keys = words[1 : 1 + count], from_words(words[1 + count :])
        copied = self.pool.last_copy()  # the host's memory is touched after all that is on its way to or from it
        seed = self.store.seed  # of now: weights may change while a thread waits for its turn
        if kind == READ:
            self.wait_for(pages)
            self._reading[ticket] = self._begin(copied, pages, keys, seed)
        elif self.writes:
            for page, key in zip(pages, keys, strict=True):
                self._writing[page] = self._writers.submit(self._write, copied, page, key, seed)

    def wait_for(self, pages: Sequence[int]) -> None:
        """Before these host pages are written over: whoever still writes them to a file is done."""
        if self._writing:
            for page in pages:
                if one := self._writing.pop(page, None):
                    one.result()

    def done(self, ticket: int) -> bool:
        return self._reading[ticket].done

    def settle(self, ticket: int, wait: int) -> int:
        """Pages that are good on every rank, from the first one on. All ranks call it."""
        reading = self._reading.pop(ticket)
        if wait:
            futures_wait(reading.threads)
        reading.given_up = True
        mine = torch.tensor([reading.end()])
        counts = all_gather(mine, self.group, "good pages")  # COMM all-gather [1]: pages that each rank has read
        return min(int(one) for one in counts)

    def close(self) -> None:
        """What is being written is written; reads are given up."""
        for reading in self._reading.values():
            reading.given_up = True
        self._readers.shutdown()
        self._writers.shutdown()

    def _begin(
        self, copied: "torch.cuda.Event | None", pages: Sequence[int], keys: Sequence[bytes], seed: bytes
    ) -> Reading:
        reading, step = Reading(len(pages)), min(self._size, len(pages))

        def one(i: int) -> bool:
            if copied is not None:
                copied.synchronize()
            return self.store.read(keys[i], self.pool.page(pages[i]), seed)

        reading.threads = [self._readers.submit(reading.read, one, i, step) for i in range(step)]
        return reading

    # --- in a thread

    def _write(self, copied: "torch.cuda.Event | None", page: int, key: bytes, seed: bytes) -> bool:
        if copied is not None:
            copied.synchronize()
        return self.store.write(key, self.pool.page(page), seed)


def page_words(pages: np.ndarray, key_words: Sequence[int]) -> tuple[int, ...]:
    return (len(pages), *pages.tolist(), *key_words)
