"""Exercise 2: The shard of a merged layer (5 minutes).

Read  "Parallel layers" in the chapter
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 2

gate and up, each [F, D], are computed as one matrix product. Which rows of the two does rank r hold, and in
which order, so that its output splits into its part of gate and its part of up?

    gate, up    NumPy arrays [F, D]; R divides F
    returns     [2 F / R, D]: this rank's rows of gate (the r-th of R equal parts), then the same rows of up

    gate [[0], [1]], up [[10], [11]], rank 1 of 2: [[1], [11]]
"""

import numpy as np


def merged_shard(gate: np.ndarray, up: np.ndarray, rank: int, num_ranks: int) -> np.ndarray:
    raise NotImplementedError  # your turn
