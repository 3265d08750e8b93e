"""Pipes between the processes: messages go in at one end (send) and come out, in order, at the other (receive).

    open_pull(address), open_push(address)   ZeroMQ PUSH -> PULL over a Unix socket file: ipc://FOLDER/NAME
    MemoryPipe()                             both ends in one process; the same bytes, in a queue

ZeroMQ queues on both sides and connects when the other end is there, so the processes may start in any order. It has no
way to say that the other end has died: that is the watch's business (watch.py). Who receives may block (`receive`), or be a
task of an event loop (`receive_async`); a pipe has one of the two.
"""

import asyncio
import os
import queue
import tempfile
from pathlib import Path
from typing import Protocol

import zmq
import zmq.asyncio

from ch07_sglang_radix.serving.messages import AnyMessage, decode, encode

LINGER_MS = 1000  # that a process which ends waits for its last messages to leave
LONGEST_NAME = len("/detokenizer/scheduler_999")  # of a socket's file in its folder


class Push(Protocol):
    def send(self, message: AnyMessage) -> None:
        """Never waits for the other end to read."""
        ...

    def close(self) -> None: ...


class Pull(Protocol):
    def receive(self, timeout_s: float | None) -> AnyMessage | None:
        """The next message; None if there was none for so long (None: wait for ever)."""
        ...

    async def receive_async(self) -> AnyMessage: ...

    def close(self) -> None: ...


class _ZmqPush:
    def __init__(self, socket: zmq.Socket):
        self._socket = socket

    def send(self, message: AnyMessage) -> None:
        self._socket.send(encode(message))

    def close(self) -> None:
        self._socket.close(LINGER_MS)


class _ZmqPull:
    def __init__(self, socket: zmq.Socket):
        self._socket = socket

    def receive(self, timeout_s: float | None) -> AnyMessage | None:
        if not self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return None
        return decode(self._socket.recv())

    def close(self) -> None:
        self._socket.close(0)


class _ZmqAsyncPull:
    def __init__(self, socket: zmq.asyncio.Socket):
        self._socket = socket

    async def receive_async(self) -> AnyMessage:
        return decode(await self._socket.recv())

    def close(self) -> None:
        self._socket.close(0)


def new_folder() -> Path:
    """A new folder for socket files that nobody else may enter (mode 0700).

    It lies in TMPDIR, unless that is so deep that the address of a socket in it would not fit: the system keeps a Unix
    socket's path in a field of 108 bytes (sun_path, unix(7); macOS: 104). Then in /tmp.
    """
    folder = Path(tempfile.mkdtemp(prefix="serving-"))
    if os.name == "posix" and len(bytes(folder)) + LONGEST_NAME > zmq.IPC_PATH_MAX_LEN:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="serving-", dir="/tmp"))
    return folder


def ipc(folder: Path, name: str) -> str:
    return f"ipc://{folder / name}"


def open_push(address: str) -> Push:
    # no high-water mark: main must never block, and what can be on its way is bounded by the limits of requests (security.py)
    return _ZmqPush(_socket(zmq.Context.instance(), zmq.PUSH, "connect", address))


def open_pull(address: str, *, on_event_loop: bool = False) -> Pull:
    """The end that owns the socket file. Only one process may open it."""
    if on_event_loop:
        return _ZmqAsyncPull(_socket(zmq.asyncio.Context.instance(), zmq.PULL, "bind", address))
    return _ZmqPull(_socket(zmq.Context.instance(), zmq.PULL, "bind", address))


def _socket(context: zmq.Context, kind: int, join: str, address: str) -> zmq.Socket:
    socket = context.socket(kind)
    socket.set_hwm(0)
    getattr(socket, join)(address)
    return socket


class MemoryPipe:
    """Push and Pull at once. One thread sends, another one or an event loop receives."""

    def __init__(self):
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def send(self, message: AnyMessage) -> None:
        self._queue.put(encode(message))
        if waiting := self._waiting:
            loop, event = waiting
            loop.call_soon_threadsafe(event.set)

    def receive(self, timeout_s: float | None) -> AnyMessage | None:
        try:
            return decode(self._queue.get(timeout=timeout_s) if timeout_s != 0 else self._queue.get_nowait())
        except queue.Empty:
            return None

    async def receive_async(self) -> AnyMessage:
        while True:
            event = asyncio.Event()
            self._waiting = asyncio.get_running_loop(), event  # first: what comes in between sets it
            try:
                if (message := self.receive(0)) is not None:
                    return message
                await event.wait()
            finally:
                self._waiting = None

    def close(self) -> None:
        self._waiting = None
