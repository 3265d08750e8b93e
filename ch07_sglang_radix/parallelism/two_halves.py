"""A request at two servers: one computes its prompt, the other writes its answer (../disaggregation/). For mini_lb and the router.

Each request goes to both, with bootstrap_host, bootstrap_port and a new bootstrap_room. The client gets decode's answer. What goes
wrong on one side reaches the other by closing its connection, on which the server aborts:

    prefill refuses (400, 503 ...)     the client gets that; decode is dropped
    prefill's connection breaks        decode knows better: if the pages had come it goes on, else it answers with an error
    decode refuses, or breaks off      the client gets that; prefill is dropped
    the client goes away               both are dropped
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from fastapi import Response

from ch07_sglang_radix.parallelism.relay import Exchange, Server, answered, ask, why
from ch07_sglang_radix.serving.http_client import Client
from ch07_sglang_radix.serving.responses import EventStream, to_json

ROOM_SPACING = 12  # bits: the answers of one request have rooms one after the other


class Meeting:
    """Where requests meet at a prefill server: it says so once, and again after it was not there."""

    def __init__(self, url: str, client: Client):
        self.url, self.client = url, client
        self.port: int | None = None

    async def mode(self) -> str | None:
        """prefill, decode or null; None if it does not say."""
        status, info = await ask(self, "GET", "/server_info", None, None)
        mode = info.get("disaggregation_mode", "null") if status == 200 and isinstance(info, dict) else None
        return mode if isinstance(mode, str) else None

    async def room(self, headers: Mapping[str, str]) -> dict[str, Any] | str:
        """What a request must bring, or in one line why nobody can be met."""
        if self.port is None:
            status, info = await ask(self, "GET", "/server_info", b"", headers)
            if status != 200 or not isinstance(info, dict):
                return info if isinstance(info, str) and info.startswith(self.url) else f"{self.url}: status {status}"
            mode, port = info.get("disaggregation_mode", "null"), info.get("disaggregation_bootstrap_port")
            if mode != "prefill" or not isinstance(port, int):
                return f"{self.url} is no prefill server: disaggregation_mode={mode}"
            self.port = port
        room = secrets.randbits(62 - ROOM_SPACING) << ROOM_SPACING
        return {"bootstrap_host": urlsplit(self.url).hostname, "bootstrap_port": self.port, "bootstrap_room": room}

    def forget(self) -> None:
        """Who comes back there may have another bootstrap server."""
        self.port = None


def bodies(body: dict[str, Any], room: dict[str, Any]) -> tuple[bytes, bytes]:
    """Prefill's and decode's. Nobody reads a stream of prefill's one token."""
    both = body | room
    silent = {name: value for name, value in both.items() if name != "stream_options"} | {"stream": False}
    return to_json(silent), to_json(both)


class Asked:
    """A request at one server, of which nobody keeps count."""

    def __init__(self, server: Server, path: str, body: bytes, headers: Mapping[str, str]):
        self.url = server.url
        self.pieces: AsyncIterator[Any] = server.client.exchange("POST", path, body, headers)

    def over(self, well: bool | None) -> None:
        pass


class Pair:
    """A request at both; as one exchange, it is decode's, whose answer the client gets. answer() first."""

    def __init__(self, prefill: Exchange, decode: Exchange):
        self.prefill, self.decode = prefill, decode
        self.pieces = decode.pieces
        self._computing = asyncio.ensure_future(self._compute())

    @property
    def url(self) -> str:
        return self.decode.url

    def over(self, well: bool | None) -> None:
        self.decode.over(well)
        self.prefill.over(None)  # unless it has ended before
        self._computing.cancel()

    async def _compute(self) -> Response | None:
        """Prefill's answer; None: its connection broke."""
        try:
            response = await answered(self.prefill)
            self.prefill.over(response.status_code < 500)
            return response
        except OSError:
            self.prefill.over(False)
            return None
        finally:
            await self.prefill.pieces.aclose()

    async def answer(self) -> tuple[Response | str, list[Exchange]]:
        """The answer, or why there is none; and whose fault it may be if it is no good one."""
        computing, writing = self._computing, asyncio.ensure_future(answered(self))
        streams = False
        try:
            await asyncio.wait({writing, computing}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done() and (refusal := computing.result()) is not None and refusal.status_code >= 400:
                return refusal, [self.prefill, self.decode] if refusal.status_code == 500 else [self.prefill]
            response = await writing
            streams = isinstance(response, EventStream)
            if streams:
                return response, []
            if response.status_code < 500:
                self.decode.over(True)
            broke = computing.done() and computing.result() is None
            # a 500 may be either's: who has lost the other says so
            fault = [self.prefill] if broke or response.status_code == 500 else []
            fault += [] if broke else [self.decode]
            if response.status_code >= 500:
                for one in fault:
                    one.over(False)
            return response, fault
        except OSError as error:
            self.decode.over(False)
            return why(error), [self.decode]
        finally:
            if not streams:
                self.over(None)
                writing.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await writing
                await self.pieces.aclose()
