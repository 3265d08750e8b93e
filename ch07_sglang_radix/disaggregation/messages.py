"""What the two sides say to each other about rooms: typed structs in MessagePack, and pages as raw bytes behind them.

    decode rank                               prefill rank
      Hello      ------------------------->   who I am                    both ways, first of all
      Reserve    ------------------------->   my pages for this room, before anything is computed for them
      (bytes)    <-------------------------   Write: some of these pages, as soon as they are computed
                 <-------------------------   Metadata: the first token; rank 0 to rank 0
      Done       ------------------------->   I have everything: yours may go
      Fail       <------------------------>   this room comes to nothing, and why
      Ping       <------------------------>   nothing to say for a while

A frame is a head of 16 bytes (magic, bytes of the struct, bytes of the payload), the struct, the payload. Whoever reads it knows
both lengths before it takes a byte, and refuses what is longer than it can be; nothing is unpickled. SGLang 0.5.23 sends multipart
ZeroMQ messages of ASCII numbers for this and writes pages by RDMA (srt/disaggregation/mooncake/conn.py).
"""

import struct
from typing import Annotated, NamedTuple

import msgspec

VERSION = 4  # of this file
MAGIC = 0x4B56_0000 | VERSION  # "KV"
HEAD = struct.Struct("<IIQ")
HANDLE = 64  # bytes of a CUipcMemHandle
MAX_STRUCT = 1 << 22  # bytes: a prompt of 100,000 pages, or the log-probabilities of a long one
Pairs = tuple[tuple[int, float], ...]
Told = tuple[int, float | None, int, Pairs, Pairs]  # TokenLogprobs


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """On the wire a list that begins with the name of the struct."""


class Hello(Message):
    """rank: of so many in its side's tensor-parallel group."""

    version: int
    mode: str  # prefill | decode
    rank: int
    ranks: int


class Reserve(Message):
    """pages: the receiver's ids for the prompt's pages from number `first` on; those before are in its tree. slot: where its
    rank 0 expects the metadata. Nothing is missing where `pages` is empty. digest: what tells the prompt's K and V from
    those of any other tokens or adapter (side.py)."""

    room: int
    slot: int
    first: int
    pages: list[int]
    digest: int


class Write(Message):
    """The payload is this link's heads of these pages, in the receiver's numbers: [L, 2, n, P, heads, d]."""

    room: int
    pages: list[int]


class Metadata(Message):
    """What a decode engine must know to go on. room: a check that the slot has not been given to another room meanwhile. seed: by
    which the first token was drawn, and the others are to be: of a request that brings none each engine would make another."""

    slot: int
    room: int
    token: int
    cached_tokens: int
    seed: int
    logprobs: list[Told] = []
    prompt_logprobs: list[Told] = []


class Done(Message):
    """read: I have read your pages where they lie; were they still the room's when I was done? The answer is Kept, or Fail."""

    room: int
    read: bool = False


class Fail(Message):
    room: int
    why: str


class Ping(Message):
    pass


class Taken(Message):
    """Shared memory alone (shm.py): this half may be written again."""

    side: int


class Block(msgspec.Struct, frozen=True, array_like=True):
    """Memory of a GPU that another process may map: nbytes from offset on, of the cudaMalloc block of `block` bytes that the
    driver's handle stands for."""

    handle: Annotated[bytes, msgspec.Meta(min_length=HANDLE, max_length=HANDLE)]
    offset: Annotated[int, msgspec.Meta(ge=0)]
    nbytes: Annotated[int, msgspec.Meta(gt=0)]
    block: Annotated[int, msgspec.Meta(gt=0)]


class Part(msgspec.Struct, frozen=True, array_like=True):
    """shape [L, planes, N, P, heads, words] of `itemsize` bytes each."""

    block: Block
    shape: Annotated[list[int], msgspec.Meta(min_length=6, max_length=6)]
    itemsize: int


class Pool(Message):
    """CUDA IPC alone (cuda_ipc.py), as the next ones: a prefill rank's pages, on the GPU of this UUID, in parts (kv_pages.py).
    probe: memory beside them in which `marks` lie, to see whether it can be read at all."""

    uuid: Annotated[str, msgspec.Meta(max_length=64)]
    parts: Annotated[list[Part], msgspec.Meta(min_length=1, max_length=2)]
    probe: Block
    marks: bytes


class Opened(Message):
    """Pool is mapped, why is ""; or it is not, and bytes have to come."""

    why: str


class Ready(Message):
    """A Write without bytes: what belongs on your `pages` lies, computed, on mine; read it there."""

    room: int
    pages: list[int]
    mine: list[int]


class Kept(Message):
    """When your Done came nobody else had these pages: what you have read is the room's."""

    room: int


RoomMessage = Reserve | Write | Metadata | Done | Kept | Fail
AnyMessage = Hello | RoomMessage | Ping | Taken | Pool | Opened | Ready
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(AnyMessage).decode


class Lengths(NamedTuple):
    message: int
    payload: int


def encode(message: AnyMessage, payload_bytes: int = 0) -> bytes:
    """Head and struct; the payload goes behind it."""
    body = _encode(message)
    if len(body) > MAX_STRUCT:
        raise ValueError(f"{type(message).__name__} has {len(body):,} bytes, and may have {MAX_STRUCT:,}")
    return HEAD.pack(MAGIC, len(body), payload_bytes) + body


def lengths(head: bytes) -> Lengths:
    """Raises ValueError if this is no frame, or too long a one."""
    if len(head) != HEAD.size:
        raise ValueError(f"a frame begins with {HEAD.size} bytes, these are {len(head)}")
    magic, message, payload = HEAD.unpack(head)
    if magic != MAGIC:
        raise ValueError(f"not a frame of version {VERSION}: it begins with {magic:#010x}, not {MAGIC:#010x}")
    if message > MAX_STRUCT:
        raise ValueError(f"a message of {message:,} bytes is announced, and may have {MAX_STRUCT:,}")
    return Lengths(message, payload)


def decode(body: bytes) -> AnyMessage:
    """Raises ValueError for whatever is none of the messages."""
    return _decode(body)
