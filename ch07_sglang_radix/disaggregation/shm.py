"""Pages through shared memory: two processes of one host, a copy in and a copy out, and no byte of a page in a socket.

Messages go over TCP as ever (tcp.py). Behind a Write comes, instead of its payload, one byte: in which half of a file in memory,
which both have mapped, the payload lies. The reader answers Taken when it has copied it out; so one half is filled while the
other is read. The file's name comes before the first such byte. Between two GPUs of one host a CUDA IPC handle stands in the
name's place, and nothing is copied twice (cuda_ipc.py).
"""

import mmap
import os
import re
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from ch07_sglang_radix.disaggregation.messages import AnyMessage, Taken
from ch07_sglang_radix.disaggregation.tcp import TcpLink, TcpTransport
from ch07_sglang_radix.disaggregation.transport import SILENCE_S, Handler

HALF = 8 << 20  # bytes; what is longer goes in pieces
NAME = re.compile(rb"kv-pages-[A-Za-z0-9_]{8}")


class ShmLink(TcpLink):
    def __init__(self, handler: Handler, bound: socket.socket | None, address: str = ""):
        self._mine: mmap.mmap | None = None  # what this end writes to
        self._theirs: mmap.mmap | None = None  # what it reads from
        self._free = [threading.Event(), threading.Event()]  # halves of mine
        self._side = 0  # of mine, the next
        super().__init__(handler, bound, address)

    def _give_payload(self, payload: memoryview) -> None:
        if self._mine is None:
            name, self._mine = _new_file()
            self._socket.sendall(name)
            for half in self._free:
                half.set()
        for begin in range(0, len(payload), HALF):
            if not self._free[self._side].wait(SILENCE_S):
                raise TimeoutError(f"pages were not taken out of shared memory for {SILENCE_S:g} s")
            self._free[self._side].clear()
            piece, at = payload[begin : begin + HALF], self._side * HALF
            self._mine[at : at + len(piece)] = piece
            self._socket.sendall(bytes([self._side]))
            self._side ^= 1

    def _take_payload(self, into: memoryview | None, size: int) -> None:
        if self._theirs is None:
            self._theirs = _open_file(self._bytes(len("kv-pages-") + 8))
        with memoryview(self._theirs) as theirs:
            for begin in range(0, size, HALF):
                side, n = self._bytes(1)[0] & 1, min(HALF, size - begin)
                if into is not None:
                    into[begin : begin + n] = theirs[side * HALF : side * HALF + n]
                self.send(Taken(side))

    def _hand_over(self, message: AnyMessage, size: int) -> None:
        if isinstance(message, Taken):
            self._free[message.side & 1].set()
        else:
            super()._hand_over(message, size)


class ShmTransport(TcpTransport):
    link = ShmLink


def _folder() -> Path:
    """In memory where the system has such a place."""
    if sys.platform == "linux":
        memory = Path("/dev/shm")
        return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return Path(tempfile.gettempdir())


def _new_file() -> tuple[bytes, mmap.mmap]:
    """(its name in the folder, two halves)"""
    handle, path = tempfile.mkstemp(prefix="kv-pages-", dir=_folder())
    with os.fdopen(handle, "r+b") as file:
        file.truncate(2 * HALF)
        return os.path.basename(path).encode(), mmap.mmap(file.fileno(), 2 * HALF)


def _open_file(name: bytes) -> mmap.mmap:
    """The same memory, whose name nobody needs any more. Raises ValueError for a name that `_new_file` does not give."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of shared memory")
    path = _folder() / name.decode()
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 2 * HALF)
    with suppress(OSError):  # not while it is open, says Windows
        path.unlink()
    return memory
