from collections.abc import Iterable
from types import ModuleType

from common.teaching.expect import ask, expect

STREAM = (
    'data: {"text": "万里长城 😀"}\n\n'
    ": still here\n\n"
    "event: token\r\nid: 7\r\ndata:no space\r\n\r\n"
    "data: first\ndata:  second\n\n"
    "\n"
    "data:\n\n"
    "data: [DONE]\n\n"
).encode()
WANTED = ['{"text": "万里长城 😀"}', "no space", "first\n second", "", "[DONE]"]


def check(m: ModuleType) -> None:
    for rest, piece, want in (
        (b"", b'data: {"a": 1}\n\ndata: [DO', (['{"a": 1}'], b"data: [DO")),
        (b"data: [DO", b"NE]\n\n", (["[DONE]"], b"")),
        (b"", b"", ([], b"")),
        (b"data: a\n", b"\n", (["a"], b"")),
        (b"", b"data: a\n", ([], b"data: a\n")),
    ):
        got = tuple(ask(m.events, rest, piece, why="data, rest", several=2))
        expect(f"rest {rest!r}, piece {piece!r}: (data, rest)", got, want)
    expect("a whole stream in one piece", read(m, [STREAM]), (WANTED, b""))
    expect("the same byte by byte", read(m, (STREAM[i : i + 1] for i in range(len(STREAM)))), (WANTED, b""))
    for at in range(1, len(STREAM)):
        got = read(m, [STREAM[:at], STREAM[at:]])
        expect(f"the same in two pieces, the first ends with {STREAM[max(0, at - 6) : at]!r}", got, (WANTED, b""))
    broken = read(m, [b"data: a\n\ndata: b\n"])
    expect("a stream that breaks off: what is not whole is no event", broken, (["a"], b"data: b\n"))


def read(m: ModuleType, pieces: Iterable[bytes]) -> tuple[list[str], bytes]:
    rest, found = b"", []
    for piece in pieces:
        new, rest = ask(m.events, rest, piece, why="data, rest", several=2)
        found += new
    return found, rest
