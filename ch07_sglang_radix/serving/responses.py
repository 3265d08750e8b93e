"""Bodies in, answers out: JSON by msgspec, streams as server-sent events, and clients that go away.

A server-sent event is a line `data: ...` and an empty line. The first answer is awaited before the status goes out, so that a
request which is refused gets a status of its own and not a 200 with an error in it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ch07_sglang_radix.serving.io_struct import RequestError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
CLIENT_HAS_GONE = 499  # nginx's number; nobody reads it
to_json = msgspec.json.Encoder().encode


class ClientHasGone(Exception):
    """Nobody waits for this answer any more."""


def as_json(value: Any, status: int = 200) -> Response:
    """NaN and infinities become null, which JSON has."""
    return Response(to_json(value), status, media_type="application/json")


def event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


async def read_body(request: Request, kind: type[T]) -> T:
    """The JSON body as a struct. Raises RequestError that says where it does not fit; an empty body is {}."""
    body = await request.body()
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(400, f"the body: {error}") from None
    except RecursionError:
        raise RequestError(400, "the body: nested too deeply") from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """Await `work`, and cancel it if the client hangs up first (ClientHasGone): no poll, the server tells."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientHasGone
        return working.result()
    finally:
        for task in (working, watching):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends what comes, and closes the iterator when it has ended or the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            with suppress(ClientHasGone):
                await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for one in self.events:
            await send({"type": "http.response.body", "body": one, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
