"""Solution of exercise 4: The mask, and who may end."""

from collections.abc import Callable, Sequence

Text = Callable[[str], bool]


def allowed(text: str, may_begin: Text, complete: Text, vocab: Sequence[str], end: int) -> list[bool]:
    return [complete(text) if i == end else piece != "" and may_begin(text + piece) for i, piece in enumerate(vocab)]


def bitmask(allowed: Sequence[bool]) -> list[int]:
    words = []
    for start in range(0, len(allowed), 32):
        word = sum(1 << i for i, yes in enumerate(allowed[start : start + 32]) if yes)
        words.append(word - (1 << 32) if word >> 31 else word)
    return words
