from types import ModuleType

from common.teaching.expect import ask, expect

CODES = [(7 * i * i + 3 * i) % 16 - 8 for i in range(72)]
WORDS = [sum(code + 8 << 4 * k for k, code in enumerate(CODES[i : i + 8])) for i in range(0, 72, 8)]
CUTS = ((0, 8), (0, 3), (6, 10), (8, 16), (5, 24), (36, 72), (20, 40), (71, 72), (0, 72), (13, 14))


class Reader:
    """Remembers what was asked for."""

    def __init__(self, values: list):
        self.values, self.asked = values, []

    def __call__(self, first: int, last: int) -> list:
        self.asked.append((first, last))
        return self.values[first:last]


def check(m: ModuleType) -> None:
    for size in (4, 12, 18, 72, 8):
        scales = [float(2 + 3 * g) for g in range(-(-len(CODES) // size))]
        for start, stop in CUTS:
            words, shared = Reader(WORDS), Reader(scales)
            got = ask(m.columns, words, shared, size, start, stop, several=stop - start)
            what = f"size={size}, numbers {start} .. {stop - 1}"
            expect(what, [float(x) for x in got], [CODES[i] * scales[i // size] for i in range(start, stop)])
            expect(f"{what}: words that are read", words.asked, [(start // 8, (stop + 7) // 8)])
            expect(f"{what}: scales that are read", shared.asked, [(start // size, -(-stop // size))])
