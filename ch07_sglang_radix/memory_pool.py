"""The two pools of rank 0: request -> token slots, and which slots are free.

    ReqToTokenPool   row of a request, position of a token  ->  slot      SGLang: req_to_token_pool
    TokenToKVPool    which pages are free                                 SGLang: token_to_kv_pool_allocator
    PagedKVCache     slot -> K and V of this rank's heads (common/)       SGLang: token_to_kv_pool (MHATokenToKVPool)

Only the last lies on every rank. A slot is one token's place, a page is P slots side by side: slot = page * P
+ offset. The tree and the requests speak of slots; they are given and taken back by whole pages.
"""

import mmap

import numpy as np


class ReqToTokenPool:
    """One row of slots for each running request: req_to_token [max_running_requests, max_context].

    A row is as long as the longest request may be, 8 bytes a token; the system hands out its memory as it is written, a page of
    512 tokens at a time. 1,024 rows of 131,072 tokens are 1 GiB of addresses, and of memory what the longest request that each
    of them had has needed. Windows sets all of it apart at once; on Linux the mapping is MAP_SHARED, and counts as shared memory.
    """

    def __init__(self, max_running_requests: int, max_context: int):
        # a mapping, not np.zeros: NumPy asks Linux for pages of 2 MiB, of which the first token of a row would take a whole one
        addresses = mmap.mmap(-1, max_running_requests * max_context * np.dtype(np.int64).itemsize)
        self.req_to_token = np.frombuffer(addresses, dtype=np.int64).reshape(max_running_requests, max_context)
        self._free = list(range(max_running_requests))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self) -> int:
        """A free row; IndexError if there is none (ask `num_free` first)."""
        return self._free.pop()

    def free(self, row: int) -> None:
        if row in self._free:
            raise ValueError(f"row {row} of req_to_token is freed twice")
        self._free.append(row)


class TokenToKVPool:
    """The free pages. Rank 0 alone gives them out, so a page id means the same page on every rank.

    Of page ids it knows the number alone: what a page holds, and on which ranks, is the executor's business.
    """

    def __init__(self, num_pages: int = 0, page_size: int = 1):
        self.num_pages, self.page_size = num_pages, page_size
        self._free = np.arange(self.num_pages, dtype=np.int64)[::-1]  # a stack, page 0 on top
        self._num_free = self.num_pages
        self._is_free = np.ones(self.num_pages, dtype=bool)
        self.taken = self.given = 0  # pages since the beginning, for traces

    @property
    def num_free_pages(self) -> int:
        return self._num_free

    @property
    def free_slots(self) -> int:
        """Free places for tokens."""
        return self._num_free * self.page_size

    @property
    def size(self) -> int:
        """All places for tokens."""
        return self.num_pages * self.page_size

    def alloc(self, num_pages: int) -> np.ndarray | None:
        """[num_pages * P] slots, page by page; None if fewer pages are free, and then nothing is taken."""
        if num_pages > self._num_free:
            return None
        pages = self._free[self._num_free - num_pages : self._num_free][::-1]
        self._num_free -= num_pages
        self._is_free[pages] = False
        self.taken += num_pages
        return (pages[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)

    def free(self, slots: np.ndarray) -> None:
        """Give back the pages that `slots` lie on: whole pages, each named by its first slot at least.

        Raises ValueError for a page that is free already, before anything changes.
        """
        pages = slots[:: self.page_size] // self.page_size
        if len(pages) == 0:
            return
        twice = pages[self._is_free[pages]]
        if len(twice) or len(set(pages.tolist())) != len(pages):
            raise ValueError(f"pages {sorted(set((twice if len(twice) else pages).tolist()))[:8]} are freed twice")
        self._free[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)
        self._is_free[pages] = True
        self.given += len(pages)

    def free_pages(self) -> np.ndarray:
        """The ids of the free pages, for the invariant check."""
        return self._free[: self._num_free]
