"""Solution of exercise 3: Only from the best groups."""

from collections.abc import Sequence


def choose(scores: Sequence[float], groups: int, chosen: int, k: int) -> list[int]:
    size = len(scores) // groups

    def worth(group: int) -> float:
        return sum(sorted(scores[group * size : (group + 1) * size])[-2:])

    best = sorted(range(groups), key=lambda group: -worth(group))[:chosen]
    allowed = [expert for group in sorted(best) for expert in range(group * size, (group + 1) * size)]
    return sorted(allowed, key=lambda expert: -scores[expert])[:k]
