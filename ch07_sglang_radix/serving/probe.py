"""Does anything come back? /health asks with a request of one token, if no answer of anybody's comes meanwhile.

It is counted nowhere and cached nowhere. SGLang: the same request (input_ids [0]), and 20 s, in entrypoints/http_server.py.
"""

import asyncio
from collections.abc import Callable

from ch07_sglang_radix.serving.channels import Push
from ch07_sglang_radix.serving.messages import TokenizedGenerate

PROBE_S = 20.0  # SGLang's HEALTH_CHECK_TIMEOUT
PARAMS = {"max_new_tokens": 1, "ignore_eos": True}


class Probe:
    """At most one is on its way. failed: nothing will ever come."""

    def __init__(self, scheduler: Push, number: Callable[[], int], failed: Callable[[], bool]):
        self._scheduler, self._number, self._failed = scheduler, number, failed
        self._signs_of_life = 0  # messages about requests so far
        self._ticket: int | None = None

    def heard(self) -> None:
        """A message about requests has come."""
        self._signs_of_life += 1

    def ended(self, ticket: int) -> None:
        """An answer that no caller waits for: the probe's, if it is that one."""
        if ticket == self._ticket:
            self._ticket = None

    async def sign_of_life(self) -> bool:
        before = self._signs_of_life
        while self._signs_of_life == before:
            if self._failed():
                return False
            if self._ticket is None:  # a replica that died took it along, or there was none
                self._ticket = self._number()
                self._scheduler.send(TokenizedGenerate(self._ticket, "health", [0], PARAMS, {}, probe=True))
            await asyncio.sleep(0.01)
        return True
