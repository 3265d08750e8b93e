import random
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from common.teaching.expect import ask, expect

VOCAB = ["y", "es", "yes", "no", "n", "o", " and", " no", "x", "", "", "", " yes"]
END = 10  # 9 and 11 are special tokens too
LANGUAGE = [first + second for first in ("yes", "no") for second in ("", " and yes", " and no")]


def complete(text: str) -> bool:
    return text in LANGUAGE


def may_begin(text: str) -> bool:
    return any(one.startswith(text) for one in LANGUAGE)


def check(m: ModuleType) -> None:
    for text, want in (
        ("", ["y", "yes", "no", "n"]),
        ("y", ["es"]),
        ("yes", [" and", END]),
        ("no", [" and", END]),
        ("yes and", [" no", " yes"]),
        ("yes and no", [END]),
    ):
        ids = [VOCAB.index(one) if isinstance(one, str) else one for one in want]
        said = f"tokens allowed behind {text!r} ({END} is the end, 9 and 11 are special tokens without a text)"
        why = f"{said}: a bool for each of {len(VOCAB)}"
        got = ask(m.allowed, text, may_begin, complete, VOCAB, END, why=why, several=True)
        expect(said, [i for i, yes in enumerate(got) if yes], sorted(ids))
        expect(f"a value for each token, behind {text!r}", len(got), len(VOCAB))
    for bits in (
        [True, False, True],
        [False] * 31 + [True],
        [False] * 32 + [True],
        [True] * 64,
        [False] * 40,
        [True] * 33,
    ):
        said = f"bitmask of {said_bits(bits)}"
        expect(said, ask(m.bitmask, bits, why=f"{said}: {packed(bits)}", several=True), packed(bits))
    rng = random.Random(0)
    for trial in range(40):
        taste = [rng.random() for _ in VOCAB]
        if trial % 2:
            taste[END] = 2.0  # a model that would end at once
        text = write(m, taste)
        expect(f"an answer of a model that likes {order(taste)} best: is it in the language", complete(text), True)


def write(m: ModuleType, taste: Sequence[float]) -> str:
    """The best token that is allowed, until the end; what has not ended after 20 is cut off."""
    text = ""
    for _ in range(20):
        words = ask(m.bitmask, ask(m.allowed, text, may_begin, complete, VOCAB, END), several=True)
        some = [i for i in range(len(VOCAB)) if words[i // 32] >> (i % 32) & 1]
        assert some, f"tokens allowed behind {text!r}: got none, wanted one at least"
        best = max(some, key=taste.__getitem__)
        if best == END:
            return text
        text += VOCAB[best]
    return text + " (cut off)"


def order(taste: Sequence[float]) -> list[int]:
    return sorted(range(len(taste)), key=taste.__getitem__)[:-4:-1]


def packed(bits: Sequence[bool]) -> list[int]:
    whole = np.zeros((len(bits) + 31) // 32 * 32, dtype=np.uint8)
    whole[: len(bits)] = bits
    return np.packbits(whole, bitorder="little").view(np.int32).tolist()


def said_bits(bits: Sequence[bool]) -> str:
    return (
        f"{len(bits)} tokens, allowed {[i for i, yes in enumerate(bits) if yes][:3]}{' ...' if sum(bits) > 3 else ''}"
    )
