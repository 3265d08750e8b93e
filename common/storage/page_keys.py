"""The names of pages: what lies in a page is told by all tokens up to its end, and by who has computed it.

    h_0 = SHA-256(namespace)
    h_i = SHA-256(h_{i-1} | the tokens of page i)        a chain: page i is named by pages 1 .. i
    name of a rank's page = SHA-256(seed | h_i)          seed: the weights, the form of a page, the rank and how many there are

K and V of a token depend on every token before it, so a page that was named by its own tokens alone would be found behind any other
beginning. Equal names mean equal bytes, up to rounding: nobody has to be asked, and engines that share a folder need no lock.
SGLang 0.5.23: get_hash_str in srt/mem_cache/hicache_storage.py, where rank and model stand in the file's name.
"""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np


def first_key(namespace: str) -> bytes:
    """h_0."""
    return sha256(namespace.encode()).digest()


def chain(last: bytes, pages: np.ndarray) -> list[bytes]:
    """h of each page behind the one of `last`. pages [n, P]: their tokens."""
    keys = []
    for page in np.ascontiguousarray(pages, dtype="<i8"):
        last = sha256(last + page.tobytes()).digest()
        keys.append(last)
    return keys


def as_words(keys: Sequence[bytes]) -> list[int]:
    """Four int64 for each, to be told to other ranks."""
    return np.frombuffer(b"".join(keys), dtype="<i8").tolist()


def from_words(words: Sequence[int]) -> list[bytes]:
    data = np.array(words, dtype="<i8").tobytes()
    return [data[i : i + 32] for i in range(0, len(data), 32)]
