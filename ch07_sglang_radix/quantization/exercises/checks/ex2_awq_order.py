from types import ModuleType

import numpy as np

from common.teaching.expect import ask, expect

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble -> output


def check(m: ModuleType) -> None:
    rng = np.random.default_rng(0)
    ones = np.ones((1, 8))
    for word, zero in ((0x76543210, 0), (0x76543210, 0x11111111), (0x6, 0x30), (-1, 0)):
        codes, zeros = ([value >> 4 * ORDER.index(o) & 15 for o in range(8)] for value in (word, zero))
        want = [[c - z] for c, z in zip(codes, zeros, strict=True)]
        args = np.array([[word]], dtype=np.int32), np.array([[zero]], dtype=np.int32), ones, 1
        _same(
            f"dequantise of the word {word:#x}, zeros {zero:#x}", ask(m.dequantise, *args, why="an array [8, 1]"), want
        )
    for out, size, groups in ((16, 2, 3), (8, 4, 1), (24, 1, 2)):
        codes, zeros = rng.integers(16, size=(size * groups, out)), rng.integers(16, size=(groups, out))
        scales = rng.integers(1, 5, size=(groups, out)) / 4
        of_input = np.arange(size * groups) // size
        want = ((codes - zeros[of_input]) * scales[of_input]).T
        got = ask(m.dequantise, _words(codes), _words(zeros), scales, size, why="an array [out, in]")
        _same(f"dequantise of {out} outputs, {size * groups} inputs, groups of {size}", got, want.tolist())


def _words(codes: np.ndarray) -> np.ndarray:
    eight = codes.reshape(len(codes), -1, 8)[..., ORDER].astype(np.uint32)
    return (eight << 4 * np.arange(8, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)


def _same(what: str, got: object, want: list) -> None:
    expect(
        what,
        np.asarray(got, dtype=float).tolist() if isinstance(got, np.ndarray) else got,
        [list(map(float, row)) for row in want],
    )
