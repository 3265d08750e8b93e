"""Exercise 9: Top-p keeps the token that crosses p (15 minutes).

Read  common/sampling/sampler.py, _kept
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 9

Keep the most probable tokens until their probabilities add up to p. A real bug (nano-vllm PR 260): with
probabilities 0.6, 0.3, 0.1 and p = 0.5, which tokens may be drawn?

    probs      NumPy array [V], sums to 1
    returns    bool array [V]: the fewest tokens, the most probable first, whose probabilities reach p
"""

import numpy as np


def top_p_keep(probs: np.ndarray, p: float) -> np.ndarray:
    raise NotImplementedError  # your turn
