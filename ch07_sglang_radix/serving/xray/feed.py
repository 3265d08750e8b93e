"""Between one engine and any number of open pages: whoever is slow loses events, never the engine its pace."""

import asyncio
from collections.abc import AsyncIterator, Callable

from ch07_sglang_radix.serving.xray.events import is_snapshot

MOST_WAITING = 256  # events for a page that does not read; then they are dropped, and it goes on from a snapshot
HEARTBEAT_S = 15.0  # after so long without one an empty event is sent: it shows who has gone, and no proxy ends it
MOST_PAGES = 16  # open at a time; each gets a copy of every event


class Feed:
    """In the event loop of the HTTP server.

    watch(True): somebody has come, or must begin anew: `Recorder.start` is to be called, whose snapshot then arrives by
    `publish`. watch(False): the last one has left: `Recorder.stop`. It must not block.
    """

    def __init__(self, watch: Callable[[bool], None]):
        self._watch = watch
        self._pages: set[_Page] = set()
        self._closed = False

    def publish(self, event: bytes) -> None:
        """Hand an event to every page. From another thread: loop.call_soon_threadsafe(feed.publish, event)."""
        for page in self._pages:
            page.put(event)

    @property
    def full(self) -> bool:
        return len(self._pages) >= MOST_PAGES

    async def subscribe(self) -> AsyncIterator[bytes]:
        """A snapshot, then what follows; b"" now and then where nothing does. Ends with `close`. Ask `full` first."""
        page = _Page(self._watch)
        if self._closed:
            page.end()
        self._pages.add(page)
        try:
            while (event := await page.get()) is not None:
                yield event
        finally:
            self._pages.discard(page)
            if not self._pages:
                self._watch(False)

    def close(self) -> None:
        """The server goes: no page waits for more, and none begins to."""
        self._closed = True
        for page in self._pages:
            page.end()


class _Page:
    """What one page has not read yet."""

    def __init__(self, watch: Callable[[bool], None]):
        self._watch = watch
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._lost = True  # until a snapshot comes; changes alone say nothing
        self._asked = self._ended = False

    def put(self, event: bytes) -> None:
        if self._lost and not is_snapshot(event):
            return
        if self._waiting.qsize() >= MOST_WAITING:
            while not self._waiting.empty():
                self._waiting.get_nowait()
            self._lost, self._asked = True, False
            return
        self._lost = False
        self._waiting.put_nowait(event)

    async def get(self) -> bytes | None:
        """The next event; None after `end`. Only who reads asks for a snapshot, so a page that sleeps costs nothing."""
        if self._ended and self._waiting.empty():
            return None
        if self._lost and not self._asked and not self._ended:
            self._asked = True
            self._watch(True)
        try:
            return await asyncio.wait_for(self._waiting.get(), HEARTBEAT_S)
        except asyncio.TimeoutError:  # another one than TimeoutError before Python 3.11
            return b""

    def end(self) -> None:
        self._ended = True
        self._waiting.put_nowait(None)
