"""When a worker that fails is asked again."""

import pytest

from ch07_sglang_radix.parallelism.circuit_breaker import CircuitBreaker


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return CircuitBreaker(failure_threshold=3, success_threshold=2, timeout_s=10, clock=clock)


def fail(breaker, times):
    for _ in range(times):
        breaker.begin()
        breaker.failed()


def test_it_opens_after_so_many_failures_in_a_row_and_no_fewer(breaker):
    fail(breaker, 2)
    breaker.begin()
    breaker.succeeded()
    fail(breaker, 2)
    assert (breaker.state, breaker.allows()) == ("closed", True)
    fail(breaker, 1)
    assert (breaker.state, breaker.allows()) == ("open", False)


def test_half_open_lets_one_through_and_closes_after_so_many_successes(breaker, clock):
    fail(breaker, 3)
    clock.now = 9.9
    assert breaker.state == "open"
    clock.now = 10.0
    assert (breaker.state, breaker.allows()) == ("half_open", True)
    breaker.begin()
    assert not breaker.allows(), "one at a time"
    breaker.succeeded()
    assert (breaker.state, breaker.allows()) == ("half_open", True)
    breaker.begin()
    breaker.succeeded()
    assert breaker.state == "closed"


def test_a_failure_while_half_open_opens_it_for_the_whole_time_again(breaker, clock):
    fail(breaker, 3)
    clock.now = 12.0
    fail(breaker, 1)
    clock.now = 21.9
    assert breaker.state == "open"
    clock.now = 22.0
    assert breaker.state == "half_open"


def test_a_client_that_leaves_decides_nothing(breaker, clock):
    fail(breaker, 3)
    clock.now = 10.0
    breaker.begin()
    breaker.left()
    assert (breaker.state, breaker.allows()) == ("half_open", True)


def test_what_was_sent_before_it_opened_changes_nothing(breaker):
    fail(breaker, 3)
    breaker.succeeded()
    breaker.failed()
    assert breaker.state == "open"
