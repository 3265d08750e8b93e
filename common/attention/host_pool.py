"""The host tier of a rank's pages: copies in the CPU's memory, and the way there and back.

    device   tensors [L, planes, N, P, Hkv/R, ...]        a page in L * planes pieces, as attention reads it
    host     [N', bytes of a page] for each of them       a page in one piece, as disks and buses like it

Page ids of the host are like those of the device: one number, given out by rank 0, means the same page on every rank, and each
rank's page holds its own heads. Raw bytes move, so whatever a page holds (K and V, latent rows, codes and their scales) comes back
as it went.

On a GPU nobody waits. A copy is queued on a stream of its own, behind all that has been computed so far; it has a ticket, and
`join(ticket)` lets what is computed from then on wait for it. Copies run in the order of their tickets. SGLang 0.5.23:
srt/mem_cache/memory_pool_host.py with its layout `page_first`, srt/managers/cache_controller.py.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from common.attention.kv_cache import PagedKVCache
from common.distributed.transfer import upload

CHUNK_BYTES = 64 << 20  # of pages that are put together on the device at a time


class HostKVPool:
    """num_pages copies of pages of `cache`. On a GPU their memory is pinned, or copies could not be queued.

    Raises RuntimeError or MemoryError if there is no such memory.
    """

    def __init__(self, cache: PagedKVCache, num_pages: int):
        self.cache, self.num_pages, self.device = cache, num_pages, cache.kv.device
        self.parts = [torch.empty(num_pages, x.nbytes // cache.num_pages, dtype=torch.uint8) for x in cache.tensors]
        self._rows = [part.numpy() for part in self.parts]  # the same memory
        self.page_bytes = sum(part.shape[1] for part in self.parts)
        self._stream: torch.cuda.Stream | None = None
        self._events: deque[tuple[int, torch.cuda.Event]] = deque()  # of copies that may not be done, the oldest first
        self.newest = 0  # ticket
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            for part in self.parts:  # not pin_memory=True, which takes the next power of two
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(part.data_ptr(), part.nbytes, 0))

    @staticmethod
    def bytes_per_page(cache: PagedKVCache) -> int:
        return sum(x.nbytes // cache.num_pages for x in cache.tensors)

    def close(self) -> None:
        """Wait for what is on its way, and let go of the memory."""
        if self._stream is not None:
            self._stream.synchronize()
            for part in self.parts:
                torch.cuda.cudart().cudaHostUnregister(part.data_ptr())
        self.parts, self._rows, self._stream = [], [], None
        self._events.clear()

    # --- copies

    @torch.no_grad()
    def store(self, ticket: int, device_pages: np.ndarray, host_pages: np.ndarray) -> None:
        """device_pages [n] -> host_pages [n]."""
        device_pages, host_pages = _side_by_side(device_pages, host_pages)
        with self._copying(ticket):
            all_ids = upload(
                device_pages, self.device
            )  # once: pieces of pinned memory are few, and steps need them, too
            for some in self._chunks(len(host_pages)):
                ids, runs = all_ids[some], list(_runs(host_pages[some]))
                for host, pages in zip(self.parts, self.cache.tensors, strict=True):
                    rows = _as_words(pages).index_select(2, ids).movedim(2, 0).flatten(1).view(torch.uint8)
                    for at, first, count in runs:
                        host[first : first + count].copy_(rows[at : at + count], non_blocking=True)

    @torch.no_grad()
    def load(self, ticket: int, host_pages: np.ndarray, device_pages: np.ndarray) -> None:
        """host_pages [n] -> device_pages [n], which nobody uses."""
        device_pages, host_pages = _side_by_side(device_pages, host_pages)
        with self._copying(ticket):
            all_ids = upload(
                device_pages, self.device
            )  # once: pieces of pinned memory are few, and steps need them, too
            for some in self._chunks(len(host_pages)):
                ids, runs = all_ids[some], list(_runs(host_pages[some]))
                for host, pages in zip(self.parts, self.cache.tensors, strict=True):
                    rows = host.new_empty(len(ids), host.shape[1], device=self.device)
                    for at, first, count in runs:
                        rows[at : at + count].copy_(host[first : first + count], non_blocking=True)
                    words = _as_words(pages)
                    shape = (len(ids), *words.shape[:2], *words.shape[3:])
                    words.index_copy_(2, ids, rows.view(words.dtype).view(shape).movedim(0, 2))

    def join(self, ticket: int) -> None:
        """What is computed from now on comes after this copy, and all before it."""
        if events := [event for number, event in self._events if number <= ticket]:
            torch.cuda.current_stream(self.device).wait_event(events[-1])

    def done(self) -> int:
        """The newest ticket of which the copy, and so every one before it, is done."""
        while self._events and self._events[0][1].query():
            self._events.popleft()
        return self._events[0][0] - 1 if self._events else self.newest

    def last_copy(self) -> "torch.cuda.Event | None":
        """For a thread that touches the host's pages: it must synchronize with this first. None: all is done."""
        return self._events[-1][1] if self._events else None

    def page(self, page: int) -> list[memoryview]:
        """Its bytes, to read and to write, of each tensor."""
        return [memoryview(rows[page]) for rows in self._rows]

    @contextmanager
    def _copying(self, ticket: int) -> Iterator[None]:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            yield
            if self._stream is not None:
                event = torch.cuda.Event()
                event.record()
                self._events.append((ticket, event))
        self.newest = ticket

    def _chunks(self, count: int) -> Iterator[slice]:
        step = max(CHUNK_BYTES // self.page_bytes, 1)
        return (slice(first, first + step) for first in range(0, count, step))


def _as_words(pages: torch.Tensor) -> torch.Tensor:
    """The same memory in words as wide as they fit: what moves bytes need not know what they mean."""
    return pages.view(torch.int64 if pages.shape[-1] * pages.element_size() % 8 == 0 else torch.uint8)


def _side_by_side(device_pages: np.ndarray, host_pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same pairs in the order of the host's pages: a stack of free pages gives them out backwards, each a run of its own."""
    order = np.argsort(host_pages)
    return device_pages[order], host_pages[order]


def _runs(pages: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(where it begins in `pages`, its first page, how many): pages side by side are one copy."""
    ends = np.flatnonzero(np.diff(pages) != 1) + 1
    for at, stop in zip([0, *ends.tolist()], [*ends.tolist(), len(pages)], strict=True):
        if stop > at:
            yield at, int(pages[at]), stop - at
