"""HTTP/1.1 to one server: JSON in, JSON or server-sent events out, any number of requests at once on kept connections.

    async with Client("http://127.0.0.1:30000") as client:
        status, value = await client.call("GET", "/v1/models")
        async for event in client.events("/generate", {"text": "...", "stream": True}): ...

What chat, benchmark, load test and router ask a server with. Plain asyncio streams: a client that measures must not be what is
measured (64 streams of 100 events: 0.07 s of CPU here, 0.2 s with httpx; x86-64, 2026-11-26).
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from common.distributed.reach import literal, lookup

MAX_HEAD = 1 << 16
RESOLVERS = ThreadPoolExecutor(16, "names")


class Head(NamedTuple):
    """How an answer begins. headers: with small names."""

    status: int
    headers: dict[str, str]


class ServerError(Exception):
    """The server refused, in its own words. status: of HTTP, or 0 for an error in the middle of a stream."""

    def __init__(self, status: int, message: str):
        super().__init__(f"{status}: {message}" if status else message)
        self.status, self.message = status, message


class _Link:
    """A connection, and whether its answer came in time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self.expired = False

    def expire(self) -> None:
        self.expired = True
        self.writer.transport.abort()

    async def head(self) -> Head:
        try:
            first, *rest = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
            protocol, code = first.split()[:2]
            status = int(code)
        except (asyncio.LimitOverrunError, ValueError, IndexError):
            protocol, status = "", 0
        if not protocol.startswith("HTTP/1.") or not 100 <= status < 600:
            raise ConnectionError("what answers there does not speak HTTP")
        headers = {}
        for line in rest[:-1]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return Head(status, headers)

    async def body(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        """Raises ConnectionError for a length that is none."""
        try:
            async for piece in self._pieces(headers):
                yield piece
        except (asyncio.LimitOverrunError, ValueError):
            raise ConnectionError("its answer has a length that is no number") from None

    async def _pieces(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readuntil(b"\r\n")
        elif "content-length" in headers:
            yield await self.reader.readexactly(int(headers["content-length"]))
        else:  # to the end of the connection
            while piece := await self.reader.read(MAX_HEAD):
                yield piece


class Client:
    """timeout: seconds from sending a request to the end of its answer; connect_timeout: until the server takes the connection.

    Raises OSError if there is no server, if it goes away, and if the answer does not come in time.
    """

    def __init__(
        self, url: str, api_key: str | None = None, timeout: float = 600.0, connect_timeout: float | None = None
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r} must be like http://127.0.0.1:30000")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._place = (parts.hostname, parts.port or (443 if self._tls else 80))
        self._prefix, self._timeout, self._connect_timeout = parts.path.rstrip("/"), timeout, connect_timeout
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._host, self._headers = f"Host: {parts.netloc}\r\n", f"Content-Type: application/json\r\n{key}"
        self._idle: list[_Link] = []

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, the answer: JSON if it is any, else text). body: bytes are sent as they are, anything else as JSON."""
        pieces = [piece async for piece in self.exchange(method, path, body)]
        status, raw = pieces[0].status, b"".join(pieces[1:])
        value = _json(raw)
        return status, raw.decode("utf-8", "replace") if value is None and raw != b"null" else value

    async def events(self, path: str, body: Any) -> AsyncIterator[Any]:
        """POST; each `data:` of the answer as JSON, without [DONE]. Closing the iterator closes the connection.

        Raises ServerError if the status is not 200 and for an event that is an error.
        """
        pieces = self.exchange("POST", path, body)
        try:
            head, rest = await anext(pieces), b""
            if head.status != 200:
                raise ServerError(head.status, _words(b"".join([piece async for piece in pieces])))
            async for piece in pieces:
                *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
                for event in whole:
                    data = event.removeprefix(b"data:").strip()
                    if not event.startswith(b"data:") or data == b"[DONE]":
                        continue  # a comment, which only keeps the connection alive; the end
                    value = msgspec.json.decode(data)
                    if isinstance(value, dict) and value.get("error"):
                        raise ServerError(0, _words(data))
                    yield value
        finally:
            await pieces.aclose()

    async def exchange(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Any]:
        """The Head, then the pieces of the body. headers: instead of this client's own. Closing it closes the connection."""
        payload = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        said = self._headers if headers is None else "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        line = f"{method} {self._prefix}{path} HTTP/1.1\r\n"
        message = f"{line}{self._host}{said}Content-Length: {len(payload)}\r\n\r\n".encode("latin-1") + payload
        while True:
            reused = bool(self._idle)
            link = self._idle.pop() if reused else await self._open()
            timer = asyncio.get_running_loop().call_later(self._timeout, link.expire)
            answered = whole = False
            try:
                link.writer.write(message)
                await link.writer.drain()
                head = await link.head()
                answered = True
                yield head
                async for piece in link.body(head.headers):
                    yield piece
                if link.expired:  # an answer without a length ends with its connection, however that ends
                    raise EOFError
                whole = head.headers.get("connection", "").lower() != "close"
                return
            except (EOFError, ConnectionError) as error:
                if link.expired:
                    raise TimeoutError(f"no answer of {path} within {self._timeout:g} s") from None
                if not reused or answered:
                    said = str(error) if isinstance(error, ConnectionError) else ""
                    raise ConnectionError(f"{path}: {said or 'the server closed the connection'}") from None
                # it closed an idle connection while we wrote: nothing was read, so ask again
            finally:
                timer.cancel()
                if whole:
                    self._idle.append(link)
                else:
                    link.writer.transport.abort()

    async def _open(self) -> _Link:
        try:
            return _Link(*await asyncio.wait_for(self._streams(), self._connect_timeout))
        except asyncio.TimeoutError:  # another one than TimeoutError before Python 3.11
            raise TimeoutError(f"no connection within {self._connect_timeout:g} s") from None

    async def _streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """asyncio would look a name up in a thread that others wait for, and that a dead name server keeps as long as it likes."""
        host, port = self._place
        tls = {"ssl": self._tls, "server_hostname": host} if self._tls else {}
        within_s = self._connect_timeout or self._timeout
        places = literal(host, port) or await asyncio.get_running_loop().run_in_executor(
            RESOLVERS, lookup, host, port, within_s
        )
        wrong: OSError | None = None
        for *_, address in places:
            try:
                return await asyncio.open_connection(address[0], port, limit=MAX_HEAD, **tls)
            except OSError as error:
                wrong = error
        raise wrong or ConnectionError(f"{host} has no address")

    async def close(self) -> None:
        links, self._idle = self._idle, []
        for link in links:
            link.writer.close()

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exc) -> None:
        await self.close()


def _json(raw: bytes) -> Any:
    """None for what is none."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _words(raw: bytes) -> str:
    """What an error body says: OpenAI's nested form, SGLang's flat one, FastAPI's detail, or as it is."""
    value = _json(raw)
    if value is None:
        value = raw.decode("utf-8", "replace")
    while isinstance(value, dict):
        value = next((value[name] for name in ("error", "message", "detail") if value.get(name)), str(value))
    return " ".join(str(value).split())[:500]
