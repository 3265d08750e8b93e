"""A checksum against accidents that costs less than the reading: most of it is numpy's products of integers, outside the GIL.

    payload  = rows of 4096 words of 64 bits                        | a rest
    sum_r    = words of row r . weights                             modulo 2^64
    sum'_r   = the same of the words that begin 4 bytes later
    checksum = SHA-256(head | of each piece: its sums, all sum'_r, its rest)

Why two: in a product modulo 2^64 a change of a word's upper bits reaches few bits of the sum (two changed bits 63 cancel whenever
both weights are odd or both even). Each byte lies in the lower half of a word of one of the two. The weights are random and the
same everywhere, so damage that does not know them leaves a row's sums as they were with a probability of 2^-33 at most (a CRC-32:
2^-32), and a single damaged word never does. Whoever wants to forge a page can: so he could with a bare SHA-256, which has no
secret. That one takes as long as the reading; a CRC-32 is little faster where zlib is plain (figures: the README of the wing
quantization/ in chapter 7). Multilinear hashing: Carter, Wegman 1981; Lemire, Kaser 2014, arXiv:1202.4961.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import sha256, shake_128

import numpy as np

ROW = 4096  # words: 32 KB of weights stay in a core's own cache
BYTES = 8 * ROW
LENGTH = 32  # of a checksum


@cache
def weights() -> np.ndarray:
    """[ROW] random words, the same in every engine."""
    return np.frombuffer(shake_128(b"weights of a page's checksum").digest(BYTES), dtype="<u8")


def checksum(head: bytes, payload: Sequence[memoryview]) -> bytes:
    whole = sha256(head)
    for piece in payload:
        for part in _parts(piece):
            whole.update(part)
    return whole.digest()


def _parts(piece: memoryview) -> Iterator[np.ndarray | memoryview]:
    rows = max(len(piece) - 4, 0) // BYTES
    if rows:
        data = np.frombuffer(piece, dtype=np.uint8)
        for first in (0, 4):  # einsum and not dot, which copies words that do not begin at a multiple of 8
            words = data[first : first + rows * BYTES].view("<u8").reshape(rows, ROW)
            yield np.einsum("rw,w->r", words, weights())
    yield piece[rows * BYTES :]
