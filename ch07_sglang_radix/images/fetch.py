"""A picture from the net, for a server that was told to fetch some: GET, and nothing that a stranger could aim at the inside.

Whoever sends a URL makes the SERVER ask for it, from inside its network: http://169.254.169.254/ is a cloud's credentials,
http://127.0.0.1:6379/ somebody's database (server-side request forgery). So a name is looked up once, every address that it has
must be one of the public net, and the connection goes to the address that was looked at, not to the name again, which may have
changed its mind meanwhile. Each redirect is a new URL, and meets the same. Bytes and seconds are counted over all of it, the
lookups of names among it.
"""

import http.client
import ipaddress
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import quote, urljoin, urlsplit

from common.distributed.reach import lookup
from common.values import shown

TIMEOUT_S = 10.0  # for all pictures of a request
MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
PRINTABLE = string.punctuation  # stays as it is in a path; other than ASCII is written as %E5%9B%BE


def fetch(url: str, max_bytes: int, timeout_s: float = TIMEOUT_S, public: Callable[[str], bool] | None = None) -> bytes:
    """The body. public: which addresses may be asked, by default those that are everybody's. Raises ValueError in one line."""
    deadline = time.monotonic() + timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        answer = _one(url, max_bytes, deadline, public or is_public)
        if isinstance(answer, bytes):
            return answer
        try:
            url = urljoin(url, answer)
        except ValueError:
            raise ValueError(f"{shown(url)} redirects to {shown(answer)}, which is no URL") from None
    raise ValueError(f"{shown(url)}: more than {MAX_REDIRECTS} redirects")


def is_public(address: str) -> bool:
    """Everybody's: not this machine, not this network, not a cloud's own. An IPv4 address in IPv6 clothes counts as what it is."""
    one = ipaddress.ip_address(address.partition("%")[0])
    if getattr(one, "is_site_local", False):  # fec0::/10, an older name of the inside
        return False
    inner = getattr(one, "ipv4_mapped", None) or getattr(one, "sixtofour", None)
    teredo = getattr(one, "teredo", None)
    every = [one, *([inner] if inner else []), *(teredo or ())]
    return all(each.is_global and not each.is_multicast and not each.is_reserved for each in every)


def _one(url: str, max_bytes: int, deadline: float, public: Callable[[str], bool]) -> bytes | str:
    """The body, or where it says that it is."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"{shown(url)} is no URL") from None
    if parts.scheme not in PORTS or not host:
        raise ValueError(f"{shown(url)}: pictures are fetched by http and https alone")
    if parts.username is not None:
        raise ValueError(f"{shown(parts.hostname)}: a URL with a user name in it is not fetched")
    port = port or PORTS[parts.scheme]
    address = _address(host, port, public, _left(url, deadline))
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    more = {"context": ssl.create_default_context()} if parts.scheme == "https" else {}
    connection = kind(host, port, timeout=_left(url, deadline), **more)
    # to the address that was looked at; the name stays what the certificate is compared with
    connection._create_connection = lambda _, timeout, source=None: socket.create_connection((address, port), timeout)
    stop = threading.Timer(0, lambda: None)
    try:
        connection.connect()
        stop = threading.Timer(
            _left(url, deadline), _break_off, [connection.sock]
        )  # also for who sends a byte a second
        stop.daemon = True
        stop.start()
        path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=PRINTABLE)
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        answer = connection.getresponse()
        if answer.status in REDIRECTS and (where := answer.getheader("Location")):
            return where
        if answer.status != 200:
            raise ValueError(f"{shown(url)} answers {answer.status}")
        body = answer.read(max_bytes + 1)
        if len(body) > max_bytes:
            raise ValueError(f"{shown(url)} has more than {max_bytes:,} bytes; make it smaller")
        _left(url, deadline)
        return body
    except (OSError, http.client.HTTPException) as error:
        _left(url, deadline)
        raise ValueError(f"{shown(url)} cannot be fetched: {str(error) or type(error).__name__}") from None
    finally:
        stop.cancel()
        connection.close()


def _address(host: str, port: int, public: Callable[[str], bool], within_s: float) -> str:
    try:
        found = {info[4][0] for info in lookup(host, port, within_s)}
    except TimeoutError as error:
        raise ValueError(f"{shown(host)} cannot be fetched from: {error}") from None
    except OSError:
        raise ValueError(f"{shown(host)} has no address") from None
    if not all(map(public, found)):
        # which one is nobody's business who asks: it would be a map of the inside
        raise ValueError(f"{shown(host)} leads to no address of the public net; send a data: URL")
    return sorted(found, key=lambda one: ":" in one)[0]


def _break_off(sock: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        sock.shutdown(socket.SHUT_RDWR)


def _left(url: str, deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise ValueError(f"{shown(url)} takes longer than the {TIMEOUT_S:g} s that all pictures of a request have")
    return left
