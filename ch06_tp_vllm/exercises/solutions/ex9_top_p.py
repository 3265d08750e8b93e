"""Solution of exercise 9: Top-p keeps the token that crosses p."""

import numpy as np


def top_p_keep(probs: np.ndarray, p: float) -> np.ndarray:
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]  # mass of all more probable tokens
    keep = np.zeros(len(probs), dtype=bool)
    keep[order[before < p]] = True
    return keep
