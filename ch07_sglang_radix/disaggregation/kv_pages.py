"""Pages as bytes: a cut of them to send, and what came put on them. All that touches K and V is here.

On a GPU a side stream does it, behind the step that computes the pages and beside the steps that come after.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ch07_sglang_radix.disaggregation.head_slices import HeadSlice
from ch07_sglang_radix.disaggregation.transport import PeerPages


def as_words(kv: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of 8 bytes, if rows divide into them, else of one: copied pages are no numbers, and not every
    dtype of a cache has every kernel."""
    row = kv.shape[-1] * kv.element_size()
    return kv.view(torch.int64 if row % 8 == 0 else torch.uint8)


class KVPages:
    """kv [L, 2, N, P, Hkv/R, d], or latent rows [L, 1, N, P, 1, c + r]. bytes_moved: out of them and into them."""

    def __init__(self, kv: torch.Tensor):
        self.kv, self.bytes_moved = kv, 0
        self._words = as_words(kv)
        self._stream = torch.cuda.Stream(kv.device) if kv.is_cuda else None

    def bytes_of(self, pages: int, heads: int) -> int:
        layers, planes, _, page_size, _, head_dim = self.kv.shape
        return layers * planes * pages * page_size * heads * head_dim * self.kv.element_size()

    def cut(self, pages: Sequence[int], heads: tuple[int, ...], ready: torch.cuda.Event | None) -> "Cut":
        return Cut(self, pages, heads, ready)

    def event(self) -> torch.cuda.Event | None:
        """On a GPU: what was queued so far has been computed."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def read(self, pages: Sequence[int], heads: tuple[int, ...], ready: torch.cuda.Event | None) -> memoryview:
        """The bytes of these heads of these pages, [L, 2, n, P, heads, d], by way of the host."""
        with self._beside():
            if ready:
                self._stream.wait_event(ready)
            data = self._words.index_select(2, self._ids(pages))
            if heads != tuple(range(self.kv.shape[4])):
                data = data.index_select(4, self._ids(heads))
            data = data.cpu()
        self.bytes_moved += data.nbytes
        return memoryview(data.view(torch.uint8).numpy().reshape(-1))

    def write(self, pages: Sequence[int], mine: HeadSlice, payload: memoryview | PeerPages) -> None:
        """Bytes, or pages that a peer has, -> these pages' heads; back when they lie there."""
        with self._beside():
            if isinstance(payload, PeerPages):
                self._fetch(pages, mine, payload)
            else:
                self._put(pages, mine, payload)
        if self._stream:
            self._stream.synchronize()
        self.bytes_moved += self.bytes_of(len(pages), len(mine.heads))

    def _put(self, pages: Sequence[int], mine: HeadSlice, payload: memoryview) -> None:
        layers, planes, _, page_size, own, words = self._words.shape
        shape = (layers, planes, len(pages), page_size, len(mine.heads), words)
        data = torch.frombuffer(payload, dtype=torch.uint8).view(self._words.dtype).view(shape)
        data, at = data.to(self.kv.device), self._ids(pages)
        if mine.places == tuple((head, head) for head in range(own)):
            self._words.index_copy_(2, at, data)
        else:
            for there, here in mine.places:
                self._words[..., here, :].index_copy_(2, at, data[..., there, :])

    def _fetch(self, pages: Sequence[int], mine: HeadSlice, peer: PeerPages) -> None:
        """No more is read at the peer than is wanted here. Raises ValueError if it has fewer heads than its cut says."""
        theirs, at, there_at = as_words(peer.pool), self._ids(pages), self._ids(peer.pages)
        if max(mine.heads) >= theirs.shape[4]:
            raise ValueError(f"head {max(mine.heads)} of a page is wanted, and the peer's have {theirs.shape[4]}")
        own = tuple(range(self.kv.shape[4]))
        if mine.heads == own == tuple(range(theirs.shape[4])) and mine.places == tuple(zip(own, own, strict=True)):
            self._words.index_copy_(2, at, theirs.index_select(2, there_at))
        else:
            for there, here in mine.places:
                heads = theirs[..., mine.heads[there], :]
                self._words[..., here, :].index_copy_(2, at, heads.index_select(2, there_at))

    def _ids(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.kv.device)

    def _beside(self) -> AbstractContextManager:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()


@dataclass(frozen=True, eq=False)
class Cut:
    """transport.Payload: these heads of these pages, once the step behind which `ready` was recorded is over."""

    of: KVPages
    pages: Sequence[int]
    heads: tuple[int, ...]
    ready: torch.cuda.Event | None

    def __call__(self) -> memoryview:
        return self.of.read(self.pages, self.heads, self.ready)

    def wait(self) -> None:
        if self.ready:
            self.ready.synchronize()
