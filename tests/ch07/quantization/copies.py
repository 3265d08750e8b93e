"""Tiers without a model: what a page holds is the tokens up to its end, and copies are done as late as they may be."""

from collections import deque

import numpy as np


class Copies:
    """A control plane and a rank's pages in one, for HiCacheController: `device` and `host`, page -> what lies there.

    A copy runs when somebody is sent after it, or when `pass_time` says so, and never before: whoever should have been sent after
    it and was not, finds the wrong pages.
    """

    def __init__(self):
        self.device: dict[int, bytes] = {}
        self.host: dict[int, bytes] = {}
        self.waiting: deque = deque()
        self.wings = {}
        self.newest = 0

    def send_task(self, task) -> None:
        """No other ranks."""

    def store(self, ticket, device_pages, host_pages) -> None:
        self.waiting.append((ticket, self.device, device_pages, self.host, host_pages))
        self.newest = ticket

    def load(self, ticket, host_pages, device_pages) -> None:
        self.waiting.append((ticket, self.host, host_pages, self.device, device_pages))
        self.newest = ticket

    def join(self, ticket) -> None:
        while self.waiting and self.waiting[0][0] <= ticket:
            self.pass_time()

    def done(self) -> int:
        return self.waiting[0][0] - 1 if self.waiting else self.newest

    def pass_time(self) -> None:
        _, there, sources, here, targets = self.waiting.popleft()
        for source, target in zip(np.array(sources).tolist(), np.array(targets).tolist(), strict=True):
            here[target] = there[source]

    def last_copy(self) -> None:
        return None

    def close(self) -> None: ...
