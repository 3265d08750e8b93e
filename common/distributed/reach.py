"""Where a name leads, and whether somebody listens there: an answer in a bounded time, whatever the network does.

    with connect("trainer.local", 29500, within_s=5) as link: ...

The system's resolver has no time limit that a caller could set: with a name server that does not answer, getaddrinfo returns
after 10 s, 30 s or minutes, as /etc/resolv.conf has it. So it runs in a thread, which is left behind when the time is up and ends
when the resolver does. An address that is written in digits is looked up nowhere.
"""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from common.values import shown

LOOKUPS = 64  # at once, those that were left behind among them: strangers' names shall not become a thread each

Result = TypeVar("Result")
_free = threading.BoundedSemaphore(LOOKUPS)


def in_time(call: Callable[[], Result], within_s: float, what: str) -> Result:
    """What `call` returns or raises; TimeoutError if it is not back in time, and then it goes on in its thread, unheard."""
    done: Future[Result] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=work, name=what, daemon=True).start()
    if not wait([done], within_s).done:
        raise TimeoutError(f"{what} takes longer than {within_s:g} s")
    return done.result()


def literal(host: str, port: int) -> list[tuple[Any, ...]]:
    """The same of an address in digits, and of a name nothing; nobody is asked. Raises OSError for what is neither."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:  # a name
        return []
    except ValueError:  # a UnicodeError is one: too long between two dots, half a surrogate pair
        raise OSError(f"{shown(host)} is no name of a host") from None


def lookup(host: str, port: int, within_s: float) -> list[tuple[Any, ...]]:
    """As socket.getaddrinfo, of a stream. Raises OSError: TimeoutError, socket.gaierror, or of what cannot be a name at all."""
    if at_once := literal(host, port):
        return at_once
    free = _free
    if not free.acquire(timeout=within_s):
        raise TimeoutError(f"{LOOKUPS} names are being looked up, and none is found")

    def look() -> list[tuple[Any, ...]]:
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        finally:
            free.release()

    return in_time(look, within_s, f"the lookup of {shown(host)}")


def connect(host: str, port: int, within_s: float) -> socket.socket:
    """To the first of its addresses that takes it, all in this time. Raises OSError of the last one, or TimeoutError."""
    deadline = time.monotonic() + within_s
    wrong: OSError = OSError(f"{shown(host)} has no address")
    for family, kind, protocol, _, address in lookup(host, port, within_s):
        link = socket.socket(family, kind, protocol)
        try:
            link.settimeout(max(deadline - time.monotonic(), 1e-3))
            link.connect(address)
            return link
        except OSError as error:
            link.close()
            wrong = error
    raise wrong
