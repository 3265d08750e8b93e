from types import ModuleType

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    for what, table, start, stop, size, want in (
        ("a whole prompt", [7, 3, 0], 0, 10, 4, [28, 29, 30, 31, 12, 13, 14, 15, 0, 1]),
        ("a chunk that begins in the middle of a block", [7, 3, 0], 6, 9, 4, [14, 15, 0]),
        ("one token, the first of a new block", [7, 3], 4, 5, 4, [12]),
        ("one token, the last of a block", [7, 3], 3, 4, 4, [31]),
        ("one token in the middle of the only block", [5], 2, 3, 16, [82]),
        ("blocks of one token", [9, 8, 7], 1, 3, 1, [8, 7]),
        ("whole blocks from the second on", [2, 9, 4], 2, 6, 2, [18, 19, 8, 9]),
        ("no token", [2, 9], 3, 3, 2, []),
    ):
        got = ask(m.slot_mapping, list(table), start, stop, size)
        expect(f"{what}: slots of tokens {start} .. {stop - 1} of block_table {table}, blocks of {size}", got, want)
