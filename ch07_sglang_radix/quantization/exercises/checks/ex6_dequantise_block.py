from types import ModuleType

import numpy as np

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for rows, columns, block, first in (
        (1, 3, (2, 2), 0),
        (4, 4, (2, 2), 0),
        (5, 7, (2, 3), 0),
        (6, 6, (4, 2), 0),
        (2, 2, (2, 2), 2),
        (3, 5, (4, 2), 2),
        (3, 8, (2, 128), 5),
    ):
        q = rng.integers(-8, 9, size=(rows, columns)) / 2
        scale = 2.0 ** rng.integers(-3, 4, size=(-(-(first + rows) // block[0]) + 1, -(-columns // block[1])))
        want = [[q[i, j] * scale[(first + i) // block[0], j // block[1]] for j in range(columns)] for i in range(rows)]
        got = ask(m.dequantise, q, scale, block, first, why=f"an array [{rows}, {columns}]")
        expect(
            f"dequantise of [{rows}, {columns}], blocks of {block[0]} x {block[1]}, first={first}", _floats(got), want
        )
    for rows, columns, block in ((4, 4, (2, 2)), (5, 7, (2, 3)), (3, 6, (4, 2)), (2, 2, (2, 2))):
        w = rng.integers(-20, 21, size=(rows, columns)).astype(float)
        w[:2, :2] = 0  # a rectangle of zeros, or part of one
        what = f"quantise of [{rows}, {columns}], blocks of {block[0]} x {block[1]}"
        q, scale = ask(m.quantise, w.copy(), block, several=2)
        want = [
            [_scale(w[i : i + block[0], j : j + block[1]]) for j in range(0, columns, block[1])]
            for i in range(0, rows, block[0])
        ]
        _near(f"{what}: scales", scale, np.array(want))
        _near(f"{what}: q", q, w / np.array(want)[np.arange(rows)[:, None] // block[0], np.arange(columns) // block[1]])


def _scale(part: np.ndarray) -> float:
    return float(np.abs(part).max()) / 448 or 1.0


def _floats(got: object) -> object:
    return np.asarray(got, dtype=float).tolist() if isinstance(got, np.ndarray) else got


def _near(what: str, got: object, want: np.ndarray) -> None:
    found = np.asarray(got, dtype=float)
    if found.shape != want.shape or not np.allclose(found, want, rtol=1e-6):
        expect(what, _floats(got), want.tolist())
