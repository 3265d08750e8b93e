"""Pages over TCP: any two processes, and the simplest thing that is right. A reader and a writer thread for each link.

The writer copies a slice out of the pages (or off the GPU) when the socket is ready for it; the reader fills a buffer of the
announced size. Threads, because both wait in system calls that let go of Python's lock: the next chunk is computed meanwhile.
Only this machine is listened to; a transport for several would need to know whom to trust.
"""

import queue
import socket
import threading
from contextlib import suppress

from ch07_sglang_radix.disaggregation.messages import (
    HEAD,
    VERSION,
    AnyMessage,
    Hello,
    Ping,
    Write,
    decode,
    encode,
    lengths,
)
from ch07_sglang_radix.disaggregation.transport import PING_S, SILENCE_S, Handler, Payload
from common.distributed.reach import connect

HOST = "127.0.0.1"
CONNECT_S = 5.0
TRANSPORT_ERRORS = (OSError, ValueError, RuntimeError)  # the system's, a peer's that breaks the rules, a GPU's


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class TcpLink:
    """See Link. bound: a connection that was accepted; else it is opened, in the reader's thread."""

    def __init__(self, handler: Handler, bound: socket.socket | None, address: str = ""):
        self.handler, self.address, self.peer = handler, address, None
        self._socket = bound
        self._out: queue.SimpleQueue[tuple[AnyMessage, Payload | None, int] | None] = queue.SimpleQueue()
        self._over = threading.Lock()  # held from the end on: whoever gets it ends the link
        self._out.put((handler.hello, None, 0))
        threading.Thread(target=self._read, name=f"{type(self).__name__} reader", daemon=True).start()

    def send(self, message: AnyMessage, payload: Payload | None = None, size: int = 0) -> None:
        self._out.put((message, payload, size))

    def close(self) -> None:
        self._over.acquire(blocking=False)
        self._hang_up()

    # --- the two threads

    def _read(self) -> None:
        try:
            if self._socket is None:
                host, _, port = self.address.rpartition(":")
                self._socket = connect(host, int(port), CONNECT_S)
            self._socket.settimeout(SILENCE_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._write, name=f"{type(self).__name__} writer", daemon=True).start()
            while True:
                size = lengths(self._bytes(HEAD.size))
                message = decode(self._bytes(size.message))
                if self.peer is None:
                    self._greet(message)
                else:
                    self._hand_over(message, size.payload)
        except TimeoutError:
            self._lose(f"no sign of life for {SILENCE_S:g} s" if self.peer else f"nobody answers at {self.address}")
        except TRANSPORT_ERRORS as error:
            self._lose(first_line(error))

    def _greet(self, message: AnyMessage) -> None:
        if not isinstance(message, Hello) or message.version != VERSION:
            raise ValueError(f"a link begins with a Hello of version {VERSION}, this one with {message}")
        self.peer = message
        self.handler.greeted(self)

    def _hand_over(self, message: AnyMessage, size: int) -> None:
        payload = None
        if size:
            if not isinstance(message, Write):
                raise ValueError(f"{type(message).__name__} has no payload, and {size:,} bytes are announced")
            payload = self.handler.place(self, message, size)
            self._take_payload(payload, size)
        if not isinstance(message, Ping):
            self.handler.take(self, message, payload)

    def _take_payload(self, into: memoryview | None, size: int) -> None:
        self._fill(memoryview(bytearray(size)) if into is None else into)

    def _write(self) -> None:
        try:
            while True:
                try:
                    item = self._out.get(timeout=PING_S)
                except queue.Empty:
                    item = (Ping(), None, 0)
                if item is None:
                    return
                self._put(*item)
        except TRANSPORT_ERRORS as error:
            self._lose(first_line(error))

    def _put(self, message: AnyMessage, payload: Payload | None, size: int) -> None:
        data = payload() if payload else None
        if payload and data is None:
            return
        self._socket.sendall(encode(message, size))
        if data is not None:
            self._give_payload(data)

    def _give_payload(self, payload: memoryview) -> None:
        self._socket.sendall(payload)

    # --- small things

    def _bytes(self, n: int) -> bytes:
        into = bytearray(n)
        self._fill(memoryview(into))
        return bytes(into)

    def _fill(self, into: memoryview) -> None:
        while len(into):
            n = self._socket.recv_into(into)
            if n == 0:
                raise ConnectionError("the other side has closed the connection")
            into = into[n:]

    def _lose(self, why: str) -> None:
        if self._over.acquire(blocking=False):
            self.handler.lost(self, why)
        self._hang_up()

    def _hang_up(self) -> None:
        self._out.put(None)
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()


class TcpTransport:
    """See Transport. address: "127.0.0.1:PORT", a free port."""

    link = TcpLink

    def __init__(self, handler: Handler):
        self.handler = handler
        self._links: list[TcpLink] = []
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self.address = f"{HOST}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def connect(self, address: str) -> TcpLink:
        return self._kept(self.link(self.handler, None, address))

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._links:
            link.close()

    def _accept(self) -> None:
        while True:
            try:
                bound, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._kept(self.link(self.handler, bound))

    def _kept(self, link: TcpLink) -> TcpLink:
        self._links = [*(one for one in self._links if not one._over.locked()), link]
        return link
