"""Pages between two GPUs of one host: the decode rank reads them where they lie, and no byte goes by way of the host.

    prefill rank                                       decode rank
      Pool     my pages: a handle, lengths    ----->   maps them, once for each link, and looks whether they can be read
               <-----                                  Opened
      Ready    these are computed             ----->   a kernel on its side stream copies them into its own
               <-----                                  Done, read=true: I have everything
      Kept     they were the room's           ----->   only now is the room at Success

Who reads, not who writes, because then every page is written by its owner alone: a decode engine that gives a room up has its pages
back at once, and no copy of somebody else's can still be on its way to them. What could go wrong instead is that prefill gives a
room up and computes something else on its pages while they are being read; so Done asks, and is answered by Kept, or by the Fail
that went before. The event of the step is waited for before Ready is sent, in the link's thread: the next chunk is computed
meanwhile. vLLM's NixlConnector reads as well (v1/nixl/pull_worker.py), SGLang's Mooncake writes
(0.5.23, srt/disaggregation/mooncake/conn.py).

A decode rank that cannot map the pages says why in one line, and pages come as bytes, as in tcp.py.
"""

import logging
import math
import secrets
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import torch

from ch07_sglang_radix.disaggregation.messages import AnyMessage, Opened, Part, Pool, Ready, Write
from ch07_sglang_radix.disaggregation.peer_memory import CudaMemory, PeerMemory, fits
from ch07_sglang_radix.disaggregation.tcp import TcpLink, TcpTransport, first_line
from ch07_sglang_radix.disaggregation.transport import SILENCE_S, Handler, Payload, PeerPages

log = logging.getLogger(__name__)
MARKS = 64  # bytes


class CudaIpcLink(TcpLink):
    """mine: what this end, of the prefill side, lets the other read; None: it is the one who reads."""

    def __init__(
        self, memory: PeerMemory, mine: Pool | None, handler: Handler, bound: socket.socket | None, address: str = ""
    ):
        self._memory, self._mine = memory, mine
        self._answered, self._refused = threading.Event(), ""  # prefill: what the other end says to its pool
        self._opened: list[torch.Tensor] = []  # decode: the parts of the other end's pool, as bytes
        self._theirs: list[torch.Tensor] = []  # and as pages
        super().__init__(handler, bound, address)

    def _read(self) -> None:
        super()._read()
        self._unmap()  # in the thread that alone reads it, so never under a copy

    def _greet(self, message: AnyMessage) -> None:
        super()._greet(message)
        if self._mine:
            self.send(self._mine)

    def _put(self, message: AnyMessage, payload: Payload | None, size: int) -> None:
        if payload and self._is_mapped():
            payload.wait()
            message, payload, size = Ready(message.room, message.pages, list(payload.pages)), None, 0
        super()._put(message, payload, size)

    def _is_mapped(self) -> bool:
        if not self._answered.wait(SILENCE_S):
            raise TimeoutError(f"the decode side has not said within {SILENCE_S:g} s whether it can read pages")
        return not self._refused

    def _hand_over(self, message: AnyMessage, size: int) -> None:
        if isinstance(message, Pool):
            self._map(message)
        elif isinstance(message, Opened):
            self._refused = message.why
            self._answered.set()
        elif isinstance(message, Ready):
            pages = self._pages_of(message)
            self.handler.take(self, Write(message.room, message.pages), pages)
        else:
            super()._hand_over(message, size)

    def _map(self, pool: Pool) -> None:
        mine = self.handler.parts
        refuse_another_shape(pool, mine)
        why = ""
        try:
            look_whether_it_can_be_read(self._memory, pool)
            for part, own in zip(pool.parts, mine, strict=True):
                self._opened.append(self._memory.open(part.block))
                self._theirs.append(self._opened[-1].view(own.dtype).view(part.shape))
        except RuntimeError as error:
            self._unmap()
            why = first_line(error)
            log.warning(
                "CUDA IPC: pages of prefill rank %d on GPU %s cannot be read from GPU %s, and come by way of the host: %s",
                self.peer.rank, pool.uuid, self._memory.uuid, why,
            )  # fmt: skip
        self.send(Opened(why))

    def _unmap(self) -> None:
        self._theirs = []
        while self._opened:
            with suppress(RuntimeError):  # of a peer that has died the driver may know nothing any more
                self._memory.close(self._opened.pop())

    def _pages_of(self, ready: Ready) -> PeerPages:
        if not self._theirs:
            raise ValueError("pages are to be read that this side has not mapped")
        n = self._theirs[0].shape[2]
        if len(ready.mine) != len(ready.pages) or not all(0 <= page < n for page in ready.mine):
            raise ValueError(f"{len(ready.mine)} pages for {len(ready.pages)}, or none of {n}: {ready.mine[:8]}")
        return PeerPages(self._theirs, ready.mine)


class CudaIpcTransport(TcpTransport):
    """memory: CudaMemory, of the GPU of the handler's pool. Raises ValueError if the pool is on none, or cannot be shared."""

    def __init__(self, handler: Handler, memory: PeerMemory | None = None):
        device = handler.parts[0].device
        memory, mine = memory or CudaMemory(device), None
        if handler.hello.mode == "prefill":
            parts = [Part(memory.export(one), list(one.shape), one.element_size()) for one in handler.parts]
            marks = secrets.token_bytes(MARKS)
            self._probe = torch.frombuffer(bytearray(marks), dtype=torch.uint8).to(device)
            mine = Pool(memory.uuid, parts, memory.export(self._probe), marks)
        self.link = partial(CudaIpcLink, memory, mine)
        super().__init__(handler)


def refuse_another_shape(pool: Pool, mine: Sequence[torch.Tensor]) -> None:
    """Raises ValueError for lengths that contradict each other, or pages that are none like `mine`; the two sides' numbers of pages
    and of heads may differ."""
    for part in pool.parts:
        nbytes, block = math.prod(part.shape) * part.itemsize, part.block
        if block.nbytes != nbytes or not fits(block) or min(part.shape) < 1:
            raise ValueError(
                f"a pool {part.shape} of {part.itemsize} bytes each has {nbytes:,} bytes; {block.nbytes:,} are announced, from "
                f"{block.offset:,} on in a block of {block.block:,}"
            )
    if pool.probe.nbytes != len(pool.marks) or not fits(pool.probe):
        raise ValueError(f"{len(pool.marks)} marks are announced in a probe of {pool.probe.nbytes}")
    theirs, own = ([(list(one.shape), size) for one, size in side] for side in (
        [(part, part.itemsize) for part in pool.parts], [(part, part.element_size()) for part in mine],
    ))  # fmt: skip
    alike = [[(s[0], s[1], s[3], s[5], size) for s, size in side] for side in (theirs, own)]
    if alike[0] != alike[1] or len({shape[2] for shape, _ in theirs}) > 1:
        raise ValueError(f"a pool of (shape, bytes each) {theirs}; mine is {own}")


def look_whether_it_can_be_read(memory: PeerMemory, pool: Pool) -> None:
    """Drivers have mapped what they could not read (vLLM looks, too: gpu_p2p_access_check). Raises RuntimeError if it is so."""
    probe = memory.open(pool.probe)
    every = torch.arange(len(probe), device=probe.device)
    seen = probe.index_select(0, every).cpu().numpy().tobytes()  # by a kernel, as pages will be read
    memory.close(probe)
    if seen != pool.marks:
        raise RuntimeError("what is read there is not what lies there; this host's cards cannot read each other")
