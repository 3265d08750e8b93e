from types import ModuleType

from common.teaching.expect import ask, expect

CASES = (  # partial sums of each rank
    [[1, 2, 3, 4], [10, 20, 30, 40]],
    [[1, 2, 3], [10, 20, 30]],
    [[1], [10], [100]],
    [[1, 2, 3, 4, 5], [10, 20, 30, 40, 50], [100, 200, 300, 400, 500]],
    [[7, 8]],
)


def check(m: ModuleType) -> None:
    for partials in CASES:
        for bias in (0, 1000):
            ranks, tokens = len(partials), len(partials[0])
            right = [sum(column) + bias for column in zip(*partials, strict=True)]
            held = -(-tokens // ranks)
            parts = ask(m.scatter_rows, [list(rows) for rows in partials], bias, why="rows of each rank", several=ranks)
            what = f"{tokens} rows on {ranks} ranks, bias {bias}"
            for rank, found in enumerate(parts):
                part = list(found) if isinstance(found, list | tuple) else found
                first = rank * held
                expect(f"{what}: how many rows rank {rank} has", len(part) if isinstance(part, list) else part, held)
                real = max(min(held, tokens - first), 0)
                expect(f"{what}: rank {rank}'s rows", part[:real], right[first : first + real])
            got = ask(m.gather_rows, [list(part) for part in parts], tokens, why="all rows", several=True)
            expect(f"{what}: gathered", got, right)
