"""Codes in words: against words written by hand, and against the library that writes compressed-tensors checkpoints."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from common.quantization.packing import pack, unpack, word_count, words_around


def words(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(torch.int32)  # 0x87654321 is a negative int32


GOLDEN = [
    (4, [1, 2, 3, 4, 5, 6, 7, 8], words(0x87654321)),
    (8, [1, 2, 3, 255], words(0xFF030201)),
    (2, [0, 1, 2, 3] * 4, words(0xE4E4E4E4)),
    # 32 codes 0, 1, .., 7, 0, ..: 8 of them are 0b111_110_101_100_011_010_001_000 = 0xFAC688, over and over
    (3, list(range(8)) * 4, words(0x88FAC688, 0xC688FAC6, 0xFAC688FA)),
]


@pytest.mark.parametrize(("bits", "codes", "packed"), GOLDEN)
def test_words_written_by_hand(bits, codes, packed):
    codes = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(pack(codes, bits), packed)
    assert torch.equal(unpack(packed, bits, len(codes)), codes)


def test_a_3_bit_code_between_two_words():
    """AutoGPTQ: code 10 has its two low bits at the top of word 0, and its high bit at the bottom of word 1."""
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[10] = 0b101
    assert pack(codes, 3).tolist() == words(0b01 << 30, 0b1, 0).tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 32, 33, 100])
def test_as_the_library_packs(bits, count):
    codes = torch.randint(1 << bits, (3, count), generator=torch.Generator().manual_seed(count), dtype=torch.int32)
    signed = (codes - (1 << bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits))


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 150), st.data())
def test_any_slice_reads_few_words(bits, count, data):
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    codes = torch.tensor(data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=count, max_size=count)))
    first, last, skip = words_around(start, stop, bits, count)
    assert unpack(pack(codes, bits)[first:last], bits, stop - start, skip).tolist() == codes[start:stop].tolist()
    assert last - first <= word_count(stop - start, bits) + 2 * (bits if bits == 3 else 1)
