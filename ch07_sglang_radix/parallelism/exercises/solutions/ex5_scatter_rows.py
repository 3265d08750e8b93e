"""Solution of exercise 5: An all-reduce cut in two."""


def scatter_rows(partials: list[list[float]], bias: float) -> list[list[float]]:
    ranks, tokens = len(partials), len(partials[0])
    held = -(-tokens // ranks)
    sums = [sum(row) + bias for row in zip(*partials, strict=True)] + [bias] * (held * ranks - tokens)
    return [sums[rank * held : (rank + 1) * held] for rank in range(ranks)]


def gather_rows(parts: list[list[float]], tokens: int) -> list[float]:
    return [row for part in parts for row in part][:tokens]
