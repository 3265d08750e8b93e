"""Who belongs to a group of hosts, and who of them has died.

A process can ask its own system about a pid; of another host it knows only what a connection tells. So each member has one
to member 0, and keeps it open:

    member 0                              every other member
    listens                       <-      connects, again and again until it is there: who it is, of how many
    refuses, or "welcome"         ->
    waits for all                 <-      say(key, value)
    "all have said key: values"   ->      goes on
    an empty line a second        <->     an empty line a second

A process that dies, however it dies, has its connections closed by its system: the member is lost at once. A host that is off,
cut off or stopped closes nothing, and is lost after SILENT_BEATS without a line. Who leaves in good order says "bye" before.
Member 0 tells all others who was lost first, so that all give the same name and nobody blames one that only followed. A member
may answer for other processes of its host, and looks at each beat whether they live (`watch`).

The theory calls this a failure detector (Chandra and Toueg 1996). It is never sure of a silent host: a long pause looks the same.
Messages are lines of JSON, over a network that must be a closed one: nobody is asked for a key, as with torch's own TCPStore.
"""

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from common.distributed.processes import RankFailure
from common.distributed.reach import connect

BEAT_S = 1.0
SILENT_BEATS = 10  # counted, not timed: who was stopped itself has counted none
VERSION = 1  # of these messages
MOST_BYTES = 4 << 20  # of a line
TRY_AGAIN_S = 0.2
A_REPLY_S = 10.0
MEMBER_0_SPEAKS_FIRST_S = 5.0
BYE_IS_HEARD_S = 1.0
DRAIN_S = 0.2  # for the other end to close, too


class _Link:
    """A connection to another member. number: who it is, once it has said so."""

    def __init__(self, link: socket.socket, number: int | None = None, name: str = ""):
        link.settimeout(A_REPLY_S)
        self.socket, self.number, self.name = link, number, name
        self.unread = b""
        self.unheard = 0  # beats since its last line

    def send(self, message: dict[str, Any] | None = None) -> None:
        """None is a beat. That nobody listens any more is found out by reading."""
        with suppress(OSError):
            self.socket.sendall((json.dumps(message) if message else "").encode() + b"\n")

    def close(self) -> None:
        """A socket that is closed with something unread resets the connection, and a "bye" on its way is lost with it."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            self.socket.settimeout(DRAIN_S)
            while self.socket.recv(1 << 16):
                pass

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None at the end of the connection, or if these are no messages."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        self.unread += data
        if not data or len(self.unread) > MOST_BYTES:
            return None
        self.unheard = 0
        *lines, self.unread = self.unread.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines if line]
        except ValueError:
            return None
        return messages if all(isinstance(one, dict) for one in messages) else None


class Membership:
    """One member's end. number: 0 .. size - 1; name: how the others shall call it, "rank 1 (pid 4711) on host b"; where: its host.

    listener: member 0's, bound. lost: who was lost first, as a line; None while all are there. One thread works behind it.
    """

    def __init__(
        self, number: int, size: int, name: str, where: str, links: Sequence[_Link], listener: socket.socket | None = None
    ):  # fmt: skip
        self.number, self.size, self.name, self.where = number, size, name, where
        self.lost: str | None = None
        self.left: dict[int, str] = {}  # those who have said bye
        self.watch: Callable[[], str | None] = lambda: None  # asked at each beat: who of this member's own is lost
        self._links, self._listener = list(links), listener
        self._said: dict[str, dict[int, Any]] = {}  # at member 0
        self._all: dict[str, list[Any]] = {}
        self._changed = threading.Condition()
        self._wake, self._woken = socket.socketpair()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)
        self._thread.start()

    @classmethod
    def host(cls, listener: socket.socket, size: int, name: str, where: str) -> "Membership":
        return cls(0, size, name, where, (), listener)

    @classmethod
    def join(
        cls, host: str, port: int, number: int, size: int, name: str, timeout_s: float, where: str
    ) -> "Membership":  # fmt: skip
        """Raises TimeoutError if member 0 is not there in time, ValueError if it refuses, or is something else."""
        link = _connect(host, port, timeout_s)
        link.send({"join": number, "of": size, "name": name, "version": VERSION})
        answer, deadline = [], time.monotonic() + A_REPLY_S
        while answer == [] and time.monotonic() < deadline:
            answer = link.read()
        if not answer or not ({"welcome", "refused"} & answer[0].keys()):
            raise ValueError(f"{host}:{port} answers, but is not the first of these {size}; is another program there?")
        if refused := answer[0].get("refused"):
            raise ValueError(str(refused))
        link.number, link.name = 0, str(answer[0]["welcome"])
        return cls(number, size, name, where, [link])

    @property
    def address(self) -> str | None:
        """This host's own, on the way to the others; None as long as there are none."""
        for link in list(self._links):
            with suppress(OSError):
                return link.socket.getsockname()[0]
        return None

    def all_say(self, key: str, value: Any, timeout_s: float, missing: str) -> list[Any]:
        """Every member says its value, JSON, under this key -> all values, by number, when all have.

        Raises RankFailure if a member is lost meanwhile, TimeoutError(missing.format(number of the first who has not)).
        """
        with self._changed:
            if self.number == 0:
                self._take(key, 0, value)
            else:
                self._links[0].send({"say": key, "value": value})
                timeout_s += MEMBER_0_SPEAKS_FIRST_S  # it knows who is missing
            self._changed.wait_for(lambda: key in self._all or self.lost or self._gone_too_early(key), timeout_s)
            if key in self._all:
                return self._all[key]
            if early := self._gone_too_early(key):
                self._lose(f"{early} has left")
            if self.lost:
                raise RankFailure(self.lost)
            absent = [n for n in range(self.size) if n not in self._said.get(key, {})] if self.number == 0 else [0]
            self._lose(missing.format(absent[0]))
            raise TimeoutError(self.lost)

    def _gone_too_early(self, key: str) -> str | None:
        said = self._said.get(key, {})
        return next((name for number, name in self.left.items() if number not in said), None)

    def leave(self, because: str | None = None) -> None:
        """In good order; `because`: of one that is gone, for all to hear. Safe to call twice."""
        with self._changed:
            if self._over:
                return
            if because:
                self._lose(because)
            for link in self._links:
                link.send({"bye": True})
            self._over = True  # not before: the thread closes the links as soon as it sees it
        self._wake.close()
        self._thread.join(BYE_IS_HEARD_S)

    # --- the thread

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._woken, selectors.EVENT_READ, None)
        for one in (*self._links, *([self._listener] if self._listener else [])):
            selector.register(getattr(one, "socket", one), selectors.EVENT_READ, one)
        beat = time.monotonic() + BEAT_S
        while not self._over:
            for key, _ in selector.select(max(0.0, beat - time.monotonic())):
                with self._changed:
                    if key.data is self._listener and self._listener is not None:
                        self._accept(selector)
                    elif isinstance(key.data, _Link):
                        self._hear(key.data, selector)
            if time.monotonic() >= beat:
                beat = time.monotonic() + BEAT_S
                with self._changed:
                    self._beat(selector)
        for key in list(selector.get_map().values()):
            if isinstance(key.data, _Link):
                key.data.close()
            key.fileobj.close()
        selector.close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        with suppress(OSError):
            selector.register(link := self._listener.accept()[0], selectors.EVENT_READ, _Link(link))

    def _hear(self, link: _Link, selector: selectors.BaseSelector) -> None:
        messages = link.read()
        if messages is None:
            self._forget(link, "has died", selector)
            return
        for message in messages:
            if link.number is None:
                self._admit(link, message)
            elif "lost" in message:
                self._lose(str(message["lost"]))
            elif "bye" in message:
                if link.number is not None:
                    self.left[link.number] = link.name
            elif "say" in message and self.number == 0:
                self._take(str(message["say"]), link.number, message.get("value"))
            elif "all" in message:
                self._all[str(message["all"])] = message.get("values")
        self._changed.notify_all()

    def _admit(self, link: _Link, message: dict[str, Any]) -> None:
        number, size, name = message.get("join"), message.get("of"), str(message.get("name"))
        there = next((one.name for one in self._links if one.number == number), None)
        if message.get("version") != VERSION or not (
            isinstance(number, int) and isinstance(size, int) and 0 < number < size
        ):
            refused = f"{self.name} has other code than {name}; bring both to one commit"
        elif size != self.size:
            refused = f"{name} is one of {size}, but {self.name} of {self.size}; give both the same command"
            self._lose(refused)
        elif there:
            refused = f"{there} is there already, and {name} has the same number; give each its own"
        else:
            link.number, link.name = number, name
            self._links.append(link)
            link.send({"welcome": self.name})
            return
        link.send({"refused": refused})

    def _take(self, key: str, number: int, value: Any) -> None:
        said = self._said.setdefault(key, {})
        said[number] = value
        if len(said) == self.size:
            self._all[key] = [said[n] for n in range(self.size)]
            for link in self._links:
                link.send({"all": key, "values": self._all[key]})
        self._changed.notify_all()

    def _beat(self, selector: selectors.BaseSelector) -> None:
        if self.lost is None and (own := self.watch()):
            self._lose(own)
        for link in list(self._links):
            link.send()
            link.unheard += 1
            if link.unheard > SILENT_BEATS:
                self._forget(link, f"has not been heard of for {SILENT_BEATS * BEAT_S:g} s", selector)

    def _forget(self, link: _Link, what: str, selector: selectors.BaseSelector) -> None:
        selector.unregister(link.socket)
        link.socket.close()
        if link in self._links:
            self._links.remove(link)
            if link.number not in self.left:
                self._lose(f"{link.name} {what}")
        self._changed.notify_all()

    def _lose(self, what: str) -> None:
        """Member 0 tells the others, any other tells member 0; the first name stays."""
        if self.lost is None:
            self.lost = what
            for link in self._links:
                link.send({"lost": what})
            self._changed.notify_all()


def _connect(host: str, port: int, timeout_s: float) -> _Link:
    """Member 0 may not be there yet, nor, where hosts come and go, its name."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return _Link(connect(host, port, max(1.0, min(A_REPLY_S, timeout_s))))
        except OSError as error:
            if time.monotonic() > deadline:
                why = error.strerror or str(error)
                raise TimeoutError(f"nobody answers at {host}:{port} within {timeout_s:g} s ({why})") from None
        time.sleep(TRY_AGAIN_S)
