"""Exercise 9: Top-p keeps the token that crosses p (10 minutes).

Read  "The engine" in the chapter; Holtzman et al. 2020 (nucleus sampling), section 3.1
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 9

Keep the most probable tokens until their probabilities add up to p. A real bug (nano-vllm PR 260): with
probabilities 0.6, 0.3, 0.1 and p = 0.5, which tokens may be drawn?

    probs      NumPy array [V], sums to 1, in any order; stays as it is
    returns    bool array [V]: the fewest tokens, the most probable first, whose probabilities reach p; of equally
               probable ones any

    probs [0.1, 0.3, 0.6]: p = 0.7 keeps [False, True, True], p = 0.5 keeps [False, False, True]
"""

import numpy as np


def top_p_keep(probs: np.ndarray, p: float) -> np.ndarray:
    raise NotImplementedError  # your turn
