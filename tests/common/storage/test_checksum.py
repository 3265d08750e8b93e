"""A page's checksum: what it is, and that no accident of the kinds that a sum could miss gets past it."""

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.storage.checksum import BYTES, ROW, checksum, weights

DATA = np.random.default_rng(0).integers(0, 256, 3 * BYTES + 100, dtype=np.uint8).tobytes()


def of(*pieces: bytes) -> bytes:
    return checksum(b"head", [memoryview(piece) for piece in pieces])


def test_it_is_what_its_text_says():
    words = [int(w) for w in weights()]

    def sums(first: int) -> bytes:
        found = []
        for row in range(3):
            at = first + row * BYTES
            mine = [int.from_bytes(DATA[at + 8 * i : at + 8 * i + 8], "little") for i in range(ROW)]
            found.append(sum(x * w for x, w in zip(mine, words, strict=True)) % 2**64)
        return np.array(found, dtype="<u8").tobytes()

    assert of(DATA) == sha256(b"head" + sums(0) + sums(4) + DATA[3 * BYTES :]).digest()
    assert of(DATA[:50], b"", DATA[50:90]) == sha256(b"head" + DATA[:90]).digest()


@given(length=st.sampled_from([1, BYTES, BYTES + 3, BYTES + 4, BYTES + 5, len(DATA)]), data=st.data())
def test_no_bit_may_turn(length, data):
    turned = bytearray(DATA[:length])
    turned[data.draw(st.integers(0, length - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert of(bytes(turned)) != of(DATA[:length])


def test_a_single_word_of_any_weight_is_found():
    """A change of a word's lower half reaches the sum unless the weight ends in 33 zeros."""
    assert (weights() & np.uint64(2**33 - 1) != 0).all()


def test_two_upper_bits_that_one_sum_would_miss_are_found():
    odd = np.flatnonzero(weights() % 2)[:2]
    turned = bytearray(DATA)
    for word in odd:
        turned[8 * int(word) + 7] ^= 0x80
    rows = [np.frombuffer(data, dtype="<u8", count=ROW) for data in (DATA, bytes(turned))]
    one_sum = [np.einsum("w,w->", row, weights()) for row in rows]
    assert one_sum[0] == one_sum[1], "this is the case that the second sum is for"
    assert of(bytes(turned)) != of(DATA)


@pytest.mark.parametrize(
    "other",
    [
        DATA[BYTES : 2 * BYTES] + DATA[:BYTES] + DATA[2 * BYTES :],
        DATA[8:16] + DATA[:8] + DATA[16:],
        bytes(BYTES) + DATA[BYTES:],
        DATA[:BYTES] + bytes(len(DATA) - BYTES),
        DATA + b"\0",
        DATA[:-1],
    ],
    ids=["rows changed places", "words changed places", "a row of zeros", "zeros from there on", "longer", "shorter"],
)
def test_damage_of_whole_pieces_is_found(other):
    assert of(other) != of(DATA)


def test_pieces_that_changed_places_are_found():
    assert of(DATA[:BYTES], DATA[BYTES : 2 * BYTES]) != of(DATA[BYTES : 2 * BYTES], DATA[:BYTES])


def test_nothing_but_zeros_is_no_page_of_zeros():
    """What a crash may leave of a file whose end was never written."""
    assert of(bytes(3 * BYTES)) != bytes(32)
