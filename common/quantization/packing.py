"""Small numbers side by side in 32-bit words: what GPTQ, AWQ and compressed-tensors all do, each along another axis.

Code i of a row stands in bits b*i .. b*i + b-1 of one long string of bits, the lowest first; words are cut from that string, so
a code of 3 bits may begin in one word and end in the next. 8 codes of b bits are b bytes, whatever b is, and that is how they
are unpacked here:

    bits 4   | c0 c1 | c2 c3 | c4 c5 | c6 c7 |     the low half of a byte is the earlier code
    bits 3   | c0 c1 c2 .. c7 |                    3 bytes: c2 begins in the first and ends in the second

Sources: AutoGPTQ auto_gptq/nn_modules/qlinear/qlinear_cuda.py (its branch for 3 bits is this string, word by word),
compressed-tensors 0.20 compressors/pack_quantized/helpers.py.
"""

import math
from typing import NamedTuple

import torch

WORD = 32


class Words(NamedTuple):
    """Which words hold codes start .. stop-1, and how many codes of them come before `start`."""

    first: int
    last: int  # behind the last one
    skip: int


def unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole words: (codes, words). 4 bits: (8, 1). 3 bits: (32, 3)."""
    common = math.gcd(bits, WORD)
    return WORD // common, bits // common


def word_count(count: int, bits: int) -> int:
    return -(-count * bits // WORD)


def words_around(start: int, stop: int, bits: int, count: int) -> Words:
    """The words to read for codes start .. stop-1 of `count`: a cut inside a unit is widened to its borders."""
    codes, words = unit(bits)
    first, behind = start // codes, -(-stop // codes)
    return Words(first * words, min(behind * words, word_count(count, bits)), start - first * codes)


def unpack(words: torch.Tensor, bits: int, count: int, skip: int = 0) -> torch.Tensor:
    """words [.., W] int32, the first at the border of a unit -> codes skip .. skip + count-1, [.., count] uint8."""
    octets = words.clone(memory_format=torch.contiguous_format).view(
        torch.uint8
    )  # also where a size of 1 has any stride
    if 8 % bits == 0:  # no code lies in two bytes
        codes = [octets >> at & (1 << bits) - 1 for at in range(0, 8, bits)]
        octets = torch.stack(codes, dim=-1).flatten(-2)
    else:
        octets = torch.nn.functional.pad(octets, (0, -octets.shape[-1] % bits)).unflatten(-1, (-1, bits))
        eight = sum(octets[..., k].long() << 8 * k for k in range(bits))  # [.., W * 32 / (8 * bits)], 8 codes in each
        mask = (1 << bits) - 1
        octets = torch.stack([(eight >> bits * k & mask).to(torch.uint8) for k in range(8)], dim=-1).flatten(-2)
    return octets[..., skip : skip + count]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes [.., count], each below 2**bits -> [.., ceil(count * bits / 32)] int32; bits left over are zero."""
    words = word_count(codes.shape[-1], bits)
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % unit(bits)[0]))
    if bits < 8:
        eight = codes.unflatten(-1, (-1, 8)).long()
        eight = sum(eight[..., k] << bits * k for k in range(8))
        codes = torch.stack([(eight >> 8 * k & 255).to(torch.uint8) for k in range(bits)], dim=-1).flatten(-2)
    return codes.clone(memory_format=torch.contiguous_format).view(torch.int32)[..., :words].contiguous()
