"""Solution of exercise 3: One answer out of parts."""

from math import exp, inf, log


def merge(parts: list[tuple[list[float], float]]) -> tuple[list[float], float]:
    o = [0.0] * len(parts[0][0])
    parts = [(values, lse) for values, lse in parts if lse > -inf]
    if not parts:
        return o, -inf
    best = max(lse for _, lse in parts)
    weights = [exp(lse - best) for _, lse in parts]
    total = sum(weights)
    for (values, _), weight in zip(parts, weights, strict=True):
        o = [old + weight / total * value for old, value in zip(o, values, strict=True)]
    return o, best + log(total)
