"""How messages and pages get from one rank to another: the contract that every transport fills.

    transport.address                  what a peer connects to, as text
    link = transport.connect(address)  the peer's Hello comes first, then what it sends, in order
    link.send(message, payload)        returns at once; a payload is read from the pages when its turn comes

Three things a room relies on (rooms.py), whatever carries the bytes: what is sent on one link arrives in order or the link is lost;
`take` of a Write is called when its bytes lie where `place` said; a peer that dies, or is silent for SILENCE_S, is lost. RDMA
libraries have the same: Mooncake's transfer_sync_write and NIXL's notifications, which arrive behind the writes that they
follow (SGLang 0.5.23, srt/disaggregation/mooncake/conn.py, nixl/conn.py). Here: tcp.py, shm.py and, between GPUs, cuda_ipc.py.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from ch07_sglang_radix.disaggregation.messages import AnyMessage, Hello, Write

PING_S = 5.0  # without a message, after which a link says that it lives; SGLang's heartbeat
SILENCE_S = 2 * PING_S + 1  # two are missing: the peer is gone, whatever the system says


class Payload(Protocol):
    """What goes with a Write. Called in the link's thread. pages: where it lies, in this end's numbers."""

    pages: Sequence[int]

    def __call__(self) -> memoryview | None:
        """Its bytes, when they are about to leave. None: the room has been given up, and the Write is not sent."""
        ...

    def wait(self) -> None:
        """Until the step that computes it is over."""
        ...


class PeerPages(NamedTuple):
    """Instead of bytes: these pages of the other end's pool, which this process can read. parts: as those of KVPages."""

    parts: Sequence[torch.Tensor]
    pages: Sequence[int]


class Link(Protocol):
    """One connection. peer: who the other end is, None until it has said so."""

    peer: Hello | None

    def send(self, message: AnyMessage, payload: Payload | None = None, size: int = 0) -> None:
        """size: bytes of the payload. On a link that is lost nothing happens: the handler has been told."""
        ...

    def close(self) -> None: ...


class Handler(Protocol):
    """Whose messages they are. Called from the links' threads."""

    hello: Hello
    parts: Sequence[torch.Tensor]  # its pool, each [L, planes, N, P, heads, words] (kv_pages.py)

    def greeted(self, link: Link) -> None:
        """The peer has said who it is. Raises ValueError if it is nobody to talk to, and the link is lost."""
        ...

    def place(self, link: Link, write: Write, size: int) -> memoryview | None:
        """Where the payload goes before it is looked at; None: read and forgotten. Raises ValueError if it has a wrong size."""
        ...

    def take(self, link: Link, message: AnyMessage, payload: memoryview | PeerPages | None) -> None: ...

    def lost(self, link: Link, why: str) -> None:
        """Once, for a link that has been greeted or that was asked for, unless it was closed here."""
        ...


class Transport(Protocol):
    address: str

    def connect(self, address: str) -> Link:
        """At once; if nobody is there the handler hears that the link is lost."""
        ...

    def close(self) -> None: ...
