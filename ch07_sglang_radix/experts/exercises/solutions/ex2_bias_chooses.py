"""Solution of exercise 2: A bias chooses and never weighs."""

from collections.abc import Sequence


def choose(scores: Sequence[float], bias: Sequence[float], k: int, scaling: float) -> list[tuple[int, float]]:
    chosen = sorted(range(len(scores)), key=lambda expert: -(scores[expert] + bias[expert]))[:k]
    total = sum(scores[expert] for expert in chosen)
    return [(expert, scores[expert] / total * scaling) for expert in chosen]


def nudge(bias: Sequence[float], load: Sequence[int], step: float) -> list[float]:
    mean = sum(load) / len(load)
    return [old + step * ((tokens < mean) - (tokens > mean)) for old, tokens in zip(bias, load, strict=True)]
