"""An answer on its way from a server to a client: what of its headers goes along, and a stream event by event."""

from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import msgspec
from fastapi import Response

from ch07_sglang_radix.serving.http_client import Client, Head
from ch07_sglang_radix.serving.logs import log
from ch07_sglang_radix.serving.responses import DONE, EventStream, event

# of this connection, or made anew; Origin was this router's to look at
OWN = {
    "host", "content-length", "connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect", "origin",
    "proxy-authorization", "proxy-connection", "accept-encoding",
}  # fmt: skip
PASSED_BACK = ("content-type", "retry-after", "www-authenticate", "cache-control")


class Server(Protocol):
    url: str
    client: Client


class Exchange(Protocol):
    """A request that a server answers. pieces: of its body, as they come."""

    pieces: AsyncIterator[Any]

    @property
    def url(self) -> str: ...

    def over(self, well: bool | None) -> None:
        """well: None if the client has gone first. More than once, of which the first counts."""
        ...


async def answered(one: Exchange) -> Response:
    """A stream that has begun, and ends `one`; or all of another answer, and `one` is the caller's to end. Raises OSError."""
    head: Head = await anext(one.pieces)
    if head.status == 200 and head.headers.get("content-type", "").startswith("text/event-stream"):
        return EventStream(Relay(one, await anext(one.pieces, b"")))
    raw = b"".join([piece async for piece in one.pieces])
    return Response(raw, head.status, {name: head.headers[name] for name in PASSED_BACK if name in head.headers})


async def ask(
    server: Server, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None
) -> tuple[int, Any]:
    """(status, the answer); 503 and why if nobody is there. headers: instead of our client's own."""
    try:
        pieces = [piece async for piece in server.client.exchange(method, path, body, headers)]
    except OSError as error:
        return 503, f"{server.url} does not answer ({why(error)})"
    raw = b"".join(pieces[1:])
    return pieces[0].status, json_of(raw) if raw[:1] in (b"{", b"[", b'"') else raw.decode("utf-8", "replace")


def why(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


class Relay:
    """The events of one worker's stream, each whole: of one that breaks off a client gets no half.

    `aclose` ends the request at the worker, at any time, and without a first step too.
    """

    def __init__(self, one: Exchange, first: bytes):
        self._try, self._read = one, first
        self._done = False
        self.on_end = lambda: None

    def __aiter__(self) -> "Relay":
        return self

    async def __anext__(self) -> bytes:
        if self._done:
            raise StopAsyncIteration
        try:
            while (end := self._read.rfind(b"\n\n") + 2) < 2:
                piece = await anext(self._try.pieces, b"")
                if not piece:
                    return self._ended()
                self._read += piece
        except OSError as error:
            return self._broken(error)
        whole, self._read = self._read[:end], self._read[end:]
        return whole

    def _ended(self) -> bytes:
        self._done = True
        self._try.over(True)
        if not self._read:
            raise StopAsyncIteration
        return self._read

    def _broken(self, error: OSError) -> bytes:
        self._done = True
        self._try.over(False)
        url = self._try.url
        log.error("%s: a stream broke off: %s", url, error)
        told = {
            "message": f"{url} broke off in the middle of its answer: {error}",
            "type": "InternalServerError",
            "code": 500,
        }
        return event({"error": told}) + DONE

    async def aclose(self) -> None:
        self._done = True
        self._try.over(None)
        await self._try.pieces.aclose()
        self.on_end()


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """What a worker is told of the client's headers; its key among them."""
    return {name: value for name, value in headers.items() if name.lower() not in OWN}


def json_of(body: bytes) -> Any:
    """None for what is none: the worker will say what is wrong with it."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
