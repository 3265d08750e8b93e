"""Solution of exercise 1: Which nibble is first."""

from collections.abc import Sequence


def unpack(words: Sequence[int], bits: int, count: int) -> list[int]:
    string = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return [string >> bits * i & (1 << bits) - 1 for i in range(count)]


def pack(codes: Sequence[int], bits: int) -> list[int]:
    string = sum(code << bits * i for i, code in enumerate(codes))
    words = [string >> 32 * i & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]
