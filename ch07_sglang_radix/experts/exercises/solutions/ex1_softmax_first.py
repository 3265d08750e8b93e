"""Solution of exercise 1: Softmax first, then the best."""

from collections.abc import Sequence
from math import exp


def route(logits: Sequence[float], k: int, normalise: bool) -> list[tuple[int, float]]:
    largest = max(logits)
    powers = [exp(logit - largest) for logit in logits]
    weights = [power / sum(powers) for power in powers]
    chosen = sorted(range(len(weights)), key=lambda expert: -weights[expert])[
        :k
    ]  # stable: of two alike, the lower number
    total = sum(weights[expert] for expert in chosen) if normalise else 1.0
    return [(expert, weights[expert] / total) for expert in chosen]
