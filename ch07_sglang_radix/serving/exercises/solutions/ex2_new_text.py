"""Solution of exercise 2: The text that a token adds."""

from collections.abc import Callable

HALF = "\ufffd"


def new_text(ids: list[int], surr: int, read: int, decode: Callable[[list[int]], str]) -> tuple[str, int, int]:
    sent, text = decode(ids[surr:read]), decode(ids[surr:])
    if text.endswith(HALF) or len(text) <= len(sent):
        return "", surr, read  # wait for the rest of the character
    return text[len(sent) :], read, len(ids)
