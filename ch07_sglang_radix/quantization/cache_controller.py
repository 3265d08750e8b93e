"""Copies between the tiers: rank 0 orders, every rank copies its own pages, in the order of the orders.

    rank 0                                                  every rank
    STORE ticket, n, device pages, host pages      ->       queue the copy, behind all that is computed so far
    LOAD  ticket, n, host pages, device pages      ->       the same
    JOIN  ticket                                   ->       what is computed from now on comes after that copy
    WRITE, READ, SETTLE                            ->       the disk's: storage_controller.py

An order is a WingTask, sent between two steps: what a step decides is collected, and sent before the next one begins. So an order
needs no answer. Host pages may be given out again at once, since copies run in their order; device pages once a JOIN has been
ordered. On a GPU a LOAD that somebody waits for is joined when rank 0 sees that its own copy is done: steps of others have gone on
meanwhile, and on the other ranks there is little or nothing left to wait for. SGLang 0.5.23:
srt/managers/cache_controller.py, HiCacheController.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from ch07_sglang_radix.control_plane import ControlPlane
from ch07_sglang_radix.quantization.storage_controller import StorageController
from ch07_sglang_radix.tasks import WingTask
from common.attention.host_pool import HostKVPool

WING = 4  # this wing's number on the wire
STORE, LOAD, JOIN = 1, 2, 3


class HiCacheController:
    """One rank's end. newest: the ticket that was given last; joined: all tickets up to this one are joined, or will be before the
    next step (both rank 0's). storage: of this rank, if there is a disk tier."""

    def __init__(self, control: ControlPlane, pool: HostKVPool, storage: StorageController | None = None):
        self.control, self.pool, self.storage = control, pool, storage
        self.newest = self.joined = 0
        self.loading: deque[int] = deque()  # loads that are not joined, the oldest first
        self._orders: list[tuple[int, ...]] = []
        control.wings[WING] = self.obey

    # --- rank 0

    def store(self, device_pages: np.ndarray, host_pages: np.ndarray) -> int:
        return self._order_copy(STORE, device_pages, host_pages)

    def load(self, host_pages: np.ndarray, device_pages: np.ndarray) -> int:
        ticket = self._order_copy(LOAD, host_pages, device_pages)
        self.loading.append(ticket)
        return ticket

    def join(self, ticket: int) -> None:
        """The copies up to this one are waited for by what is computed next."""
        self.order(JOIN, ticket)
        self.joined = max(self.joined, ticket)
        while self.loading and self.loading[0] <= self.joined:
            self.loading.popleft()

    def _order_copy(self, kind: int, sources: np.ndarray, targets: np.ndarray) -> int:
        self.newest += 1
        self.order(kind, self.newest, len(sources), *sources.tolist(), *targets.tolist())
        return self.newest

    def order(self, *words: int) -> None:
        """Done on every rank before the next step."""
        self._orders.append(words)

    def forget(self, *kinds: int) -> None:
        """Orders of these kinds that have not been sent are not done: what they would copy is nobody's any more."""
        self._orders = [words for words in self._orders if words[0] not in kinds]

    def send(self) -> None:
        """Between two steps: what was ordered is done."""
        orders, self._orders = self._orders, []
        for words in orders:
            self.control.send_task(WingTask(0, WING, words))
            self.obey(words)

    def ask(self, kind: int, *words: int) -> int:
        """Between two steps: an order that all ranks answer together."""
        self.send()
        self.control.send_task(WingTask(0, WING, (kind, *words)))
        return self.storage.settle(*words)

    def look(self, idle: bool) -> None:
        """Before a step: join the loads that are done here, or all if nobody would wait for them."""
        self.send()
        if self.loading:
            done = self.newest if idle else self.pool.done()
            if ready := [ticket for ticket in self.loading if ticket <= done]:
                self.join(ready[-1])

    # --- every rank

    def obey(self, words: Sequence[int]) -> None:
        kind, *rest = words
        if kind not in (STORE, LOAD, JOIN):
            self.storage.obey(kind, rest)
            return
        ticket, *rest = rest
        if kind == JOIN:
            self.pool.join(ticket)
            return
        pages = np.array(rest[1:], dtype=np.int64)
        sources, targets = pages[: rest[0]], pages[rest[0] :]
        if kind == LOAD:
            self.pool.load(ticket, sources, targets)
            return
        if self.storage:
            self.storage.wait_for(targets.tolist())
        self.pool.store(ticket, sources, targets)

    def close(self) -> None:
        if self.storage:
            self.storage.close()
        self.pool.close()
