"""A router and workers without engines, on one event loop: what each was sent, and how each fails."""

import asyncio
import json
from contextlib import asynccontextmanager, suppress

from ch07_sglang_radix.parallelism.router import Router
from ch07_sglang_radix.parallelism.router_args import RouterArgs
from ch07_sglang_radix.serving.http_args import bind
from ch07_sglang_radix.serving.http_client import Client
from ch07_sglang_radix.serving.http_life import Http

QUICK = {
    "health_check_interval_secs": 0.05, "health_check_timeout_secs": 5, "connect_timeout_secs": 5,
    "retry_initial_backoff_ms": 1, "log_level": "critical",
}  # fmt: skip


class FakeWorker:
    """mode: of what is asked. ok; a status; bytes: they are said, and the connection is closed; drop: it is closed unread; hang:
    nothing comes; cut: a stream breaks off behind its second event. seen: [(path, headers, body)]; gone: streams whose client has
    left. well: what it says of its health, or bytes; slow_s: how long it takes for that.
    """

    def __init__(self, name: str, model: str = "fake"):
        self.name, self.model, self.mode, self.well = name, model, "ok", True
        self.gap_s = self.slow_s = 0.0
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.gone = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self._answer(first.split()[1], headers, body, writer):
                    break
        self._writers.discard(writer)
        writer.close()

    async def _answer(self, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> bool:
        looked_at = path in ("/health", "/model_info")
        if not looked_at:
            self.seen.append((path, headers, body))
        if isinstance(raw := self.well if looked_at else self.mode, bytes):
            writer.write(raw)
            return False
        if looked_at:
            await asyncio.sleep(self.slow_s)
            told = {"served_model_name": self.model} if path == "/model_info" else ""
            return self._say(writer, 200 if self.well else 503, json.dumps(told).encode())
        if self.mode == "hang":
            await asyncio.sleep(60)
        if self.mode == "drop":
            writer.transport.abort()
            return False
        if isinstance(self.mode, int):
            return self._say(writer, self.mode, json.dumps({"said": self.mode, "by": self.name}).encode())
        if b'"stream"' in body:
            return await self._stream(writer)
        if self.gap_s:
            await asyncio.sleep(self.gap_s)
        told = f"session of {self.name}" if path == "/open_session" else {"by": self.name}
        return self._say(writer, 200, json.dumps(told).encode())

    def _say(self, writer: asyncio.StreamWriter, status: int, body: bytes) -> bool:
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        return True

    async def _stream(self, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        events = [f'data: {{"by": "{self.name}", "n": {n}}}\n\n'.encode() for n in range(5)] + [b"data: [DONE]\n\n"]
        for n, event in enumerate(events):
            if self.mode == "cut" and n == 2:
                writer.write(b'9\r\ndata: {"n\r\n')  # a part of an event
                await writer.drain()
                await asyncio.sleep(0.02)
                writer.transport.abort()
                return False
            writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            try:
                await writer.drain()
                await asyncio.sleep(self.gap_s)
                if writer.transport.is_closing():
                    raise ConnectionError
            except ConnectionError:
                self.gone += 1
                return False
        writer.write(b"0\r\n\r\n")
        return True


class Fleet:
    """workers, and a client of the router in front of them."""

    def __init__(self, workers: list[FakeWorker], router: Router, client: Client):
        self.workers, self.router, self.client = workers, router, client

    async def ask(self, text: str = "a", path: str = "/generate", **body):
        return await self.client.call("POST", path, {"text": text} | body)

    async def who(self, text: str = "a", **body) -> str:
        status, answer = await self.ask(text, **body)
        assert status == 200, answer
        return answer["by"]

    def sent(self) -> list[int]:
        return [len(worker.seen) for worker in self.workers]

    def at_rest(self) -> None:
        """Nothing is counted that has ended."""
        assert self.router.forwarding.in_flight == 0
        assert all(load.requests == load.tokens == 0 for load in self.router.workers.balancer.loads.values())
        assert not any(worker.breaker._testing for worker in self.router.workers.all.values())


async def until(true, seconds: float = 60.0) -> None:
    async def wait() -> None:
        while not true():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), seconds)


@asynccontextmanager
async def a_fleet(count: int = 2, models=None, dead=(), **args):
    """dead: numbers of workers that are not there yet when the router starts."""
    workers = [FakeWorker("abcdef"[i], (models or {}).get(i, "fake")) for i in range(count)]
    for i, worker in enumerate(workers):
        await worker.start()
        if i in dead:
            await worker.die()
    router = Router(
        RouterArgs(worker_urls=tuple(worker.url for worker in workers), **QUICK | {"policy": "round_robin"} | args)
    )
    socket = bind("127.0.0.1", 0)
    http = Http(router.app)
    serving = asyncio.create_task(http.serve([socket]))
    await router.workers.start()
    try:
        async with Client(f"http://127.0.0.1:{socket.getsockname()[1]}", args.get("api_key")) as client:
            yield Fleet(workers, router, client)
    finally:
        await router.workers.close()
        http.should_exit = True
        await asyncio.wait([serving], timeout=60)
        for worker in workers:
            await worker.die()


def with_fleet(check, *args, **more) -> None:
    async def run() -> None:
        async with a_fleet(*args, **more) as fleet:
            await check(fleet)
            await until(lambda: fleet.router.forwarding.in_flight == 0)
            fleet.at_rest()

    asyncio.run(run())
