from math import exp, isclose
from types import ModuleType

from common.teaching.expect import ask, expect

WK, WV = [[1.0, 1.0], [0.0, 2.0]], [[1.0, -1.0]]
ROWS = [[1.0, 0.0, 1.0, 0.0], [2.0, 1.0, 0.0, 1.0], [0.0, 3.0, 1.0, 1.0]]
WIDE_K, WIDE_V = (
    [[1.0, -2.0, 0.5], [3.0, 0.0, 1.0]],
    [[0.0, 1.0, 2.0], [1.0, 1.0, -1.0], [0.5, 0.0, 0.0], [2.0, 0.0, 1.0]],
)
WIDE_ROWS = [[1.0, 2.0, 0.0, 4.0], [0.0, -1.0, 3.0, 0.5], [2.0, 0.0, 1.0, -1.0]]  # c = 3, r = 1
QUERIES = {
    "the example": ([1.0, 1.0, 1.0, 2.0], WK, [1.0, 3.0, 1.0, 2.0]),
    "c = 3, dn = 2, r = 1": ([2.0, 1.0, 7.0], WIDE_K, [5.0, -4.0, 2.0, 7.0]),
    "no turned part": ([1.0, -1.0], WK, [1.0, -1.0]),
    "r = 3": ([0.0, 1.0, 4.0, 5.0, 6.0], WK, [0.0, 2.0, 4.0, 5.0, 6.0]),
}


class Counted(list):
    """A line of a matrix that knows how often it was looked at."""

    looked = 0

    def __iter__(self):
        self.looked += 1
        return super().__iter__()

    def __getitem__(self, at):
        self.looked += 1
        return super().__getitem__(at)


def check(m: ModuleType) -> None:
    for what, (query, wk, want) in QUERIES.items():
        near(f"absorb, {what}", ask(m.absorb, list(query), [list(line) for line in wk]), want)
    cases = {
        "the example": ([1.0, 3.0, 1.0, 2.0], ROWS, WV, 0.1),
        "another scale": ([1.0, 3.0, 1.0, 2.0], ROWS, WV, 0.02),
        "c = 3, r = 1, dv = 4": ([5.0, -4.0, 2.0, 7.0], WIDE_ROWS, WIDE_V, 0.05),
        "one row": ([1.0, 3.0, 1.0, 2.0], ROWS[1:2], WV, 0.1),
        "scores in the thousands": ([1000.0, 3000.0, 1000.0, 2000.0], ROWS, WV, 1.0),
        "scores below minus a thousand": ([-1000.0, -3000.0, -1000.0, -2000.0], ROWS, WV, 1.0),
    }
    for what, (absorbed, rows, wv, scale) in cases.items():
        got = ask(m.attend, list(absorbed), [list(row) for row in rows], [list(line) for line in wv], scale)
        near(f"attend, {what}", got, expanded(absorbed, rows, wv, scale))
    few, many = looks(m, ROWS), looks(m, ROWS * 10)
    if many > few:
        expect("attend, looks at Wv with 30 rows, as many as with 3", many, few)


def looks(m: ModuleType, rows: list[list[float]]) -> int:
    wv = [Counted(line) for line in WV]
    ask(m.attend, [1.0, 3.0, 1.0, 2.0], rows, wv, 0.1)
    return sum(line.looked for line in wv)


def expanded(absorbed: list[float], rows: list[list[float]], wv: list[list[float]], scale: float) -> list[float]:
    """From a value of every row."""
    scores = [scale * sum(q * x for q, x in zip(absorbed, row, strict=True)) for row in rows]
    weights = [exp(score - max(scores)) for score in scores]
    values = [[sum(w * x for w, x in zip(line, row, strict=False)) for line in wv] for row in rows]
    return [sum(w * value[i] for w, value in zip(weights, values, strict=True)) / sum(weights) for i in range(len(wv))]


def near(what: str, got: object, want: list[float]) -> None:
    try:
        numbers = [float(x) for x in got]
        right = len(numbers) == len(want) and all(
            isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(numbers, want, strict=True)
        )
    except (TypeError, ValueError):
        right = False
    if not right:
        expect(what, got, want)
