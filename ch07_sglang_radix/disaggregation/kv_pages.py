"""Pages as bytes: a cut of them to send, and what came put on them. All that touches K and V is here.

On a GPU a side stream does it, behind the step that computes the pages and beside the steps that come after.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ch07_sglang_radix.disaggregation.head_slices import HeadSlice
from ch07_sglang_radix.disaggregation.transport import PeerPages


def as_words(part: torch.Tensor) -> torch.Tensor:
    """[L, planes, N, P, heads, ...] -> [L, planes, N, P, heads, words], the same memory as integers of 8 bytes, if rows divide into
    them, else of one: copied pages are no numbers, and not every dtype of a cache has every kernel."""
    rows = part if part.dim() == 6 else part.unsqueeze(-1)
    nbytes = rows.shape[-1] * rows.element_size()
    return rows.view(torch.int64 if nbytes % 8 == 0 else torch.uint8)


class KVPages:
    """tensors: all that pages hold (PagedKVCache.tensors), of one plane where latent rows stand for K and V. parts: the same, as
    words. bytes_moved: out of them and into them."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self.parts = [as_words(one) for one in tensors]
        first = self.parts[0]
        self.planes, self.heads, self.device = first.shape[1], first.shape[4], first.device
        self.bytes_moved = 0
        self._stream = torch.cuda.Stream(self.device) if first.is_cuda else None

    def bytes_of(self, pages: int, heads: int) -> int:
        return sum(math.prod(_shape(part, pages, heads)) * part.element_size() for part in self.parts)

    def cut(
        self, pages: Sequence[int], heads: tuple[int, ...], ready: torch.cuda.Event | None, kept: Callable[[], bool]
    ) -> "Cut":
        return Cut(self, pages, heads, ready, kept)

    def event(self) -> torch.cuda.Event | None:
        """On a GPU: what was queued so far has been computed."""
        if self._stream is None:
            return None
        return torch.cuda.current_stream(self.device).record_event()

    def read(self, pages: Sequence[int], heads: tuple[int, ...], ready: torch.cuda.Event | None) -> memoryview:
        """The bytes of these heads of these pages, [L, planes, n, P, heads, ...] of each part, by way of the host."""
        with self._beside():
            if ready:
                self._stream.wait_event(ready)
            data = [part.index_select(2, self._ids(pages)) for part in self.parts]
            if heads != tuple(range(self.heads)):
                data = [one.index_select(4, self._ids(heads)) for one in data]
            flat = [one.cpu().view(torch.uint8).reshape(-1) for one in data]
        whole = flat[0] if len(flat) == 1 else torch.cat(flat)
        self.bytes_moved += whole.nbytes
        return memoryview(whole.numpy())

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
        at, rest = self._ids(pages), torch.frombuffer(payload, dtype=torch.uint8)
        for part in self.parts:
            shape = _shape(part, len(pages), len(mine.heads))
            data, rest = rest.tensor_split([math.prod(shape) * part.element_size()])
            data = data.view(part.dtype).view(shape).to(self.device)
            if mine.places == tuple((head, head) for head in range(self.heads)):
                part.index_copy_(2, at, data)
            else:
                for there, here in mine.places:
                    part[..., here, :].index_copy_(2, at, data[..., there, :])

    def _fetch(self, pages: Sequence[int], mine: HeadSlice, peer: PeerPages) -> None:
        """No more is read at the peer than is wanted here. Raises ValueError if it has fewer heads than its cut says."""
        at, there_at, own = self._ids(pages), self._ids(peer.pages), tuple(range(self.heads))
        for part, theirs in zip(self.parts, peer.parts, strict=True):
            heads = theirs.shape[4]
            if max(mine.heads) >= heads:
                raise ValueError(f"head {max(mine.heads)} of a page is wanted, and the peer's have {heads}")
            if mine.heads == own == tuple(range(heads)) and mine.places == tuple(zip(own, own, strict=True)):
                part.index_copy_(2, at, theirs.index_select(2, there_at))
            else:
                for there, here in mine.places:
                    head = theirs[..., mine.heads[there], :]
                    part[..., here, :].index_copy_(2, at, head.index_select(2, there_at))

    def _ids(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device)

    def _beside(self) -> AbstractContextManager:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()


def _shape(part: torch.Tensor, pages: int, heads: int) -> tuple[int, ...]:
    layers, planes, _, page_size, _, words = part.shape
    return layers, planes, pages, page_size, heads, words


@dataclass(frozen=True, eq=False)
class Cut:
    """transport.Payload: these heads of these pages, once the step behind which `ready` was recorded is over. kept: are they still
    the room's? Asked when they have been read: a link may be slow, and the pages another prompt's by then."""

    of: KVPages
    pages: Sequence[int]
    heads: tuple[int, ...]
    ready: torch.cuda.Event | None
    kept: Callable[[], bool]

    def __call__(self) -> memoryview | None:
        read = self.of.read(self.pages, self.heads, self.ready)
        return read if self.kept() else None

    def wait(self) -> None:
        if self.ready:
            self.ready.synchronize()
