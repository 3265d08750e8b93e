"""Solution of exercise 13: A draw that does not depend on the others."""

from collections.abc import Callable, Sequence

import numpy as np


def draw(weights: np.ndarray, u: float) -> int:
    ends = np.cumsum(weights, dtype=np.float64)  # float32 would swallow the rare tokens of a large vocabulary
    return int(np.searchsorted(ends, u * ends[-1], side="right"))  # right: a piece without length is passed over


def draw_batch(
    weights: np.ndarray, seeds: Sequence[int], outputs: Sequence[int], random: Callable[[int, int], float]
) -> list[int]:
    return [draw(row, random(seed, n)) for row, seed, n in zip(weights, seeds, outputs, strict=True)]
