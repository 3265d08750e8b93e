"""Solution of exercise 7: One query for all rows."""

import math
from collections.abc import Sequence


def absorb(query: Sequence[float], wk: Sequence[Sequence[float]]) -> list[float]:
    plain, turned = query[: len(wk)], query[len(wk) :]
    return [sum(q * row[j] for q, row in zip(plain, wk, strict=True)) for j in range(len(wk[0]))] + list(turned)


def attend(
    absorbed: Sequence[float], rows: Sequence[Sequence[float]], wv: Sequence[Sequence[float]], scale: float
) -> list[float]:
    scores = [scale * sum(q * x for q, x in zip(absorbed, row, strict=True)) for row in rows]
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    mean = [sum(w * row[j] for w, row in zip(weights, rows, strict=True)) / sum(weights) for j in range(len(wv[0]))]
    return [sum(w * x for w, x in zip(line, mean, strict=True)) for line in wv]
