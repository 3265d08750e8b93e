"""Names and connections, with a resolver of the test's own; nobody waits for what does not come."""

import socket
import threading

import pytest

from common.distributed import reach
from common.distributed.reach import connect, in_time, lookup


@pytest.fixture
def dead_resolver(monkeypatch):
    """Names are looked up until the test is over; digits need nobody. -> the names that were asked for."""
    over, asked, real = threading.Event(), [], socket.getaddrinfo

    def getaddrinfo(host, port, *, flags=0, **more):
        if not flags & socket.AI_NUMERICHOST:
            asked.append(host)
            over.wait(60)
        return real(host, port, flags=flags, **more)

    monkeypatch.setattr(reach.socket, "getaddrinfo", getaddrinfo)
    yield asked
    over.set()


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_what_comes_in_time_comes_back_and_so_does_its_error():
    assert in_time(lambda: 7, 60, "it") == 7
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 / 0, 60, "it")
    with pytest.raises(TimeoutError, match="its own"):
        in_time(lambda: (_ for _ in ()).throw(TimeoutError("its own")), 60, "it")


def test_a_name_that_nobody_looks_up_is_given_up(dead_resolver):
    with pytest.raises(TimeoutError, match=r"the lookup of 'trainer.local' takes longer than 0.05 s"):
        connect("trainer.local", 1, 0.05)
    assert dead_resolver == ["trainer.local"]


def test_digits_are_looked_up_nowhere(dead_resolver, listener):
    connect("127.0.0.1", listener.getsockname()[1], 60).close()
    assert dead_resolver == []


def test_so_many_lookups_hang_and_no_more_threads_begin(dead_resolver, monkeypatch):
    monkeypatch.setattr(reach, "_free", threading.BoundedSemaphore(3))
    for i in range(5):
        with pytest.raises(TimeoutError, match="longer than" if i < 3 else "names are being looked up"):
            lookup(f"trainer-{i}.local", 1, 0.05)
    assert len(dead_resolver) == 3


def test_a_lookup_that_is_done_makes_room(monkeypatch, listener):
    monkeypatch.setattr(reach, "_free", threading.BoundedSemaphore(1))
    for _ in range(3):
        connect("localhost", listener.getsockname()[1], 60).close()


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "\ud800", "x" * 300])
def test_what_cannot_be_a_name_is_an_oserror_too(host):
    with pytest.raises(OSError, match="is no name of a host"):
        lookup(host, 1, 60)


def test_the_next_address_is_tried_and_the_last_one_s_error_told(monkeypatch, listener):
    here, port = listener.getsockname()
    with socket.socket() as bound:  # and nobody listens
        bound.bind((here, 0))
        deaf = (here, bound.getsockname()[1])
        infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in (deaf, (here, port))]
        monkeypatch.setattr(reach, "lookup", lambda *_: infos)
        with connect("trainer.local", port, 60) as link:
            assert link.getpeername() == (here, port)
        infos.reverse()
        infos.pop(0)
        with pytest.raises(ConnectionRefusedError):
            connect("trainer.local", port, 60)
