"""Exercise 2: The shard of a merged layer (10 minutes).

Read  common/layers/linear.py, class MergedColumnParallelLinear
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 2

gate and up, each [F, D], are computed as one matrix product. Which rows of the two does rank r hold, and in
which order, so that its output splits into its part of gate and its part of up?

    gate, up    NumPy arrays [F, D]; R divides F
    returns     [2 F / R, D]: this rank's rows of gate, then its rows of up
"""

import numpy as np


def merged_shard(gate: np.ndarray, up: np.ndarray, rank: int, num_ranks: int) -> np.ndarray:
    raise NotImplementedError  # your turn
