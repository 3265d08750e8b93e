"""Listen to a server: every message between its processes, the bytes of it, and the moment at which it passed.

    with tapped() as server:
        ...                                    # ask server.url
        for one in server.seen: print(one.at, one.sender, one.receiver, one.name, one.size)

    client <--HTTP--> main <--> TAP <--> scheduler        main (HTTP, TokenizerManager) is this process, in a thread;
                                 ^                        scheduler and detokenizer are children as ever
                                 +-----> detokenizer

Each child gets a folder of sockets of its own, and the tap sits between the folders: it hands every message on as it came, and
keeps a copy. The programs at both ends do not know of it. It costs each message one hop more (0.1 ms).
"""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn
import zmq
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ch07_sglang_radix.serving.channels import ipc
from ch07_sglang_radix.serving.http_args import HttpArgs, bind, parse_args
from ch07_sglang_radix.serving.http_server import make_app
from ch07_sglang_radix.serving.launcher import tokenizer_folder
from ch07_sglang_radix.serving.logs import set_up_logging
from ch07_sglang_radix.serving.messages import AnyMessage, decode
from ch07_sglang_radix.serving.processes import Processes
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from common.text.tokenizer import Tokenizer

LOOK_MS = 100  # how often the tap looks whether it shall end


@dataclass(frozen=True)
class Seen:
    """at: seconds of time.perf_counter(). size: in bytes, of HTTP that of the body. message: decoded; of HTTP the body."""

    at: float
    sender: str
    receiver: str
    name: str
    size: int
    message: AnyMessage | bytes


class TappedProcesses(Processes):
    """The children, and the tap between them. seen: filled by the tap's thread."""

    def __init__(self, args: HttpArgs, tokenizer_folder: str | None, seen: list[Seen]):
        super().__init__(args, tokenizer_folder)
        self.seen, self._left = seen, threading.Event()
        own = {who: self.folder / who[0] for who in ("scheduler", "detokenizer")}
        for folder in own.values():
            folder.mkdir(mode=0o700)
        self._own = own
        ends = {  # (sender, receiver): the socket that the sender knows, the one that the receiver has
            ("main", "scheduler"): (self.folder / "scheduler", own["scheduler"] / "scheduler"),
            ("scheduler", "main"): (own["scheduler"] / "main", self.folder / "main"),
            ("scheduler", "detokenizer"): (own["scheduler"] / "detokenizer", own["detokenizer"] / "detokenizer"),
            ("detokenizer", "main"): (own["detokenizer"] / "main", self.folder / "main"),
        }
        self._lines = {
            self._socket(zmq.PULL, there): (who, self._socket(zmq.PUSH, here)) for who, (there, here) in ends.items()
        }
        self._thread = threading.Thread(target=self._hand_on, name="tap", daemon=True)
        self._thread.start()

    def folder_of(self, who: str) -> Path:
        return self._own[who]

    def _hand_on(self) -> None:
        poller = zmq.Poller()
        for socket in self._lines:
            poller.register(socket, zmq.POLLIN)
        while not self._left.is_set():
            for socket, _ in poller.poll(LOOK_MS):
                raw, at = socket.recv(), time.perf_counter()
                (sender, receiver), onwards = self._lines[socket]
                onwards.send(raw)
                message = decode(raw)
                self.seen.append(Seen(at, sender, receiver, type(message).__name__, len(raw), message))
        for socket, (_, onwards) in self._lines.items():
            socket.close(0)
            onwards.close(0)

    @staticmethod
    def _socket(kind: int, path: Path) -> zmq.Socket:
        socket = zmq.Context.instance().socket(kind)
        socket.set_hwm(0)
        (socket.bind if kind == zmq.PULL else socket.connect)(ipc(path.parent, path.name))
        return socket

    def close(self) -> None:
        self._left.set()
        self._thread.join()
        super().close()


class TappedHttp:
    """The same for the application: bodies in and out."""

    def __init__(self, app: ASGIApp, seen: list[Seen]):
        self.app, self.seen = app, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def received() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._note("client", "main", f"{scope['method']} {scope['path']}", message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            if body := message.get("body", b""):
                self._note("main", "client", "event" if body.startswith(b"data:") else "answer", body)
            await send(message)

        await self.app(scope, received, sent)

    def _note(self, sender: str, receiver: str, name: str, body: bytes) -> None:
        self.seen.append(Seen(time.perf_counter(), sender, receiver, name, len(body), body))


class TappedServer:
    """url, pids {process: pid}, and what was seen so far, in order."""

    def __init__(self, flags: tuple[str, ...]):
        self.args = parse_args(["--port", "0", "--log-level", "error", *flags])
        set_up_logging("main", "error", "text")
        self.seen: list[Seen] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="main", daemon=True)
        self._thread.start()
        self._run(self._start(tokenizer_folder(self.args)))

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    async def _start(self, folder: str | None) -> None:
        self.workers = TappedProcesses(self.args, folder, self.seen)
        try:
            await self._serve(folder)
        except BaseException:
            self.workers.end(0)
            self.workers.close()
            raise

    async def _serve(self, folder: str | None) -> None:
        tokenizer = Tokenizer(folder) if folder else None
        self.manager = TokenizerManager(self.args, tokenizer, self.workers.schedulers[0], self.workers.inbox)
        self.workers.start(lambda what, dp_rank: self._loop.call_soon_threadsafe(self.manager.fail, what))
        socket = bind(self.args.host, 0)
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        config = uvicorn.Config(TappedHttp(make_app(self.manager), self.seen), log_config=None, lifespan="off")
        self._http = uvicorn.Server(config)
        self._tasks = [asyncio.create_task(self.manager.listen()), asyncio.create_task(self._http.serve([socket]))]
        await self.manager.ready.wait()
        if self.manager.state != "ready":
            raise ValueError(f"the server did not start: {self.manager.failure}")
        self.pids = {"main": os.getpid(), **{who: child.pid for who, child in self.workers.children.items()}}

    def clear(self) -> list[Seen]:
        """What was seen since the last call, by time, and forget it."""
        time.sleep(LOOK_MS / 1000)  # what is on its way
        seen = sorted(self.seen, key=lambda one: one.at)
        self.seen.clear()
        return seen

    def end(self) -> None:
        self.workers.expect_the_end()
        self._loop.call_soon_threadsafe(self.manager.leave)
        self.workers.end()
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _end(self) -> None:
        self._http.should_exit = True
        self._tasks[0].cancel()
        await asyncio.wait(self._tasks, timeout=2)
        self.workers.close()


@contextmanager
def tapped(*flags: str) -> Iterator[TappedServer]:
    """flags: of launch_server. Raises ValueError if the server does not start."""
    server = TappedServer(flags)
    try:
        yield server
    finally:
        server.end()


def since(seen: list[Seen], zero: float) -> list[Seen]:
    """The same, `at` in milliseconds from `zero` on."""
    return [replace(one, at=1e3 * (one.at - zero)) for one in seen]
