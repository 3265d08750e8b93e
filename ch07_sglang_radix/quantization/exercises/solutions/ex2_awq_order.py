"""Solution of exercise 2: AWQ's order."""

import numpy as np

NIBBLE_OF = [0, 4, 1, 5, 2, 6, 3, 7]  # output -> nibble


def dequantise(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, size: int) -> np.ndarray:
    codes, zeros = _codes(qweight), _codes(qzeros)
    return ((codes - np.repeat(zeros, size, axis=0)) * np.repeat(scales, size, axis=0)).T


def _codes(words: np.ndarray) -> np.ndarray:
    """[.., W] -> [.., 8 W]."""
    nibbles = words[..., None] >> 4 * np.array(NIBBLE_OF) & 15
    return nibbles.reshape(*words.shape[:-1], -1)
