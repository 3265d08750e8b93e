from types import ModuleType

from common.teaching.expect import ask, expect

CASES = (  # bits, codes
    (4, [0, 1, 2, 3, 4, 5, 6, 7]),
    (4, [1, 2, 3, 4, 5, 6, 7, 8]),
    (4, [15, 0, 3]),
    (8, [1, 2, 3, 255, 128]),
    (2, [0, 1, 2, 3] * 5),
    (3, [0] * 10 + [5]),
    (3, list(range(8)) * 4),
)


def check(m: ModuleType) -> None:
    for bits, codes in CASES:
        words = packed(codes, bits)
        got = ask(m.unpack, list(words), bits, len(codes), several=len(codes))
        expect(f"unpack({words}, {bits}, {len(codes)})", got, codes)
    for bits, codes in CASES:
        got = ask(m.pack, list(codes), bits, several=True)
        expect(f"pack({codes}, {bits})", got, packed(codes, bits))


def packed(codes: list[int], bits: int) -> list[int]:
    """Bit by bit."""
    words = [0] * -(-len(codes) * bits // 32)
    for i, code in enumerate(codes):
        for k in range(bits):
            at = bits * i + k
            words[at // 32] |= (code >> k & 1) << at % 32
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]
