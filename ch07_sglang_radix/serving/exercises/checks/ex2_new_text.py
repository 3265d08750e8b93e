from collections.abc import Callable, Sequence
from types import ModuleType

from common.teaching.expect import ask, expect

WORDS = ["▁The", "▁Great", "▁Wall", "▁of", "▁Ch", "ina", ",", "▁long", "▁and", "▁old", "."]
LONG = "长城 wall 😀 " * 60


class Decoder:
    """decode, and how many tokens it was given."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode, self.tokens = decode, 0

    def __call__(self, ids: list[int]) -> str:
        self.tokens += len(ids)
        return self._decode(list(ids))


def check(m: ModuleType) -> None:
    expect("e9, 95, bf, a token a byte: sent after each", sent(m, "长".encode(), in_bytes), ["", "", "长"])
    for text in ("plain", "naïve 长城 😀!", "😀😀😀"):
        pieces = sent(m, text.encode(), in_bytes)
        halves = [one for one in pieces if "\ufffd" in one]
        expect(f"{text!r}, a token a byte: pieces with half a character", halves, [])
        expect(f"{text!r}, a token a byte: all that was sent", "".join(pieces), text)
        expect(f"{text!r}, a token a byte: sent after each", pieces, as_soon_as_whole(text.encode()))
    want = ["The", *(word.replace("▁", " ") for word in WORDS[1:])]
    expect(
        "words that lose their space if they stand first: sent after each", sent(m, range(len(WORDS)), in_words), want
    )
    decoder, ids = Decoder(in_bytes), LONG.encode()
    expect("a long answer: all that was sent", "".join(sent(m, ids, decoder)), LONG)
    most = 12 * len(ids)
    assert decoder.tokens <= most, (
        f"a long answer, not all decoded each time: got {decoder.tokens} tokens decoded for {len(ids)}, wanted {most} at most"
    )


def sent(m: ModuleType, ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What is sent after each token."""
    pieces, surr, read = [], 0, 0
    for n in range(1, len(ids) + 1):
        text, surr, read = ask(m.new_text, list(ids[:n]), surr, read, decode, why="text, surr, read", several=3)
        pieces.append(text)
    return pieces


def in_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def in_words(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids).replace("▁", " ").removeprefix(" ")


def as_soon_as_whole(raw: bytes) -> list[str]:
    pieces, waiting = [], b""
    for byte in raw:
        waiting += bytes([byte])
        try:
            pieces.append(waiting.decode())
            waiting = b""
        except UnicodeDecodeError:
            pieces.append("")
    return pieces
