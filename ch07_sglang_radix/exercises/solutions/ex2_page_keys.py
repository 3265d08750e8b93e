"""Solution of exercise 2: Keys of whole pages."""

from collections.abc import Hashable

import numpy as np


def aligned(ids: np.ndarray, page_size: int) -> np.ndarray:
    return ids[: len(ids) // page_size * page_size]


def child_key(key: np.ndarray, page_size: int) -> Hashable:
    return tuple(key[:page_size].tolist())  # the first token alone would make 1 2 3 4 and 1 2 3 5 one child


def common_length(a: np.ndarray, b: np.ndarray, page_size: int) -> int:
    n = 0
    while n < min(len(a), len(b)) and np.array_equal(a[n : n + page_size], b[n : n + page_size]):
        n += page_size
    return n
