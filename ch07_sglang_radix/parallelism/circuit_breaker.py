"""Whether to ask a worker at all that has failed lately.

    closed      it is asked; so many failures one behind the other        -> open
    open        it is not asked, for timeout_s                            -> half open
    half open   one request at a time; a failure                          -> open
                so many successes                                         -> closed

A worker that hangs costs each request that is sent to it a timeout; an open breaker costs nothing. In half-open state whoever is
let through is the test. With a policy that prefers others, as cache_aware does, no request may ever come by, and the breaker would
stay half open for good; so a health check that is passed counts as a success too.

The names of states and thresholds are those of SGLang's router (sgl-model-gateway, --cb-failure-threshold ...).
"""

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """failure_threshold, success_threshold: in a row. clock: seconds."""

    def __init__(
        self, failure_threshold: int = 10, success_threshold: int = 3, timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.failure_threshold, self.success_threshold = failure_threshold, success_threshold
        self.timeout_s, self._clock = timeout_s, clock
        self._in_a_row = 0  # failures while it is closed, successes while it is half open
        self._opened_at: float | None = None
        self._testing = False  # half open, and a request is on its way

    @property
    def state(self) -> State:
        if self._opened_at is None:
            return "closed"
        return "half_open" if self._clock() - self._opened_at >= self.timeout_s else "open"

    def allows(self) -> bool:
        """May a request be sent now? Nothing changes by asking."""
        return self.state == "closed" or (self.state == "half_open" and not self._testing)

    def begin(self) -> None:
        """A request is sent."""
        self._testing = self.state == "half_open"

    def succeeded(self) -> None:
        state, self._testing = self.state, False
        if state == "closed":
            self._in_a_row = 0
        elif state == "half_open":
            self._in_a_row += 1
            if self._in_a_row >= self.success_threshold:
                self._opened_at, self._in_a_row = None, 0

    def failed(self) -> None:
        state, self._testing = self.state, False
        if state == "closed":
            self._in_a_row += 1
        if state == "half_open" or (state == "closed" and self._in_a_row >= self.failure_threshold):
            self._opened_at, self._in_a_row = self._clock(), 0

    def left(self) -> None:
        """The client has gone, so that nobody knows how it would have ended."""
        self._testing = False
